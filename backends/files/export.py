"""A torch module becomes an ExportedProgram: examples from the specifications, dynamic dimensions by name, nothing specialised in silence.

torch.export is asked with `Dim.AUTO`, which finds the constraints that a model has (`past+seq`, a position table's length)
but also quietly fixes a dimension that the model insists on; so what was asked for is checked in the result.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from rewriter.backends.files.quiet import muted
from rewriter.backends.files.raising import raised
from rewriter.backends.files.recurrent import whole_recurrences
from rewriter.errors import RewriteError
from rewriter.inputs import InputSpec, dim_names, fill_sizes

SMALL = (3, 5, 7, 11, 13, 17, 19, 23)  # never 0 or 1, which torch.export takes for constants
LARGE = (4, 48, 64, 80, 96, 112, 128, 144)  # for models that shrink an axis, such as strided convolutions
AT_ONE_SIZE = "a folder is read at every size or not at all: trace it yourself at the size that you need, save it and give the .pt2"


class NotExported(RewriteError):
    """A module that torch.export does not trace as it was asked: why, and what to do about it."""

    def __init__(self, reason: str, way_on: str) -> None:
        super().__init__(f"{reason}; {way_on}")
        self.reason = reason


def export_module(
    module: torch.nn.Module, specs: Sequence[InputSpec], sizes: Mapping[str, int], notes: list[str] | None = None, own: bool = False
) -> ExportedProgram:
    """Export in eval mode, without gradients, known recurrences raised. `sizes` are hints for the examples: a named dimension stays
    dynamic. `notes` gains what there is to say. `own`: the specifications are the format's, so --input could not change them."""
    _check_names(module, specs)
    fill_sizes(specs, sizes)  # refuses a --dim that no input has
    first_error: Exception | None = None
    fixed: NotExported | None = None
    asked = example_sizes(specs, sizes, SMALL)
    for hints, strict in ((asked, False), (example_sizes(specs, {}, LARGE), False), (asked, True)):
        try:
            with _traceable(module), raised(module) as raising:
                program = _export(module, specs, hints, strict)
        except Exception as error:
            first_error = first_error or error
            continue
        said = _specialised(program, specs)
        if said is None:
            _drop_bounds_of_sums(program)
            _name_outputs(program)
            found = raising.notes(program)
            if notes is not None:
                notes += found
            return program
        reason, way_on = said
        fixed = fixed or NotExported("; ".join([reason, *raising.left()]), AT_ONE_SIZE if own else way_on)
    if fixed is not None:
        raise fixed
    assert first_error is not None
    raise _cannot_export(module, specs, asked, first_error, own) from first_error


def example_sizes(specs: Sequence[InputSpec], sizes: Mapping[str, int], defaults: Sequence[int] = SMALL) -> dict[str, int]:
    """Sizes to trace with: those given where they are no 0 or 1, and distinct defaults elsewhere."""
    out: dict[str, int] = {}
    spare = iter([*defaults, *range(defaults[-1] + 1, 10_000)])
    for name in dim_names(specs):
        given = sizes.get(name, 0)
        out[name] = given if given > 1 else next(size for size in spare if size not in sizes.values())
    return out


