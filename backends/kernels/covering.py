"""A model's opaque nodes as Chain nodes of the kernels, bias and activation with them, in place; what is not covered stays as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common as passes
from torch import Tensor

from rewriter.backends.files.archive import one_line
from rewriter.backends.kernels.following import Following, following
from rewriter.backends.kernels.pack import Layout, pack
from rewriter.backends.kernels.plan import NotCovered, for_session
from rewriter.backends.onnx.constants import Constants
from rewriter.backends.onnx.edit import Names, store
from rewriter.backends.onnx.opaque import SITE, is_opaque, kind, spec_of
from rewriter.cache import digest
from rewriter.errors import RewriteError
from rewriter.operator import AbstractMatrix, skeleton, unflatten

DOMAIN, OP = "structured.kernels", "Chain"


@dataclass(frozen=True)
class Covered:
    """What became of one opaque node."""

    site: str
    kind: str
    reason: str  # why the kernels leave it; empty where they take it
    fused: tuple[str, ...] = ()  # what went with it, see Following.said


def cover(model: ir.Model, layout: Layout, threads: int) -> list[Covered]:
    """Every opaque node, in order."""
    if any(node.domain == DOMAIN for node in [*model.graph.all_nodes(), *(n for f in model.functions.values() for n in f.all_nodes())]):
        raise RewriteError(f"the model holds {DOMAIN} nodes of its own; those are made in memory alone, for one machine: no file has any")
    under_way = _Cover(model, layout, threads)
    found = [under_way.node(node) for node in list(model.graph.all_nodes()) if is_opaque(node)]
    if any(not c.reason for c in found):
        model.graph.opset_imports[DOMAIN] = 1
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    return found


class _Cover:
    """One model under way; equal layers share their packed weights."""

    def __init__(self, model: ir.Model, layout: Layout, threads: int) -> None:
        self.model, self.layout, self.threads = model, layout, threads
        self.names, self.constants = Names(model), Constants(model.graph.opset_imports.get("", 20))
        self.stored: dict[str, ir.Value] = {}  # packed weights by their hash

    def node(self, node: ir.Node) -> Covered:
        site = node.metadata_props.get(SITE, node.name or "")
        try:
            operator = _operator(node, self.constants)
            found = following(node.outputs[0], operator.shape[0], self.constants)
            packed = pack(for_session(operator, found.ending), self.layout)
            said = named(node)
        except NotCovered as left:
            return Covered(site, node.op_type, str(left))
        except Exception as problem:  # whatever a file may say of itself, stock operators run what it holds
            return Covered(site, node.op_type, f"what it says of itself cannot be read: {one_line(problem)}")
        self._replace(node, found, packed)
        self.constants.forget()
        return Covered(site, said, "", found.said)

    def _replace(self, node: ir.Node, found: Following, packed: Tensor) -> None:
        """One Chain from the node's x to what follows it; what lay between is unused then and goes."""
        end, key = found.end, digest(packed.numpy().tobytes())
        if key not in self.stored:
            self.stored[key] = store(self.model, self.names, packed, f"{node.metadata_props.get(SITE, OP)}.packed")
        chain = chain_node([node.inputs[0], self.stored[key], *found.skip], packed, self.threads)
        chain.name = self.names.unused(f"{OP}_{node.name or 'site'}")
        made = chain.outputs[0]
        made.shape, made.type = end.shape, end.type or ir.TensorType(ir.DataType.FLOAT)
        producer = end.producer()
        assert producer is not None and producer.graph is not None
        producer.graph.insert_after(producer, chain)
        known = end.name
        end.replace_all_uses_with(made, replace_graph_outputs=True)
        end.name, made.name = self.names.unused(f"{known}.before"), known


def chain_node(inputs: Sequence[ir.Value | None], packed: Tensor, threads: int) -> ir.Node:
    """Chain(x, packed[, what is added])."""
    options = [ir.AttrInt64("threads", threads), ir.AttrInt64("bytes", packed.numel())]
    return ir.Node(DOMAIN, OP, inputs, options, version=1)


def named(node: ir.Node) -> str:
    """The structure, that of a quantised one with its bits."""
    spec, _ = spec_of(node)
    fields = json.loads(spec)["fields"]
    return f"{kind(fields['form'])} in 8 bits" if node.op_type == "Quantised" else node.op_type


def _operator(node: ir.Node, constants: Constants) -> AbstractMatrix:
    """The matrix that the node holds, its spec compared with its tensors; NotCovered says why there is none for the kernels."""
    spec, _ = spec_of(node)
    operator, leaves = skeleton(spec)
    if not isinstance(operator, AbstractMatrix):
        raise NotCovered("maps of sequences have no kernel")
    x, *factors = node.inputs
    if x is None or x.dtype not in (ir.DataType.FLOAT, None):
        raise NotCovered(f"its input is {x.dtype if x is not None else 'absent'}; kernels take float32")
    if len(factors) != len(leaves) or any(v is None or not constants.is_const(v) for v in factors):
        raise NotCovered("its weights are not stored in the model")
    tensors = [constants.load(v) for v in factors if v is not None]
    for leaf, tensor in zip(leaves, tensors, strict=True):
        if leaf.shape != tensor.shape or leaf.dtype != tensor.dtype:
            raise NotCovered(f"a weight is {tensor.dtype} {list(tensor.shape)}, its spec says {leaf.dtype} {list(leaf.shape)}")
    made = unflatten(spec, tensors)
    assert isinstance(made, AbstractMatrix)
    made.cost()  # sizes that do not fit together are an assertion there, before anything is allocated
    for value, width in zip((x, node.outputs[0]), reversed(made.shape), strict=True):
        if value.shape is None or len(value.shape) == 0 or value.shape[-1] != width:
            raise NotCovered(f"{value.name} is {value.shape}, its spec says {width} features")
    return made
