"""An ExportedProgram as a Graph: training-level aten, so parameter names, attention and recurrences are intact.

`run_decompositions({})` flattens no_grad and autocast regions first; cond, scan and while_loop bodies are walked where they stand.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from rewriter.backends.files.archive import one_line
from rewriter.backends.files.export import output_names
from rewriter.backends.fx import edit, loops, names, region, sizes
from rewriter.backends.fx.compute import compute
from rewriter.backends.fx.constants import STORED, Body, Constants, bodies
from rewriter.backends.fx.custom_op import MAP, SITE
from rewriter.backends.fx.interpreter import part, run
from rewriter.backends.fx.trace import copy_inputs_that_leave, decomposed, settle_attention
from rewriter.cache import fingerprint
from rewriter.caches import fitted
from rewriter.errors import RewriteError
from rewriter.graph import Loop, Place, Region, Site
from rewriter.inputs import InputSpec
from rewriter.operator import AbstractMatrix, AbstractOperator, flatten, unflatten


class FxGraph:
    """Implements rewriter.graph.Graph; see there for what each method promises."""

    format = "torch"

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.constants = Constants(program)
        self.mode = edit.fake_mode(program)
        self._output_names = output_names(program)
        self._words: dict[str, str] = {}  # of sizes
        self._spliced: dict[str, list[tuple[Node, Node]]] = {}  # site id -> (original output, its stand-in)
        self._grown: dict[Node, Node] = {}  # what a place gave -> what it gives with the branch beside it
        self._own: dict[str, list[str]] = {}  # site id -> what `splice` stored for it: factors, then biases
        self._trained: dict[str, list[str]] = {}
        self._found: dict[Graph, Body] | None = None
        self._recached: list[InputSpec] = []

    @classmethod
    def of(cls, program: ExportedProgram) -> Self:
        """The graph of a program as torch.export gives it; the program itself is left alone."""
        return cls(decomposed(program, {}))

    def call_sizes(self, specs: Sequence[InputSpec]) -> None:
        """By the words of these inputs, from here on and in what is exported."""
        self._words = {}
        self._words = sizes.words([self.shape(node) or () for node in self._inputs()], specs)

    @property
    def _bodies(self) -> dict[Graph, Body]:
        """The main body and the nested ones, callers first; an edit drops what is known of them."""
        if self._found is None:
            self._found = {b.module.graph: b for b in bodies(self.program)}
        return self._found

    def nodes(self) -> Iterator[Node]:
        inner: dict[Node | None, list[Body]] = {}
        for body in self._bodies.values():
            inner.setdefault(body.call, []).append(body)

        def walk(body: Body) -> Iterator[Node]:
            for node in body.module.graph.nodes:
                for nested in inner.get(node, ()):
                    yield from walk(nested)
                yield node

        yield from walk(inner[None][0])

    def op(self, node: Node) -> str:
        return names.operation(node)

    def inputs(self, node: Node) -> Sequence[Node | None]:
        return names.operands(node)

    def outputs(self, node: Node) -> Sequence[Node]:
        return (node,)

    def attributes(self, node: Node) -> Mapping[str, Any]:
        return names.attributes(node)

    def producer(self, value: Node) -> Node | None:
        return None if value.op in ("placeholder", "get_attr") else value

    def users(self, value: Node) -> Sequence[Node]:
        return list(value.users)

    def body(self, node: Node) -> str:
        return self._bodies[node.graph].name

    def shape(self, value: Node) -> tuple[int | str, ...] | None:
        fake = value.meta.get("val")
        return tuple(map(self._size, fake.shape)) if isinstance(fake, Tensor) else None

    def _size(self, size: int | torch.SymInt) -> int | str:
        """A number, or the spelling of what varies; a symbol that a later guard fixed is a number too."""
        return int(size) if is_concrete_int(size) else sizes.said(str(size), self._words)

    def dtype(self, value: Node) -> torch.dtype | None:
        fake = value.meta.get("val")
        return fake.dtype if isinstance(fake, Tensor) else None

    def name(self, value: Node) -> str:
        return self.constants.stored.get(value, value.name)

    def scope(self, node: Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        return str(path).removeprefix("L['self'].").removeprefix("L__self___")

    def is_const(self, value: Node) -> bool:
        return self.constants.is_const(value)

    def const(self, value: Node) -> Tensor | None:
        return self.constants.load(value) if self.is_const(value) else None

    def stored_name(self, value: Node) -> str:
        return self.constants.root(value)

    def storage_users(self, value: Node) -> Sequence[tuple[Node, Node]]:
        return self.constants.users(value)

    def operator(self, node: Node) -> AbstractOperator | None:
        if node.target not in (SITE, MAP):
            return None
        factors = [self.constants.load(f) for f in node.args[1]]  # type: ignore[arg-type, union-attr]
        return unflatten(str(node.args[2]), factors)

    def can_splice(self, place: Place | Region) -> str:
        if isinstance(place, Region) and (refused := region.refusal(place)):
            return refused
        body = self._bodies[place.nodes[-1].graph]
        while body.call is not None:
            if str(body.call.target) != "cond":
                return f"inside a {body.call.target} body: weights cannot be added there yet"
            assert body.parent is not None
            body = body.parent
        return ""

    def can_tap(self, value: Node) -> bool:
        return not any(self.can_splice(Place((value,), value, value)))

    def splice(self, site: Site, operator: AbstractOperator, shift: Tensor | None = None) -> None:
        if site.id in self._spliced:
            self.restore(site)
        leaves, spec = flatten(operator)
        self._own[site.id] = []
        factors = [self._store(site, str(i), leaf) for i, leaf in enumerate(leaves)]
        if isinstance(operator, AbstractMatrix):
            self._splice_matrix(site, operator, spec, factors, shift)
        else:
            assert site.region is not None
            local = [edit.thread(f, self._bodies[site.region.nodes[-1].graph]) for f in factors]
            pairs = self._spliced[site.id] = region.stand_in(site.region, self._outside, self.mode, local, spec, site.name)
            for old, new in pairs:
                old.replace_all_uses_with(new)
        self._settle()

    def _splice_matrix(self, site: Site, operator: AbstractMatrix, spec: str, factors: list[Node], shift: Tensor | None) -> None:
        totals: dict[object, Node | None] = {}
        pairs = self._spliced[site.id] = list[tuple[Node, Node]]()
        for place in site.places:
            key = (place.bias and self.constants.outermost(place.bias), place.bias_scale)
            if key not in totals:
                totals[key] = self._total(site, place, shift)
            new = self._stand_in(site, place, operator.shape[0], spec, factors, totals[key])
            place.y.replace_all_uses_with(new)
            pairs.append((place.y, new))

    def _store(self, site: Site, field: str, tensor: Tensor) -> Node:
        """A new parameter of the site under a name that nothing has."""
        node = self._add(f"{site.name}.structured.{field}", tensor)
        self._own[site.id].append(str(self.program.graph_signature.input_specs[0].target))
        return node

    def _add(self, name: str, tensor: Tensor) -> Node:
        while name in self.program.state_dict or name in self.program.constants:
            name += "_"
        return edit.add_parameter(self.program, self.mode, name, tensor.detach().contiguous())

    def _total(self, site: Site, place: Place, shift: Tensor | None) -> Node | None:
        """What is added to the product: the bias itself, or a new parameter where a scale or shift goes into it."""
        if place.bias is not None and not self.is_const(place.bias):
            return None if shift is None else self._store(site, "bias", shift.to(site.dtype))
        if place.bias_scale == 1.0 and shift is None:
            return place.bias and self.constants.outermost(place.bias)
        total, dtype = torch.zeros((), dtype=torch.float64), site.dtype
        if place.bias is not None:
            bias = self.constants.load(place.bias)
            total, dtype = bias.double() * place.bias_scale, bias.dtype
        return self._store(site, "bias", (total if shift is None else total + shift.double()).to(dtype))

    def _current(self, value: Node) -> Node:
        """What stands for an original value now: another site may have been spliced where it was made."""
        return next((new for pairs in self._spliced.values() for old, new in pairs if old is value), value)

    def _outside(self, value: Node) -> Node:
        """The same for a value that a nested body is given."""
        return self._current(self.constants.outermost(value))

    def _stand_in(self, site: Site, place: Place, width: int, spec: str, factors: list[Node], total: Node | None) -> Node:
        last, aten, layout = place.nodes[-1], torch.ops.aten, place.layout
        graph, body = last.graph, self._bodies[last.graph]
        local = [edit.thread(f, body) for f in factors]
        if total is not None and total.graph is not graph:
            total = edit.thread(total, body)

        def call(target: Any, *args: Any) -> Node:
            return edit.call(graph, self.mode, target, *args, like=last)

        with graph.inserting_before(place.y.next):
            y = call(SITE, edit.features(call, self._current(place.x), layout), local, spec, width, site.name)
            if place.bias is not None and not self.is_const(place.bias):
                bias = self._current(place.bias)
                y = call(aten.add.Tensor, y, bias if place.bias_scale == 1.0 else call(aten.mul.Tensor, bias, place.bias_scale))
            if total is not None:
                y = call(aten.add.Tensor, y, total)
            return edit.as_before(call, y, layout)

    def trainable(self, site: Site) -> Sequence[Tensor]:
        self._trained[site.id] = [name for name in self._own[site.id] if self.program.state_dict[name].is_floating_point()]
        return [self.program.state_dict[name].requires_grad_() for name in self._trained[site.id]]

    def branch(self, site: Site, down: Tensor, up: Tensor, shift: Tensor | None = None) -> None:
        parts = {"lora_A": down, "lora_B": up, "lora_bias": shift}
        stored = [self._add(f"{site.name}.{name}", tensor) for name, tensor in parts.items() if tensor is not None]
        for place in site.places:
            graph, aten, x = place.y.graph, torch.ops.aten, cast(Node, place.x)
            call = functools.partial(edit.call, graph, self.mode, like=place.nodes[-1])
            a, b, *bias = [edit.thread(node, self._bodies[graph]) for node in stored]
            with graph.inserting_before(place.y.next):
                low = call(aten.linear.default, edit.features(call, self._grown.get(x, x), place.layout), a)
                y = call(aten.add.Tensor, place.y, edit.as_before(call, call(aten.linear.default, low, b, *bias), place.layout))
            place.y.replace_all_uses_with(y, delete_user_cb=lambda user, y=y: user is not y)
            self._grown[place.y] = y
        self._settle()

    def parameters(self) -> Mapping[str, Node]:
        return {name: node for node, name in self.constants.stored.items()}

    def put(self, value: Node, tensor: Tensor) -> None:
        name, held = self.constants.stored[value], tensor.contiguous()
        where = self.program.state_dict if name in self.program.state_dict else self.program.constants
        where[name] = torch.nn.Parameter(held, requires_grad=False) if isinstance(where[name], torch.nn.Parameter) else held
        self._settle()

    def skip(self, value: Node, kept: Node) -> None:
        value.replace_all_uses_with(kept)
        self._settle()

    def recache(self, past: Node, present: Node, heads: int, width: int) -> None:
        edit.resize(self.mode, past, present, heads, width)
        self._recached = self.specs()
        self._settle()

    def restore(self, site: Site) -> None:
        self._trained.pop(site.id, None)
        for old, new in self._spliced.pop(site.id):
            new.replace_all_uses_with(old)
        self._prune({old for pairs in self._spliced.values() for old, _ in pairs})

    def _settle(self) -> None:
        """Bring the signature up to date with the graph, and look again at the next question."""
        output = self.program.graph.output_node()
        for spec, value in zip(self.program.graph_signature.output_specs, output.args[0], strict=True):
            if isinstance(value, Node):
                spec.arg.name = value.name
        self._found = None
        self.constants.forget()

    def prune(self) -> None:
        self._spliced.clear()
        self._prune(set())
        for body in self._bodies.values():
            body.module.recompile()

    def _prune(self, waiting: set[Node]) -> None:
        """Drop unused nodes and then unused parameters, but not those that wait for a restore."""
        for body in reversed(list(self._bodies.values())):
            for node in reversed(body.module.graph.nodes):  # fx's own sweep enters nested bodies without asking what waits
                if not node.users and node not in waiting and (not node.is_impure(impure_random=False) or self._says_nothing(node)):
                    body.module.graph.erase_node(node)
            if body.call is not None and str(body.call.target) == "cond":
                edit.drop_unused_operands(body)
        edit.remove_parameters(self.program, [n for n in self.constants.stored if not n.users])
        self._settle()

    def _says_nothing(self, node: Node) -> bool:
        """An assertion on a dtype, which tracing leaves at casts and which would keep a stored tensor, or what nothing else reads."""
        value = node.args[0] if node.target is torch.ops.aten._assert_tensor_metadata.default else None
        return isinstance(value, Node) and (self.is_const(value) or all(user.target is node.target for user in value.users))

    def run(
        self, feeds: Mapping[str, Tensor], taps: Mapping[Node, Callable[[Tensor], None]] | None = None, grad: bool = False
    ) -> dict[str, Tensor]:
        taps, feeds = {self._current(value): call for value, call in (taps or {}).items()}, fitted(feeds, self._recached)
        with self._failures():
            return dict(zip(self._output_names, run(self.program, feeds, taps, trained=self._learning(grad)), strict=True))

    def part(self, feeds: Mapping[str, Tensor], given: Mapping[Node, Tensor], wanted: Sequence[Node], grad: bool = False) -> list[Tensor]:
        known, feeds = {self._current(value): tensor for value, tensor in given.items()}, fitted(feeds, self._recached)
        with self._failures():
            return part(self.program, feeds, known, [self._current(value) for value in wanted], self._learning(grad))

    def _learning(self, grad: bool) -> set[str] | None:
        return {name for names in self._trained.values() for name in names} if grad else None

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, IndexError) as problem:
            raise RewriteError(f"the model cannot run on these samples: {one_line(problem)}; check --data, --input and --dim") from problem

    def to_onnx(self, opset: int) -> Any:
        """The graph as an onnx_ir.Model in which every site is one `structured::Site` node."""
        from rewriter.backends.fx.to_onnx import to_onnx

        clean = self.clone()
        clean.prune()
        settle_attention(clean.program)
        copy_inputs_that_leave(clean.program)
        model = to_onnx(clean.program, opset, self._output_names)
        sizes.rename(model, self._words)
        return model

    def loop(self, node: Node) -> Loop | str:
        return loops.loop(node, self._bodies, self.const)

    def sliced(self, value: Node) -> tuple[Node, int, int, bool] | None:
        return loops.sliced(value)

    def stacked(self, node: Node) -> tuple[Sequence[Node], int, bool] | None:
        return loops.stacked(node)

    def compute(self, wanted: Sequence[Node], given: Mapping[Node, Tensor]) -> list[Tensor]:
        return compute(wanted, given, self.const)

    def specs(self) -> list[InputSpec]:
        found = []
        for node in self._inputs():
            dims = [sizes.spelled(size, node.name, axis) for axis, size in enumerate(self.shape(node) or ())]
            found.append(InputSpec(node.name, str(self.dtype(node)).removeprefix("torch."), tuple(dims)))
        return found

    def _inputs(self) -> list[Node]:
        placeholders = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        given = [s.arg for s in self.program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        return [placeholders[arg.name] for arg in given if not isinstance(arg, ConstantArgument)]

    def output_names(self) -> list[str]:
        return self._output_names

    def nbytes(self) -> int:
        stored = {s.target for s in self.program.graph_signature.input_specs if s.kind in STORED}
        tensors = {**self.program.state_dict, **self.program.constants}
        seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for k, t in tensors.items() if k in stored}
        return sum(seen.values())

    def fingerprint(self) -> str:
        nodes = (f"{b.name} {n.name} {n.op} {n.target} {n.args} {n.kwargs}" for b in self._bodies.values() for n in b.module.graph.nodes)
        tensors = {**self.program.state_dict, **self.program.constants}
        return fingerprint(nodes, (_bytes(name, t) for name, t in tensors.items() if isinstance(t, Tensor)))

    def clone(self) -> FxGraph:
        program = self.program
        module = copy.deepcopy(program.graph_module)
        for old, new in zip(program.graph.nodes, module.graph.nodes, strict=True):
            new.name = old.name  # a copy renames what shadows a builtin, such as "input", and the signature would not
        copied = ExportedProgram(
            root=module,
            graph=module.graph,
            graph_signature=copy.deepcopy(program.graph_signature),
            state_dict=dict(program.state_dict),
            range_constraints=copy.deepcopy(program.range_constraints),
            module_call_graph=list(program.module_call_graph),  # never edited, and its tree specifications warn when copied
            constants=dict(program.constants),
        )
        graph = FxGraph(copied)
        graph._words, graph._recached = self._words, self._recached
        return graph


def _bytes(name: str, tensor: Tensor) -> tuple[str, Any]:
    return f"{name} {tensor.dtype} {list(tensor.shape)}", tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
