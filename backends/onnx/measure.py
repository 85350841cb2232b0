"""Seconds of a form under ONNX Runtime: models of nothing but the form, interleaved in one process.

A model layer of few tokens streams its weights from memory, so there the figure is taken over copies that no cache holds together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

import onnx_ir as ir
import torch

from rewriter.backend import Layer, Whole
from rewriter.backends.onnx.emit import attach, default_lowering
from rewriter.backends.onnx.opaque import is_opaque, lowering_of, opaque, spec_of
from rewriter.backends.onnx.run import CPU, Session
from rewriter.backends.onnx.stretch import Stretch
from rewriter.backends.onnx.tensors import from_torch, onnx_dtype
from rewriter.backends.random_form import random_form
from rewriter.cache import measured
from rewriter.operator import AbstractMap, AbstractMatrix, AbstractOperator, Dims, flatten, skeleton
from rewriter.timing import interleave

COLD_BYTES = 64 << 20  # weights that no cache holds
FEW_TOKENS = 8
MOST_COPIES = 32
MANY_TOKENS_COPIES = 2
SECONDS = 0.2  # for each form
OPSET = 20  # unless the file's is given
KERNEL = "kernel"  # a lowering to our own
RUNTIME = f"onnxruntime {version('onnxruntime')}"


def measure(
    forms: Sequence[AbstractOperator], tokens: int, threads: int, provider: str = CPU, contrib: bool = False, kernels: bool = False
) -> list[float]:
    """Seconds per call of each form on `tokens` tokens, each in the lowering that is fastest there; all matrices or all maps.

    `kernels`: what they cover runs in them, but for a dense weight, which is left to the runtime.
    """
    known: dict[str, list[AbstractOperator]] = {}
    rank = 0 if isinstance(forms[0], AbstractMap) else 2
    for form in forms:
        known.setdefault(flatten(form)[1], []).append(form)

    def time() -> list[float]:
        from rewriter.backends.onnx.lowering import chooser

        choose = chooser((tokens,), threads, contrib)
        specs = list(known)
        bodies = [(spec, KERNEL if kernels and _covers(spec) else choose(spec, rank)) for spec in specs]
        seconds = dict(zip(specs, time_bodies(bodies, rank, tokens, threads, provider), strict=True))
        return [seconds[flatten(form)[1]] for form in forms]

    return measured(len(forms), time, RUNTIME, provider, contrib, _library(kernels), tokens, threads, *[flatten(form)[1] for form in forms])


def _library(kernels: bool) -> str:
    """A hash of its code, compiler and instructions; empty without kernels."""
    from rewriter.backends.kernels.session import trusted

    return trusted().path.stem if kernels else ""


def _covers(spec: str) -> bool:
    """Whether a session with kernels runs the form in them."""
    from rewriter.backends.kernels.covering import covers
    from rewriter.backends.kernels.session import trusted

    return covers(random_form(spec), trusted())


def measure_lowerings(spec: str, rank: int, lowerings: Sequence[str], tokens: int, threads: int, opset: int = OPSET) -> list[float]:
    """Seconds of one form in each lowering, at the rank that it is emitted for."""

    def time() -> list[float]:
        return time_bodies([(spec, lowering) for lowering in lowerings], rank, tokens, threads, opset=opset)

    return measured(len(lowerings), time, RUNTIME, "lowerings", spec, rank, *lowerings, tokens, threads, opset)


def time_bodies(
    bodies: Sequence[tuple[str, str]], rank: int, tokens: int, threads: int, provider: str = CPU, opset: int = OPSET
) -> list[float]:
    """Seconds of (spec, lowering) pairs, interleaved; never stored."""
    copies = [copies_of(spec, tokens) for spec, _ in bodies]
    pairs = zip(bodies, copies, strict=True)
    calls = [body_call(spec, lowering, rank, tokens, threads, count, provider, opset) for (spec, lowering), count in pairs]
    timing = interleave(calls, seconds=SECONDS)
    return [timing.seconds(i) / count for i, count in enumerate(copies)]


def measure_transposes(widths: Sequence[int], rank: int, tokens: int, threads: int, opset: int = OPSET) -> list[float]:
    """Seconds of exchanging tokens and features, by width; like bodies, over several values."""

    def model(width: int) -> ir.Model:
        order = [*range(rank - 2), rank - 1, rank - 2]
        dims: list[int | str | None] = [*(f"d{i}" for i in range(rank - 1)), width]
        xs = [ir.val(f"x{i}", ir.DataType.FLOAT, dims) for i in range(MANY_TOKENS_COPIES)]
        nodes = [ir.node("Transpose", [x], {"perm": order}) for x in xs]
        ys = [node.outputs[0] for node in nodes]
        for i, y in enumerate(ys):
            y.name, y.type, y.shape = f"y{i}", ir.TensorType(ir.DataType.FLOAT), ir.Shape([dims[axis] for axis in order])
        return ir.Model(ir.Graph(xs, ys, nodes=nodes, opset_imports={"": opset}, name="transposes"), ir_version=10)

    def time() -> list[float]:
        return [seconds / MANY_TOKENS_COPIES for seconds in time_models([model(width) for width in widths], tokens, threads)]

    return measured(len(widths), time, RUNTIME, "transposes", rank, *widths, tokens, threads, opset)


def time_models(models: Sequence[ir.Model], tokens: int, threads: int) -> list[float]:
    """Seconds of whole models with bodies attached, interleaved; inputs are (..., tokens, width)."""
    timing = interleave([_call(model, tokens, threads) for model in models], seconds=SECONDS)
    return [timing.seconds(i) for i in range(len(models))]


def _call(model: ir.Model, tokens: int, threads: int) -> Callable[[], object]:
    session = Session(ir.to_proto(model).SerializeToString(), threads)
    feeds = {}
    for value in model.graph.inputs:
        dims = list(value.shape or ())
        feeds[value.name or ""] = torch.randn(*[1] * (len(dims) - 2), tokens, *[d for d in dims[-1:] if isinstance(d, int)])
    return session.bound(feeds)


def measure_layers(layers: Sequence[Layer], whole: Whole, threads: int, provider: str = CPU, kernels: bool = False) -> list[float]:
    """Seconds of each layer as it stands in its model, in the lowering that its file has, then those of the whole model; `kernels`: what
    they cover runs in them. Weights come from where the rest of the layer's model leaves them."""
    copies = [copies_of_bytes(layer.what.nbytes, layer.tokens, layer.what.together) if layer.what.nbytes else 1 for layer in layers]
    pairs = list(zip(layers, copies, strict=True))

    def time() -> list[float]:
        calls = [_layer_call(layer.what, count, threads, provider, kernels) for layer, count in pairs]
        timing = interleave([*calls, whole.call], seconds=SECONDS, again=True)
        return [timing.seconds(i) / count for i, count in enumerate([*copies, 1])]

    what = [RUNTIME, "layers", provider, _library(kernels), threads, whole.key, *(f"{count} {layer.key}" for layer, count in pairs)]
    return measured(len(layers) + 1, time, *what)


