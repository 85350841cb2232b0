"""An onnx_ir.Model as a Graph, brought to one form first: functions inlined, weights as initialisers of the main graph, every name unique.

Bodies of If, Loop and Scan are edited where they stand; they see the main graph's initialisers, so factors need no threading through them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnx_ir.tape import Tape
from torch import Tensor

from rewriter.backends.onnx import fingerprint, loops, names, region
from rewriter.backends.onnx.compute import compute
from rewriter.backends.onnx.constants import Constants
from rewriter.backends.onnx.edit import Bias, Names, as_before, features, resize, stand_in, store, store_factors
from rewriter.backends.onnx.normal import LEAST_OPSET, normalised
from rewriter.backends.onnx.opaque import DOMAIN, VERSION, is_opaque, spec_of
from rewriter.backends.onnx.run import Part, Tapped, no_gradients
from rewriter.backends.onnx.shapes import infer
from rewriter.backends.onnx.tensors import from_torch, torch_dtype
from rewriter.caches import fitted
from rewriter.errors import RewriteError
from rewriter.graph import Loop, Place, Region, Site
from rewriter.inputs import InputSpec
from rewriter.operator import AbstractMap, AbstractMatrix, AbstractOperator, skeleton, unflatten

_DIM = re.compile(r"[A-Za-z_]\w*(\+[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Edit:
    """What a splice did, for its undoing."""

    pairs: list[tuple[ir.Value, ir.Value]] = field(default_factory=list)  # original output, its stand-in
    nodes: list[ir.Node] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)  # new initialisers


class OnnxGraph:
    """Implements rewriter.graph.Graph; see there for what each method promises. The model that it is given is left alone."""

    format = "onnx"

    def __init__(self, model: ir.Model) -> None:
        self.model = normalised(model)
        self._adopt()

    def _adopt(self) -> None:
        self.opset = self.model.graph.opset_imports.get("", LEAST_OPSET)
        self.constants = Constants(self.opset)
        self._names = Names(self.model)
        self._owners = {id(body): (node, attribute) for node in self.model.graph.all_nodes() for attribute, body in bodies(node)}
        self._spliced: dict[str, Edit] = {}  # by site id
        self.grown: dict[ir.Value, ir.Value] = {}  # what a place gave, what it gives with what was put beside it
        self._inferred = False
        self._session: Tapped | None = None
        self._part: Part | None = None
        self._recached: list[InputSpec] = []

    def nodes(self) -> Iterator[ir.Node]:
        yield from self._walk(self.model.graph)

    def _walk(self, graph: ir.Graph) -> Iterator[ir.Node]:
        for node in list(graph):
            for _, body in bodies(node):
                yield from self._walk(body)
            yield node

    def op(self, node: ir.Node) -> str:
        return names.operation(node)

    def inputs(self, node: ir.Node) -> Sequence[ir.Value | None]:
        return names.operands(node)

    def outputs(self, node: ir.Node) -> Sequence[ir.Value]:
        return node.outputs

    def attributes(self, node: ir.Node) -> Mapping[str, Any]:
        return names.attributes(node)

    def producer(self, value: ir.Value) -> ir.Node | None:
        return value.producer()

    def users(self, value: ir.Value) -> Sequence[ir.Node]:
        leaves = [names.OUTPUT] if value.is_graph_output() else []
        return [*dict.fromkeys(node for node, _ in value.uses()), *leaves]

    def body(self, node: ir.Node) -> str:
        owner = self._owners.get(id(node.graph))
        if owner is None:
            return ""
        outer, name = self.body(owner[0]), f"{owner[0].name}.{owner[1]}"
        return f"{outer}/{name}" if outer else name

    def shape(self, value: ir.Value) -> tuple[int | str, ...] | None:
        if value.shape is None or any(isinstance(d, ir.SymbolicDim) and d.value is None for d in value.shape):
            self._infer()  # exporters leave sizes open that follow from others
        if value.shape is None:
            return None
        return tuple(d if isinstance(d, int) else self._dim(value, i, d) for i, d in enumerate(value.shape))

    @staticmethod
    def _dim(value: ir.Value, axis: int, dim: ir.SymbolicDim) -> str:
        """The dimension's name; one of its own where it has none that --input could spell."""
        said = str(dim.value or "").replace(" ", "")
        return said if _DIM.fullmatch(said) else re.sub(r"\W", "_", f"{value.name}_{axis}")

    def _infer(self) -> None:
        if not self._inferred:
            self._inferred = True
            infer(self.model)

    def dtype(self, value: ir.Value) -> torch.dtype | None:
        if value.dtype is None:
            self._infer()
        return torch_dtype(value.dtype)

    def name(self, value: ir.Value) -> str:
        return value.name or ""

    def scope(self, node: ir.Node) -> str:
        return names.scope(node)

    def is_const(self, value: ir.Value) -> bool:
        return self.constants.is_const(value)

    def const(self, value: ir.Value) -> Tensor | None:
        return self.constants.load(value) if self.is_const(value) else None

    def stored_name(self, value: ir.Value) -> str:
        return self.constants.root(value).name or ""

    def storage_users(self, value: ir.Value) -> Sequence[tuple[ir.Node, ir.Value]]:
        return list(self.constants.users(self.constants.root(value)))

    def operator(self, node: ir.Node) -> AbstractOperator | None:
        if not is_opaque(node):
            return None
        operator, leaves = skeleton(spec_of(node)[0])
        factors = [self.const(v) for v in node.inputs[len(node.inputs) - len(leaves) :] if v is not None]
        if any(f is None for f in factors):
            raise RewriteError(f"node {node.name}: a structured operator whose factors are not constant; give the model it was made from")
        return unflatten(spec_of(node)[0], factors) if leaves else operator  # type: ignore[arg-type]

    def can_splice(self, place: Place | Region) -> str:
        if isinstance(place, Region):
            return region.refusal(place)
        if self.shape(place.x) is None:
            return "the rank of its input is unknown: shape inference stops before it"
        return ""

    def can_tap(self, value: ir.Value) -> bool:
        return value.graph is self.model.graph and not value.is_initializer()

    def loop(self, node: ir.Node) -> Loop | str:
        self._infer()
        return loops.loop(node, self.const)

    def sliced(self, value: ir.Value) -> tuple[ir.Value, int, int, bool] | None:
        return loops.sliced(value, self.const)

    def stacked(self, node: ir.Node) -> tuple[Sequence[ir.Value], int, bool] | None:
        return loops.stacked(node, self.const)

    def compute(self, wanted: Sequence[ir.Value], given: Mapping[ir.Value, Tensor]) -> list[Tensor]:
        return compute(wanted, given, self.constants)

    def splice(self, site: Site, operator: AbstractOperator, shift: Tensor | None = None) -> None:
        if site.id in self._spliced:
            self.restore(site)
        if any(v.shape is None for node in self.model.graph.all_nodes() for v in node.outputs):
            self._infer()  # while every operator is still one that inference knows
        self.model.graph.opset_imports[DOMAIN] = VERSION
        before = set(self.model.graph.initializers)
        factors, spec = store_factors(self.model, self._names, site.name, operator)
        edit = self._spliced[site.id] = Edit()  # known before the first place, so that a later one reads this one's new output
        if isinstance(operator, AbstractMap):
            self._splice_map(site, edit, factors, spec)
        total = Bias(self.model, self._names, self.constants, site, shift)
        for place in site.places if isinstance(operator, AbstractMatrix) else ():
            tape = Tape()
            bias = None if place.bias is None else self._current(place.bias)
            new = stand_in(tape, site, place, self._current(place.x), bias, factors, spec, total)
            self._insert(place.y, new, tape.nodes, site.name)
            edit.pairs.append((place.y, new))
            edit.nodes.extend(tape.nodes)
        edit.stored.extend(name for name in self.model.graph.initializers if name not in before)
        self._edited()

    def _current(self, value: ir.Value) -> ir.Value:
        """What stands for an original value now: another site may have been spliced where it was made."""
        return next((new for edit in self._spliced.values() for old, new in edit.pairs if old is value), value)

    def _splice_map(self, site: Site, edit: Edit, factors: Sequence[ir.Value], spec: str) -> None:
        assert site.region is not None
        tape, body = Tape(), site.region.nodes[-1].graph
        assert isinstance(body, ir.Graph)
        edit.pairs.extend(region.stand_in(tape, site.region, self._current, factors, spec, site.name))
        edit.nodes.extend(tape.nodes)
        self._name(tape.nodes, site.name)
        after = region.anchor(site.region, self._current)
        body.insert_after(after, tape.nodes) if after is not None else body.insert_before(body[0], tape.nodes)
        for old, new in edit.pairs:
            new.shape, new.type = old.shape, old.type
            _replace(old, new)

    def _name(self, nodes: Sequence[ir.Node], site: str) -> None:
        for node in nodes:
            node.name = self._names.unused(f"{site}.{node.op_type}")
            for output in node.outputs:
                output.name = self._names.unused(node.name)

    def _insert(self, old: ir.Value, new: ir.Value, nodes: Sequence[ir.Node], site: str) -> None:
        self._name(nodes, site)
        last = old.producer()
        assert last is not None, "a place ends in a node"
        assert last.graph is not None
        last.graph.insert_after(last, nodes)
        new.shape, new.type = old.shape, old.type
        _replace(old, new)

    def branch(self, site: Site, down: Tensor, up: Tensor, shift: Tensor | None = None) -> None:
        parts = {"lora_A": down.T, "lora_B": up.T, "lora_bias": shift}
        a, b, *bias = [self.parameter(f"{site.name}.{key}", t.contiguous()) for key, t in parts.items() if t is not None]

        def low(tape: Tape, x: ir.Value) -> ir.Value:
            made = tape.op("MatMul", [tape.op("MatMul", [x, a]), b])
            return tape.op("Add", [made, *bias]) if bias else made

        for place in site.places:
            self.beside(site, place, low)

    def parameter(self, name: str, tensor: Tensor) -> ir.Value:
        """A new stored one, by that name or one like it."""
        return store(self.model, self._names, tensor, name)

    def beside(self, site: Site, place: Place, made: Callable[[Tape, ir.Value], ir.Value]) -> None:
        """What is made of the place's features is added to what it gives."""
        assert site.shape is not None
        tape, given = Tape(), cast(ir.Value, place.x)
        x, shape = features(tape, place.layout, self.grown.get(given, given), site.shape[1])
        y = self.grown[place.y] = tape.op("Add", [place.y, as_before(tape, place.layout, made(tape, x), len(shape))])
        self._insert(place.y, y, tape.nodes, site.name)
        tape.nodes[-1].replace_input_with(0, place.y)
        self._edited()

    def insert_before(self, node: ir.Node, nodes: Sequence[ir.Node], name: str) -> None:
        """New nodes, and names for them."""
        self._name(nodes, name)
        assert node.graph is not None
        node.graph.insert_before(node, nodes)

    def parameters(self) -> Mapping[str, ir.Value]:
        return self.model.graph.initializers

    def put(self, value: ir.Value, tensor: Tensor) -> None:
        value.const_value = from_torch(tensor.contiguous(), value.name or "")
        self._edited()

    def skip(self, value: ir.Value, kept: ir.Value) -> None:
        _replace(value, kept)
        self._edited()

    def recache(self, past: ir.Value, present: ir.Value, heads: int, width: int) -> None:
        if past.shape is None or present.shape is None:
            self._infer()
        resize(past, present, heads, width)
        self._recached = self.specs()
        self._edited()

    def restore(self, site: Site) -> None:
        edit = self._spliced.pop(site.id)
        for old, new in edit.pairs:
            _replace(new, old)
        for node in reversed(edit.nodes):
            assert node.graph is not None
            node.graph.remove(node, safe=True)
        for name in edit.stored:
            del self.model.graph.initializers[name]
        self._names.taken -= {*edit.stored, *(n.name for n in edit.nodes), *(v.name for n in edit.nodes for v in n.outputs)}
        self._edited()

    def _edited(self) -> None:
        self.constants.forget()
        self._session = self._part = None

    def prune(self) -> None:
        self._spliced.clear()
        passes.RemoveUnusedNodesPass()(self.model)
        self._edited()

    def run(
        self, feeds: Mapping[str, Tensor], taps: Mapping[ir.Value, Callable[[Tensor], None]] | None = None, grad: bool = False
    ) -> dict[str, Tensor]:
        """Under ONNX Runtime on the CPU; the session lives until the graph or the set of taps changes."""
        no_gradients(grad)
        taps = {self._current(value): call for value, call in (taps or {}).items()}
        wanted = tuple(value.name or "" for value in taps)
        if self._session is None or self._session.taps != wanted:
            self._session = Tapped(self.model, wanted)
        return self._session(fitted(feeds, self._recached), list(taps.values()))

    def part(
        self, feeds: Mapping[str, Tensor], given: Mapping[ir.Value, Tensor], wanted: Sequence[ir.Value], grad: bool = False
    ) -> list[Tensor]:
        no_gradients(grad)
        known = {self._current(value).name or "": tensor for value, tensor in given.items()}
        names = tuple(self._current(value).name or "" for value in wanted)
        if self._part is None or (self._part.given, self._part.wanted) != (tuple(known), names):
            self._infer()
            self._part = Part(self.model, tuple(known), names)
        return self._part(fitted(feeds, self._recached), list(known.values()))

    def trainable(self, site: Site) -> Sequence[Tensor]:
        raise RewriteError("the weights of an ONNX graph do not train; give the torch model (.pt2, module or folder)")

    def specs(self) -> list[InputSpec]:
        found = []
        for value in self.model.graph.inputs:
            dtype = self.dtype(value)
            if dtype is None:
                raise RewriteError(f"input {value.name!r} is of type {value.type}; only tensors that torch has can be fed")
            found.append(InputSpec(self.name(value), str(dtype).removeprefix("torch."), self.shape(value) or ()))
        return found

    def output_names(self) -> list[str]:
        return [value.name or "" for value in self.model.graph.outputs]

    def nbytes(self) -> int:
        tensors = {id(v.const_value): v.const_value.nbytes for v in self.model.graph.initializers.values() if v.const_value is not None}
        return sum(tensors.values())

    def fingerprint(self) -> str:
        return fingerprint.of(self.model, self.nodes())

    def clone(self) -> OnnxGraph:
        copy = OnnxGraph.__new__(OnnxGraph)
        copy.model = self.model.clone()
        copy._adopt()
        copy._inferred, copy._recached = self._inferred, self._recached
        return copy


def bodies(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """The nested bodies of a node, by attribute."""
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            yield from ((f"{name}[{i}]", graph) for i, graph in enumerate(attribute.as_graphs()))


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Every use of old becomes one of new; a graph output keeps its name."""
    if old.is_graph_output():
        old.name, new.name = new.name, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
