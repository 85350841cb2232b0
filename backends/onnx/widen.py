"""bfloat16 as float32: ONNX Runtime's CPU has no bfloat16 product, so a model that holds one is widened as a whole.

Widening is exact; the sums are then more precise than the source's, never less. Files for the portable target keep bfloat16.
"""

from __future__ import annotations

import onnx_ir as ir

_NARROW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def needs_widening(model: ir.Model) -> bool:
    """Whether any value or weight is bfloat16."""
    nodes = list(model.graph.all_nodes())
    values = [v for graph in model.graphs() for v in [*graph.inputs, *graph.initializers.values()]]
    return any(v.dtype == _NARROW for v in [*values, *(v for n in nodes for v in n.outputs)]) or any(
        a.type == ir.AttributeType.INT and a.name == "to" and a.as_int() == _NARROW
        for n in nodes
        for a in n.attributes.values()
        if not a.is_ref()
    )


def widen(model: ir.Model) -> None:
    """In place; weights are converted when they are read."""
    graphs = [*model.graphs(), *(f.graph for f in model.functions.values())]
    for graph in graphs:
        for value in [*graph.inputs, *graph.initializers.values()]:
            _value(value)
        for node in graph:
            for value in node.outputs:
                _value(value)
            for attribute in list(node.attributes.values()):
                _attribute(node, attribute)


def _value(value: ir.Value) -> None:
    if value.dtype == _NARROW:
        value.type = ir.TensorType(_WIDE)  # clones share their types: never edit one in place
    if value.const_value is not None and value.const_value.dtype == _NARROW:
        value.const_value = _wide(value.const_value)


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    shape = ir.Shape([int(size) for size in tensor.shape.numpy()])
    return ir.LazyTensor(lambda: ir.Tensor(tensor.numpy().astype("f"), name=tensor.name), dtype=_WIDE, shape=shape, name=tensor.name)


def _attribute(node: ir.Node, attribute: ir.Attr) -> None:
    if attribute.is_ref():
        return
    if (
        attribute.type == ir.AttributeType.INT
        and attribute.name in ("to", "dtype", "output_dtype", "stash_type")
        and attribute.as_int() == _NARROW
    ):
        node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(_WIDE))
    if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _NARROW:
        node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _wide(attribute.as_tensor()))
