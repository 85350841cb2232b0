"""A model's opaque nodes as kernels, in place: matrices as a Chain with the bias and activation behind it, recurrences as a Recurrence.

What is not covered stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor

from rewriter.algebra import ByTokens
from rewriter.backends.files.archive import one_line
from rewriter.backends.kernels.following import Following, following
from rewriter.backends.kernels.heads import KIND, Heads, heads_of
from rewriter.backends.kernels.library import Kernels
from rewriter.backends.kernels.pack import pack
from rewriter.backends.kernels.plan import NotCovered, for_session
from rewriter.backends.kernels.recurrences import Sizes, sizes_of
from rewriter.backends.onnx.constants import Constants
from rewriter.backends.onnx.edit import Names, store
from rewriter.backends.onnx.either import parted
from rewriter.backends.onnx.emit import attach_matrix
from rewriter.backends.onnx.opaque import SITE, is_opaque, kind, spec_of
from rewriter.cache import digest
from rewriter.errors import RewriteError
from rewriter.operator import AbstractMap, AbstractMatrix, AbstractOperator, skeleton, unflatten
from rewriter.quantised import Quantised

DOMAIN, OP, RECURRENCE = "structured.kernels", "Chain", "Recurrence"  # and an attention's own name


@dataclass(frozen=True)
class Covered:
    """What became of one opaque node."""

    site: str
    kind: str
    reason: str  # why the kernels leave it; empty where they take it
    fused: tuple[str, ...] = ()  # what went with it, see Following.said


def cover(model: ir.Model, library: Kernels, threads: int) -> list[Covered]:
    """Every opaque node, in order."""
    if any(node.domain == DOMAIN for node in [*model.graph.all_nodes(), *(n for f in model.functions.values() for n in f.all_nodes())]):
        raise RewriteError(f"the model holds {DOMAIN} nodes of its own; those are made in memory alone, for one machine: no file has any")
    parts = parted(model)
    under_way = _Cover(model, library, threads)
    found = [under_way.node(node) for node in list(model.graph.all_nodes()) if is_opaque(node)]
    if any(not c.reason for c in found):
        model.graph.opset_imports[DOMAIN] = 1
    passes.RemoveUnusedNodesPass()(model)
    for node in parts:
        if node.graph is not None:  # it is left to stock operators, and the file has a body of both forms alone
            attach_matrix(model, node)
    passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return found


class _Cover:
    """One model under way; equal layers share their packed weights."""

    def __init__(self, model: ir.Model, library: Kernels, threads: int) -> None:
        self.model, self.library, self.threads = model, library, threads
        self.names, self.constants = Names(model), Constants(model.graph.opset_imports.get("", 20))
        self.stored: dict[str, ir.Value] = {}  # packed weights by their hash

    def node(self, node: ir.Node) -> Covered:
        site = node.metadata_props.get(SITE, node.name or "")
        try:
            operator = _operator(node, self.constants)
            if isinstance(operator, AbstractMap):
                sizes = taken(operator, self.library)
                made = self._attention(node, operator, sizes) if isinstance(sizes, Heads) else self._recurrence(node, sizes)
                made.name = self.names.unused(f"{made.op_type}_{site}")
                self.constants.forget()
                return Covered(site, node.op_type, "")
            assert isinstance(operator, AbstractMatrix)
            found = following(node.outputs[0], operator.shape[0], self.constants)
            packed = pack(for_session(operator, found.ending), self.library.layout)
            said = named(node)
        except NotCovered as left:
            return Covered(site, node.op_type, str(left))
        except Exception as problem:  # whatever a file may say of itself, stock operators run what it holds
            return Covered(site, node.op_type, f"what it says of itself cannot be read: {one_line(problem)}")
        self._replace(node, found, packed)
        self.constants.forget()
        return Covered(site, said, "", found.said)

    def _recurrence(self, node: ir.Node, sizes: Sizes) -> ir.Node:
        """One Recurrence with the node's own inputs and outputs."""
        made = recurrence_node(node.inputs, sizes, self.threads)
        assert node.graph is not None
        node.graph.insert_after(node, made)
        for old, new in zip(node.outputs, made.outputs, strict=True):
            self._takes_over(new, old)
        return made

    def _attention(self, node: ir.Node, operator: AbstractMap, sizes: Heads) -> ir.Node:
        """One Attention from before its inputs' transposes to behind its output's."""
        before = [turned(value) for value in node.inputs[:3]]
        after = turned_after(node.outputs[0])
        bits = [value is not None for value in (*before, after)]
        sizes = replace(sizes, turned=sum(bit << i for i, bit in enumerate(bits)))
        given = [found or value for found, value in zip(before, node.inputs[:3], strict=True)]
        made = attention_node([*given, *self._added(node, operator)], sizes, self.threads)
        end = after or node.outputs[0]
        producer = end.producer()
        assert producer is not None and producer.graph is not None
        producer.graph.insert_after(producer, made)
        self._takes_over(made.outputs[0], end)
        return made

    def _added(self, node: ir.Node, operator: AbstractMap) -> list[ir.Value]:
        """The masks as one that is added, or nothing."""
        named = {name: value for name, value in zip(operator.inputs(), node.inputs, strict=False) if value is not None}
        mask, bias = named.get("mask"), named.get("bias")
        if mask is not None and "mask" in operator.booleans():
            hidden: Any = getattr(operator, "hidden", None)
            mask = self._before(node, "Where", [mask, *(self._number(n) for n in (0.0, hidden))])
        if mask is not None and bias is not None:
            mask = self._before(node, "Add", [mask, bias])
        return [value for value in [mask or bias] if value is not None]

    def _before(self, node: ir.Node, kind: str, inputs: Sequence[ir.Value]) -> ir.Value:
        made = ir.node(kind, inputs, name=self.names.unused(f"{kind}_mask"))
        made.outputs[0].name, made.outputs[0].type = self.names.unused("mask"), ir.TensorType(ir.DataType.FLOAT)
        assert node.graph is not None
        node.graph.insert_before(node, made)
        return made.outputs[0]

    def _number(self, number: float) -> ir.Value:
        return store(self.model, self.names, torch.tensor(number), "number")

    def _takes_over(self, new: ir.Value, old: ir.Value) -> None:
        """Everything that was read from the old value is read from the new one, by its name."""
        new.shape, new.type, known = old.shape, old.type or ir.TensorType(ir.DataType.FLOAT), old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name, new.name = self.names.unused(f"{known}.before"), known

    def _replace(self, node: ir.Node, found: Following, packed: Tensor) -> None:
        """One Chain from the node's x to what follows it; what lay between is unused then and goes."""
        end, key = found.end, digest(packed.numpy().tobytes())
        if key not in self.stored:
            self.stored[key] = store(self.model, self.names, packed, f"{node.metadata_props.get(SITE, OP)}.packed")
        chain = chain_node([node.inputs[0], self.stored[key], found.skip], packed, self.threads, found.reshape)
        chain.name = self.names.unused(f"{OP}_{node.name or 'site'}")
        producer = end.producer()
        assert producer is not None and producer.graph is not None
        producer.graph.insert_after(producer, chain)
        self._takes_over(chain.outputs[0], end)