def _layer_call(stretch: Stretch, copies: int, threads: int, provider: str, kernels: bool) -> Callable[[], object]:
    model = stretch.model(copies)
    lowered = {spec_of(node): lowering_of(node) for node in model.graph if is_opaque(node)}
    library = covered(model, threads) if kernels else ""
    attach(model, lambda spec, rank: lowered[spec, rank] or default_lowering(spec, rank))
    session = Session(ir.to_proto(model).SerializeToString(), threads, provider=provider, library=library)
    given = [torch.randn(x.shape) if x.is_meta else x for x in stretch.given] * copies
    return session.bound({v.name or "": x for v, x in zip(model.graph.inputs, given, strict=True)})


def covered(model: ir.Model, threads: int) -> str:
    """What kernels cover of it is put into them; their library."""
    from rewriter.backends.kernels.covering import cover
    from rewriter.backends.kernels.session import trusted

    cover(model, trusted(), threads)
    return str(trusted().path)


def copies_of(spec: str, tokens: int) -> int:
    operator, leaves = skeleton(spec)
    if not leaves:
        return 1  # nothing that could be cold, and runtimes merge equal nodes
    return copies_of_bytes(operator.cost().nbytes, tokens)


def copies_of_bytes(nbytes: int, tokens: int, together: int = COLD_BYTES) -> int:
    """So many that they have as many bytes together, by default more than any cache holds, where tokens are few."""
    if tokens > FEW_TOKENS:
        return MANY_TOKENS_COPIES
    return max(MANY_TOKENS_COPIES, min(MOST_COPIES, -(-min(together, COLD_BYTES) // max(nbytes, 1))))


def body_call(
    spec: str, lowering: str, rank: int, tokens: int, threads: int, copies: int, provider: str, opset: int
) -> Callable[[], object]:
    """A session over several copies with weights of their own; each matrix reads an x of its own, so that nothing done to x is shared."""
    forms = [random_form(spec, seed) for seed in range(copies)]
    model = stacked(forms, rank, apart=True) if rank else stacked_maps(forms)
    model.graph.opset_imports[""] = opset
    library = ""
    if lowering == KERNEL:
        library = covered(model, threads)
    attach(model, lambda _spec, _rank: lowering)
    session = Session(ir.to_proto(model).SerializeToString(), threads, provider=provider, library=library)
    if rank:
        shape = (*[1] * (rank - 2), *[tokens][: rank - 1], forms[0].shape[1])
        return session.bound({v.name or "": torch.randn(shape) for v in model.graph.inputs})
    return session.bound({name: x / 8 if x.is_floating_point() else x for name, x in examples(forms[0], tokens).items()})


def examples(operator: AbstractMap, tokens: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """Something of the right shape for every input; logarithms of decays are negative."""
    sizes = {**operator.lengths(tokens), "batch": batch}
    shapes = {name: [n if isinstance(n, int) else sizes[n] for n in dims] for name, dims in operator.inputs().items()}
    found = {name: -torch.rand(shape) if name == "decay" else torch.randn(shape) for name, shape in shapes.items()}
    return {name: x > -1 if name in operator.booleans() else x for name, x in found.items()}


def stacked(forms: Sequence[AbstractMatrix], rank: int, apart: bool = False) -> ir.Model:
    """One x through each form, or one for each, each image an output."""
    n, m = forms[0].shape[1], forms[0].shape[0]
    leading = [f"d{i}" for i in range(rank - 1)]
    return _stacked(forms, rank, {"x": (*leading, n)}, {"y": (*leading, m)}, torch.float32, apart)


def stacked_maps(forms: Sequence[AbstractMap], dtype: torch.dtype = torch.float32) -> ir.Model:
    """The same inputs through each map; outputs are numbered by map."""
    model = _stacked(forms, 0, forms[0].inputs(), {f"{name}_": dims for name, dims in forms[0].outputs().items()}, dtype)
    for value in model.graph.inputs:
        if value.name in forms[0].booleans():
            value.type = ir.TensorType(ir.DataType.BOOL)
    return model


def _stacked(
    forms: Sequence[AbstractOperator],
    rank: int,
    inputs: Mapping[str, Dims],
    outputs: Mapping[str, Dims],
    dtype: torch.dtype,
    apart: bool = False,
) -> ir.Model:
    """`apart`: from the second form on, inputs are x1, x2, ..."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="measured")
    given: list[ir.Value] = []
    for i, form in enumerate(forms):
        if apart or not given:
            given = [ir.val(f"{name}{i or ''}", onnx_dtype(dtype), list(dims)) for name, dims in inputs.items()]
            graph.inputs.extend(given)
        leaves, spec = flatten(form)
        factors = []
        for j, leaf in enumerate(leaves):
            held = from_torch(leaf, f"w{i}_{j}")
            factors.append(ir.Value(name=held.name, shape=held.shape, type=ir.TensorType(held.dtype), const_value=held))  # type: ignore[arg-type]
            graph.register_initializer(factors[-1])
        node = opaque(given, factors, spec, f"form{i}", rank, len(outputs))
        graph.append(node)
        for value, (name, dims) in zip(node.outputs, outputs.items(), strict=True):
            value.name, value.shape, value.type = f"{name}{i}", ir.Shape(dims), given[0].type
            graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)
