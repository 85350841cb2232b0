"""An ExportedProgram as a Graph: training-level aten, so parameter names, attention and recurrences are intact.

`run_decompositions({})` flattens no_grad and autocast regions first; cond, scan and while_loop bodies are walked where they stand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Node

from rewriter.backends.files.export import output_names
from rewriter.backends.files.recurrent import whole_recurrences
from rewriter.backends.fx import edit, names
from rewriter.backends.fx.constants import STORED, Body, Constants, bodies
from rewriter.backends.fx.custom_op import SITE
from rewriter.backends.fx.interpreter import run
from rewriter.graph import Place, Site
from rewriter.inputs import InputSpec
from rewriter.operator import AbstractMatrix, flatten, unflatten

_TAPPED = ("", "cond")  # bodies that the interpreter enters


class FxGraph:
    """Implements rewriter.graph.Graph; see there for what each method promises."""

    format = "torch"

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.constants = Constants(program)
        self.mode = edit.fake_mode(program)
        self._bodies = {id(b.module.graph): b for b in bodies(program)}
        self._output_names = output_names(program)
        self._spliced: dict[str, list[tuple[Node, Node]]] = {}  # site id -> (original output, its stand-in)

    @classmethod
    def of(cls, program: ExportedProgram) -> Self:
        """The graph of a program as torch.export gives it; the program itself is left alone."""
        with whole_recurrences():
            return cls(program.run_decompositions({}))

    def nodes(self) -> Iterator[Node]:
        yield from self._walk(self._bodies[id(self.program.graph)])

    def _walk(self, body: Body) -> Iterator[Node]:
        for node in body.module.graph.nodes:
            for inner in self._bodies.values():
                if inner.call is node:
                    yield from self._walk(inner)
            yield node

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
        return self._bodies[id(node.graph)].name

    def shape(self, value: Node) -> tuple[int | str, ...] | None:
        fake = value.meta.get("val")
        return tuple(s if isinstance(s, int) else str(s) for s in fake.shape) if isinstance(fake, Tensor) else None

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
        return list(self.constants.users(self.constants.root(value)))

    def operator(self, node: Node) -> AbstractMatrix | None:
        if node.target is not SITE:
            return None
        factors = [self.constants.load(f) for f in node.args[1]]  # type: ignore[arg-type, union-attr]
        return unflatten(str(node.args[2]), factors)  # type: ignore[return-value]

    def can_splice(self, place: Place) -> str:
        body = self._bodies[id(place.nodes[-1].graph)]
        while body.call is not None:
            if str(body.call.target) != "cond":
                return f"inside a {body.call.target} body: weights cannot be added there yet"
            assert body.parent is not None
            body = body.parent
        return ""

    def can_tap(self, value: Node) -> bool:
        return not any(self.can_splice(Place((value,), value, value)))

    def splice(self, site: Site, operator: AbstractMatrix, shift: Tensor | None = None) -> None:
        leaves, spec = flatten(operator)
        fresh = {f"{site.name}.structured.{i}": leaf.contiguous() for i, leaf in enumerate(leaves)}
        taken = set(self.program.state_dict)
        stored = {self._unused(name, taken): leaf for name, leaf in fresh.items()}
        factors = [edit.add_parameter(self.program, self.mode, name, leaf) for name, leaf in stored.items()]
        self.constants.index()
        biases: dict[Node | None, Node] = {}
        pairs = []
        for place in site.places:
            bias = self._bias(site, place, shift, biases)
            new = self._stand_in(site, place, operator.shape[0], spec, factors, bias)
            place.y.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)  # type: ignore[misc]
            pairs.append((place.y, new))
        self._spliced[site.id] = pairs
        self._settle()

    def _unused(self, name: str, taken: set[str]) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    def _bias(self, site: Site, place: Place, shift: Tensor | None, made: dict[Node | None, Node]) -> Node | None:
        """The place's own bias, or with a shift or scale a new one that holds their sum; equal places share it."""
        if shift is None and place.bias_scale == 1.0:
            return place.bias
        if place.bias not in made:
            old = torch.zeros(()) if place.bias is None else self.constants.load(place.bias).float() * place.bias_scale
            total = old if shift is None else old + shift.float()
            assert site.dtype is not None and site.shape is not None
            total = total.expand(site.shape[0]).to(site.dtype).contiguous()
            name = self._unused(f"{site.name}.structured.bias", set(self.program.state_dict))
            made[place.bias] = edit.add_parameter(self.program, self.mode, name, total)
            self.constants.index()
        return made[place.bias]

    def _stand_in(self, site: Site, place: Place, width: int, spec: str, factors: list[Node], bias: Node | None) -> Node:
        last, aten, layout = place.nodes[-1], torch.ops.aten, place.layout
        graph, body = last.graph, self._bodies[id(last.graph)]
        local = [edit.thread(f, body) for f in factors]
        inner_bias = edit.thread(bias, body) if bias is not None and bias.graph is not graph else bias

        def call(target: Any, *args: Any) -> Node:
            return edit.call(graph, self.mode, target, *args, like=last)

        with graph.inserting_before(place.y.next):
            x = place.x
            if layout.before:
                x = call(aten.permute.default, x, list(layout.before))
            if layout.join > 1:
                x = call(aten.flatten.using_ints, x, -layout.join, -1)
            y = call(SITE, x, local, spec, width, site.name)
            if inner_bias is not None:
                y = call(aten.add.Tensor, y, inner_bias)
            if layout.spread:
                y = call(aten.unflatten.int, y, -1, list(layout.spread))
            if layout.after:
                y = call(aten.permute.default, y, list(layout.after))
        return y

    def restore(self, site: Site) -> None:
        for old, new in self._spliced.pop(site.id):
            new.replace_all_uses_with(old)
        self._settle()
        self.prune(originals=False)

    def _settle(self) -> None:
        """Bring the signature and the compiled code up to date with the graph."""
        output = self.program.graph.output_node()
        for spec, value in zip(self.program.graph_signature.output_specs, output.args[0], strict=True):  # type: ignore[arg-type]
            if isinstance(value, Node):
                spec.arg.name = value.name
        self._bodies = {id(b.module.graph): b for b in bodies(self.program)}
        for body in self._bodies.values():
            body.module.recompile()
        self.constants.index()

    def prune(self, originals: bool = True) -> None:
        """Drop unused nodes and then unused parameters; `originals=False` keeps what a later restore needs."""
        waiting = {old for pairs in self._spliced.values() for old, _ in pairs} if not originals else set()
        for body in reversed(list(self._bodies.values())):
            body.module.graph.eliminate_dead_code(lambda n: n.is_impure() or n in waiting)
            if body.call is not None and str(body.call.target) == "cond":
                edit.drop_unused_operands(body)
        for node in [n for n in self.program.graph.nodes if n.op == "placeholder" and not n.users]:
            if node in self.constants.stored:
                edit.remove_parameter(self.program, node)
        self.constants.stored = {n: s for n, s in self.constants.stored.items() if not n._erased}
        self._settle()

    def run(self, feeds: Mapping[str, Tensor], taps: Mapping[Node, Callable[[Tensor], None]] | None = None) -> dict[str, Tensor]:
        return dict(zip(self._output_names, run(self.program, feeds, taps or {}), strict=True))

    def to_onnx(self, opset: int) -> Any:
        """The graph as an onnx_ir.Model in which every site is one `structured::Site` node."""
        from rewriter.backends.fx.to_onnx import to_onnx

        clean = self.clone()
        clean.prune()
        return to_onnx(clean.program, opset, self._output_names)

    def specs(self) -> list[InputSpec]:
        found = []
        for spec in self.program.graph_signature.input_specs:
            if spec.kind is InputKind.USER_INPUT and not isinstance(spec.arg, ConstantArgument):
                (node,) = [n for n in self.program.graph.nodes if n.op == "placeholder" and n.name == spec.arg.name]
                found.append(InputSpec(node.name, str(self.dtype(node)).removeprefix("torch."), self.shape(node) or ()))
        return found

    def output_names(self) -> list[str]:
        return self._output_names

    def nbytes(self) -> int:
        stored = {s.target for s in self.program.graph_signature.input_specs if s.kind in STORED}
        tensors = {**self.program.state_dict, **self.program.constants}
        seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for k, t in tensors.items() if k in stored}
        return sum(seen.values())

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
            module_call_graph=copy.deepcopy(program.module_call_graph),
            constants=dict(program.constants),
        )
        return FxGraph(copied)

