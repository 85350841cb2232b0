"""Constants of an ONNX graph: initialisers, Constant nodes, and every pure standard operation on constants alone.

So a transposed, sliced, rescaled or dequantised weight looks like the stored one that it comes from. Evaluated by onnx.reference, lazily.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from rewriter.backends.onnx.names import OUTPUT
from rewriter.backends.onnx.tensors import array_to_torch, to_torch
from rewriter.order import in_order

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
_IMPURE = {*_RANDOM, "If", "Loop", "Scan", "SequenceMap"}
COMPLETE_OPSET = 21
SMALL = 8  # entries: indices, sizes and scales, which are asked for again and again


class Constants:
    """Answers which values are constant, and loads them one at a time."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self._known: dict[ir.Value, bool] = {}
        self._small: dict[ir.Value, Tensor] = {}  # what was computed

    def forget(self) -> None:
        """After an edit."""
        self._known.clear()
        self._small.clear()

    def is_const(self, value: ir.Value) -> bool:
        for v in in_order(value, operands, self._known):
            self._known[v] = self._is_const(v)
        return self._known[value]

    def _is_const(self, value: ir.Value) -> bool:
        """Of its operands this is known."""
        if value.is_initializer():
            return value.const_value is not None and not value.is_graph_input()  # else a default, which a run may override
        node = value.producer()
        if node is None or not _pure(node):
            return False
        if node.op_type == "Constant":
            return True
        above = operands(value)
        return bool(above) and all(self._known[v] for v in above)

    def load(self, value: ir.Value) -> Tensor:
        """The tensor of a constant value: what leads to it is computed once and held until its last reader has it, or kept if small."""
        order = in_order(value, operands, self._small)
        last = {v: i for i, reader in enumerate(order) for v in operands(reader)} | {value: len(order)}
        held = dict[ir.Value, Tensor]()
        known = ChainMap(held, self._small)
        for i, made in enumerate(order):
            if made not in held:
                held |= {v: tensor for v, tensor in self._made(made, known).items() if v in last}
            for v in operands(made):
                if last[v] == i:
                    held.pop(v, None)
        return known[value]

    def _made(self, value: ir.Value, known: Mapping[ir.Value, Tensor]) -> dict[ir.Value, Tensor]:
        """The value, with the other results of its node."""
        if value.is_initializer():
            assert value.const_value is not None
            return {value: to_torch(value.const_value)}
        node = value.producer()
        assert node is not None
        if node.op_type == "Constant" and "value" in node.attributes:
            return {value: to_torch(node.attributes["value"].as_tensor())}
        results = self.evaluate(ir.to_proto(node), {v.name or "": known[v] for v in operands(value)})
        found = dict(zip((v for v in node.outputs if v.name), results, strict=True))
        self._small.update({v: tensor for v, tensor in found.items() if tensor.numel() <= SMALL})
        return found

    def evaluate(self, node: onnx.NodeProto, operands: Mapping[str, Tensor]) -> list[Tensor]:
        """One node on tensors, by onnx.reference: in whatever float type they have."""
        infos = [onnx.ValueInfoProto(name=name) for name in operands]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        graph = onnx.helper.make_graph([node], "constant", infos, outputs)
        found = self._evaluator(graph).run(None, {name: _array(tensor) for name, tensor in operands.items()})
        assert isinstance(found, list)
        return [array_to_torch(array) for array in found]

    def _evaluator(self, graph: onnx.GraphProto) -> ReferenceEvaluator:
        try:
            return ReferenceEvaluator(_model(graph, self.opset))
        except RuntimeError:  # the reference leaves out some older versions of operators whose newer ones mean the same
            return ReferenceEvaluator(_model(graph, max(self.opset, COMPLETE_OPSET)))

    def root(self, value: ir.Value) -> ir.Value:
        """The stored parameter behind a constant value: the largest one where several go in."""
        roots = [v for v in in_order(value, operands) if (node := v.producer()) is None or node.op_type == "Constant"]
        return max(roots, key=_numel) if roots else value

    def users(self, root: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
        """(node, operand) wherever the stored parameter ends up in an operation that is not constant itself."""
        stack, seen = [use for value in reversed(_tied(root)) for use in reversed(_uses(value))], set[ir.Node]()
        while stack:
            node, operand = stack.pop()
            made = [v for v in node.outputs if self.is_const(v)]
            if not made:
                yield node, operand
            elif node not in seen:
                seen.add(node)
                stack += [use for value in reversed(made) for use in reversed(_uses(value))]


def operands(value: ir.Value) -> list[ir.Value]:
    """What a value is computed from."""
    node = value.producer()
    return [] if node is None else [v for v in node.inputs if v is not None]


def _uses(value: ir.Value) -> list[tuple[ir.Node, ir.Value]]:
    leaves = [OUTPUT] if value.is_graph_output() else []
    return [(node, value) for node in [*leaves, *dict.fromkeys(node for node, _ in value.uses())]]


def _model(graph: onnx.GraphProto, opset: int) -> onnx.ModelProto:
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


def _pure(node: ir.Node) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type not in _IMPURE


def _array(tensor: Tensor) -> Any:
    """As numpy has it; bfloat16 and the like through ml_dtypes."""
    from onnx_ir.tensor_adapters import TorchTensor

    return TorchTensor(tensor).numpy()


def _numel(value: ir.Value) -> int:
    return value.const_value.size if value.const_value is not None else 0


def _tied(root: ir.Value) -> list[ir.Value]:
    """Every initialiser that holds the same stored bytes."""
    graph = root.graph
    if not root.is_initializer() or graph is None:
        return [root]
    return [v for v in graph.initializers.values() if v is root or _same(v.const_value, root.const_value)]


def _same(a: ir.TensorProtocol | None, b: ir.TensorProtocol | None) -> bool:
    if isinstance(a, ir.ExternalTensor) and isinstance(b, ir.ExternalTensor):
        return (a.path, a.offset, a.length) == (b.path, b.offset, b.length)
    return a is b
