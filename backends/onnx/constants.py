"""Constants of an ONNX graph: initialisers, Constant nodes, and every pure standard operation on constants alone.

So a transposed, sliced, rescaled or dequantised weight looks like the stored one that it comes from. Evaluated by onnx.reference, lazily.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from rewriter.backends.onnx.names import OUTPUT
from rewriter.backends.onnx.tensors import array_to_torch, to_torch

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
_IMPURE = {*_RANDOM, "If", "Loop", "Scan", "SequenceMap"}
COMPLETE_OPSET = 21


class Constants:
    """Answers which values are constant, and loads them one at a time."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self._known: dict[ir.Value, bool] = {}

    def forget(self) -> None:
        """After an edit."""
        self._known.clear()

    def is_const(self, value: ir.Value) -> bool:
        if value not in self._known:
            self._known[value] = self._is_const(value)
        return self._known[value]

    def _is_const(self, value: ir.Value) -> bool:
        if value.is_initializer():
            return value.const_value is not None
        node = value.producer()
        if node is None or not _pure(node):
            return False
        if node.op_type == "Constant":
            return True
        operands = [v for v in node.inputs if v is not None]
        return bool(operands) and all(self.is_const(v) for v in operands)

    def load(self, value: ir.Value) -> Tensor:
        """The tensor of a constant value."""
        if value.is_initializer():
            assert value.const_value is not None
            return to_torch(value.const_value)
        node = value.producer()
        assert node is not None
        if node.op_type == "Constant" and "value" in node.attributes:
            return to_torch(node.attributes["value"].as_tensor())
        return self._evaluate(node)[node.outputs.index(value)]

    def _evaluate(self, node: ir.Node) -> list[Tensor]:
        return self.evaluate(ir.to_proto(node), {v.name or "": self.load(v) for v in node.inputs if v is not None})

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
        roots = list(self._roots(value))
        return max(roots, key=_numel) if roots else value

    def _roots(self, value: ir.Value) -> Iterator[ir.Value]:
        node = value.producer()
        if node is None or node.op_type == "Constant":
            yield value
            return
        for operand in node.inputs:
            if operand is not None:
                yield from self._roots(operand)

    def users(self, root: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
        """(node, operand) wherever the stored parameter ends up in an operation that is not constant itself."""
        for value in _tied(root):
            yield from self._users(value)

    def _users(self, value: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
        if value.is_graph_output():
            yield OUTPUT, value
        for node in dict.fromkeys(node for node, _ in value.uses()):
            inner = [v for v in node.outputs if self.is_const(v)]
            for output in inner:
                yield from self._users(output)
            if not inner:
                yield node, value


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