def taken(operator: AbstractOperator, library: Kernels) -> Sizes | Heads:
    """What the kernel is to do for a map; NotCovered where it has nothing for it."""
    sizes = heads_of(operator) if type(operator).__name__ == KIND else sizes_of(operator)
    if not library.takes(sizes):
        raise NotCovered("its sizes do not fit together, or are larger than the kernel takes")
    return sizes


def covers(operator: AbstractOperator, library: Kernels) -> bool:
    """Whether the kernels have something for it, or for one of its two forms."""
    if isinstance(operator, ByTokens):
        return covers(operator.few, library) or covers(operator.many, library)
    try:
        for_session(operator) if isinstance(operator, AbstractMatrix) else taken(operator, library)
    except NotCovered:
        return False
    return True


def chain_node(inputs: Sequence[ir.Value | None], packed: Tensor, threads: int, reshape: ir.Node | None = None) -> ir.Node:
    """Chain(x, packed[, what is added[, the shape of what it gives]])."""
    allowed = reshape.attributes.get("allowzero") if reshape is not None else None
    options = {"threads": threads, "bytes": packed.numel(), "allowzero": allowed.as_int() if allowed is not None else 0}
    shape = [reshape.inputs[1]] if reshape is not None else []
    return ir.Node(DOMAIN, OP, [*inputs, *shape], [ir.AttrInt64(name, value) for name, value in options.items()], version=1)


def recurrence_node(inputs: Sequence[ir.Value | None], sizes: Sizes, threads: int) -> ir.Node:
    """Recurrence(what the sizes ask for) -> output, state."""
    options = [ir.AttrInt64(name, value) for name, value in {**sizes.attributes(), "threads": threads}.items()]
    return ir.Node(DOMAIN, RECURRENCE, inputs, options, num_outputs=2, version=1)