def example_inputs(specs: Sequence[InputSpec], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Zeros for integers (a row of every table), ones for masks, seeded normals for floats."""
    generator = torch.Generator().manual_seed(0)
    return {spec.name: _example(spec, spec.shape(sizes), generator) for spec in specs}


def _example(spec: InputSpec, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    dtype = spec.torch_dtype
    if spec.is_mask:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.zeros(shape, dtype=dtype)


def output_names(program: ExportedProgram) -> list[str]:
    """The outputs' names as the module returned them: keys of a dict, fields of a dataclass, else output or output_0, output_1, ..."""
    spec = program.call_spec.out_spec
    if spec is None:
        return [str(name) for name in program.graph_signature.user_outputs]
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = [_path_name(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    return names if len(set(names)) == len(names) == spec.num_leaves else [f"output_{i}" for i in range(spec.num_leaves)]


def _path_name(path: tuple[object, ...]) -> str:
    words = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    if not words:
        return "output"
    return "_".join(words if not words[0].isdigit() else ["output", *words])


def _export(module: torch.nn.Module, specs: Sequence[InputSpec], sizes: Mapping[str, int], strict: bool) -> ExportedProgram:
    shapes = {spec.name: {i: Dim.AUTO for i, dim in enumerate(spec.dims) if isinstance(dim, str)} for spec in specs}
    positional, keyword = _bind(module, example_inputs(specs, sizes))
    dynamic = (tuple(shapes.values()),) if positional else shapes
    return torch.export.export(module, positional, keyword, dynamic_shapes=dynamic, strict=strict)


def _bind(module: torch.nn.Module, examples: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """By name; only a forward(*inputs) takes them by position."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if kinds == [inspect.Parameter.VAR_POSITIONAL]:
        return tuple(examples.values()), {}
    return (), examples


def _check_names(module: torch.nn.Module, specs: Sequence[InputSpec]) -> None:
    names = [spec.name for spec in specs]
    if not names:
        raise RewriteError(f"{type(module).__name__} needs its inputs described; give --input NAME:DTYPE[DIM,...] for each, in order")
    if len(set(names)) < len(names):
        raise RewriteError(f"--input names an input twice: {', '.join(names)}")
    signature = inspect.signature(module.forward)
    parameters = signature.parameters.values()
    if any(parameter.kind == parameter.VAR_POSITIONAL for parameter in parameters) and len(parameters) == 1:
        return
    allowed = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind == p.VAR_KEYWORD for p in parameters)
    unknown = [name for name in names if name not in allowed and not anything]
    shown = f"forward({', '.join(str(p.name) for p in parameters)})"
    if unknown:
        raise RewriteError(f"--input {unknown[0]}: {type(module).__name__}.{shown} has no such parameter; use its names")
    missing = [p.name for p in parameters if p.name in allowed and p.default is p.empty and p.name not in names]
    if missing:
        raise RewriteError(f"{type(module).__name__}.{shown} needs {missing[0]!r}; describe it with --input {missing[0]}:DTYPE[DIM,...]")


@contextmanager
def _traceable(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and without the fused encoder kernel, which would hide six linears in one node.

    Parameters want none either: a scan that a gradient could flow through cannot be traced a second time.
    """
    training = [(part, part.training) for part in module.modules()]
    wanting = [parameter for parameter in module.parameters() if parameter.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    with contextlib.suppress(NotImplementedError):  # a program's module is in eval mode for ever
        module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for parameter in wanting:
            parameter.requires_grad = False
        with torch.no_grad(), whole_recurrences(), warnings.catch_warnings(), muted():
            warnings.simplefilter("ignore")  # an LSTM reassigns its own weight list while traced
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, flag in training:
            part.training = flag
        for parameter in wanting:
            parameter.requires_grad = True


def _specialised(program: ExportedProgram, specs: Sequence[InputSpec]) -> tuple[str, str] | None:
    """The first dimension that was asked to be dynamic and became a number, and how to ask for another."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    for spec, name in zip(specs, program.graph_signature.user_inputs, strict=True):
        value = values.get(str(name))
        for axis, dim in enumerate(spec.dims):
            if not isinstance(dim, str) or not isinstance(value, Tensor):
                continue
            size = value.shape[axis]
            if isinstance(size, int) or not size.node.expr.free_symbols:
                fixed = InputSpec(spec.name, spec.dtype, (*spec.dims[:axis], int(size), *spec.dims[axis + 1 :]))
                return (
                    f"the model fixes dimension {dim!r} of input {spec.name!r} to {int(size)}, so it cannot be dynamic",
                    f"write --input {fixed}, or trace with another size through --dim {dim.split('+')[-1]}=N",
                )
    return None


def _drop_bounds_of_sums(program: ExportedProgram) -> None:
    """torch.export assumes every dynamic size to be at least 2 and forgives 0 and 1 to a plain size, but not to a sum of two
    (`attention_mask.size()[1] >= 4`, which bars a prompt of three tokens); and what it says of a sum, torch.export.load takes for a symbol
    that `run_decompositions` then fails on. Sizes that an operation cannot take still fail in it."""
    for size in [size for size in program.range_constraints if len(size.free_symbols) > 1]:
        del program.range_constraints[size]


def _name_outputs(program: ExportedProgram) -> None:
    """Give the nodes that are outputs the outputs' names, so that later graphs carry them."""
    nodes = {node.name: node for node in program.graph.nodes}
    results = program.graph.find_nodes(op="output")[0].args[0]
    pairs = zip(results, program.graph_signature.output_specs, strict=True)
    users = [(node, kept) for node, kept in pairs if kept.kind == OutputKind.USER_OUTPUT]
    for (node, kept), name in zip(users, output_names(program), strict=True):
        word = re.sub(r"\W", "_", name)
        taken = nodes.get(word)
        named = not isinstance(node, torch.fx.Node) or node.op != "call_function" or node.name == word
        if named or results.count(node) > 1 or (taken is not None and taken.op == "placeholder"):
            continue
        if taken is not None:
            if taken in results:
                continue
            taken._rename(f"{word}_inner")
            program.graph._graph_namespace._used_names.discard(word)
        node._rename(word)
        kept.arg.name = node.name
        nodes[node.name] = node
    program.graph_module.recompile()


def _cannot_export(
    module: torch.nn.Module, specs: Sequence[InputSpec], sizes: Mapping[str, int], error: Exception, own: bool
) -> NotExported:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = lines[0] if lines else type(error).__name__
    cause = cause if len(cause) <= 200 else cause[:197] + "..."
    inputs = " ".join(str(spec) for spec in specs)
    traced = ", ".join(f"{name}={size}" for name, size in sizes.items())
    return NotExported(
        f"torch.export cannot trace {type(module).__name__} with {inputs}{f' at {traced}' if traced else ''}: {cause.rstrip('.')}",
        f"check {'--dim' if own else '--input and --dim'}, or export it yourself and give the .pt2 or .onnx",
    )
