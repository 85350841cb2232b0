"""What a model's results depend on, hashed: its nodes as text, its stored tensors as bytes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from rewriter.cache import fingerprint


def of(model: ir.Model, nodes: Iterable[ir.Node]) -> str:
    """See rewriter.graph.Graph.fingerprint; `nodes`: those of every body."""
    stored = (v.const_value for v in model.graph.initializers.values())
    return fingerprint(map(_spelled, nodes), (_bytes(t) for t in stored if t is not None))


def _spelled(node: ir.Node) -> str:
    """All that a node does; nested bodies are walked by themselves."""
    options = [
        (a.name, _bytes(a.as_tensor())[1].tobytes() if a.type == ir.AttributeType.TENSOR else str(a.value))
        for a in node.attributes.values()
        if a.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    ]
    values = [[v.name if v is not None else None for v in side] for side in (node.inputs, node.outputs)]
    return f"{node.domain} {node.op_type} {values} {options}"


def _bytes(tensor: ir.TensorProtocol) -> tuple[str, memoryview]:
    """Its name and type, and its bytes."""
    held = np.asarray(tensor.numpy())
    if held.dtype.kind == "O":  # text
        held = np.frombuffer(repr(held.tolist()).encode(), np.uint8)
    return f"{tensor.name} {tensor.dtype} {list(held.shape)}", np.ascontiguousarray(held).reshape(-1).view(np.uint8).data