def attention_node(inputs: Sequence[ir.Value | None], sizes: Heads, threads: int) -> ir.Node:
    """Attention(query, key, value[, what is added to the scores])."""
    options = [ir.AttrInt64(name, value) for name, value in {**sizes.attributes(), "threads": threads}.items()]
    return ir.Node(DOMAIN, KIND, inputs, options, version=1)


def turned(value: ir.Value | None) -> ir.Value | None:
    """What a value of four axes is the transpose of, heads and time exchanged."""
    producer = None if value is None else value.producer()
    return producer.inputs[0] if producer is not None and _turns(producer) else None


def turned_after(value: ir.Value) -> ir.Value | None:
    """The same behind a value that is used for nothing else, in no nested body either."""
    uses, producer = list(value.uses()), value.producer()
    alone = len(uses) == 1 and not value.is_graph_output() and _turns(uses[0].node)
    alone = alone and producer is not None and uses[0].node.graph is producer.graph
    return uses[0].node.outputs[0] if alone else None


def _turns(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and node.domain in ("", "ai.onnx") and perm is not None and list(perm.as_ints()) == [0, 2, 1, 3]


def named(node: ir.Node) -> str:
    """The structure, that of a quantised one with its bits."""
    spec, _ = spec_of(node)
    operator, _ = skeleton(spec)
    return f"{kind(operator.form)} in {operator.bits} bits" if isinstance(operator, Quantised) else node.op_type


def _operator(node: ir.Node, constants: Constants) -> AbstractOperator:
    """What the node holds, its spec compared with its tensors; NotCovered says why there is nothing for the kernels."""
    spec, _ = spec_of(node)
    operator, leaves = skeleton(spec)
    names = list(operator.inputs()) if isinstance(operator, AbstractMap) else ["x"]
    given, factors = node.inputs[: len(names)], node.inputs[len(names) :]
    for name, value in zip(names, given, strict=False):
        boolean = isinstance(operator, AbstractMap) and name in operator.booleans()
        if value is None or value.dtype not in (ir.DataType.BOOL if boolean else ir.DataType.FLOAT, None):
            raise NotCovered(f"its input is {value.dtype if value is not None else 'absent'}; kernels take float32")
    if len(factors) != len(leaves) or any(v is None or not constants.is_const(v) for v in factors):
        raise NotCovered("its weights are not stored in the model")
    tensors = [constants.load(v) for v in factors if v is not None]
    for leaf, tensor in zip(leaves, tensors, strict=True):
        if leaf.shape != tensor.shape or leaf.dtype != tensor.dtype:
            raise NotCovered(f"a weight is {tensor.dtype} {list(tensor.shape)}, its spec says {leaf.dtype} {list(leaf.shape)}")
    made = unflatten(spec, tensors)
    if isinstance(made, AbstractMatrix):
        _check_widths(made, given[0], node.outputs[0])
    if isinstance(made, AbstractMap):
        _check_shapes(made, given, node)
    return made


def _check_shapes(made: AbstractMap, given: Sequence[ir.Value | None], node: ir.Node) -> None:
    wanted = made.inputs()
    if len(given) != len(wanted) or len(node.outputs) != len(made.outputs()):
        raise NotCovered("it has other inputs or outputs than its spec says")
    known: dict[int | str, object] = {}
    for value, (name, dims) in zip(given, wanted.items(), strict=True):
        shape = None if value is None else value.shape
        if shape is None or len(shape) != len(dims) or not all(_agree(d, s, known) for d, s in zip(dims, shape, strict=True)):
            raise NotCovered(f"{name} is {shape}, its spec says {list(dims)}, alike in all inputs")


def _agree(wanted: int | str, found: object, known: dict[int | str, object]) -> bool:
    """A number as the spec has it; of two sizes of one name no number that the other is not: stock operators would broadcast."""
    if isinstance(wanted, int):
        return wanted == found
    before = known.setdefault(wanted, found)
    return before == found or not (isinstance(before, int) or isinstance(found, int))


def _check_widths(matrix: AbstractMatrix, x: ir.Value | None, y: ir.Value) -> None:
    matrix.cost()  # sizes that do not fit together are an assertion there, before anything is allocated
    for value, width in zip((x, y), reversed(matrix.shape), strict=True):
        if value is None or value.shape is None or len(value.shape) == 0 or value.shape[-1] != width:
            raise NotCovered(f"{value.name if value else 'x'} is {value.shape if value else 'absent'}, its spec says {width} features")
