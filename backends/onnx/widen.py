"""bfloat16 as float32: ONNX Runtime's CPU has no bfloat16 product, so a model that holds one is widened as a whole.

Widening is exact; the sums are then more precise than the source's, never less. Files for the portable target keep bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

_WIDE = ir.DataType.FLOAT
BFLOAT16 = (ir.DataType.BFLOAT16,)
HALVES = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
_NAMING_A_TYPE = ("to", "dtype", "output_dtype", "stash_type")  # attributes


def needs_widening(model: ir.Model) -> bool:
    """Whether any value or weight is bfloat16."""
    values = [v for graph in model.graphs() for v in [*graph.inputs, *graph.initializers.values()]]
    made = [v for node in model.graph.all_nodes() for v in node.outputs]
    casts = [a for node in model.graph.all_nodes() for a in node.attributes.values()]
    return any(v.dtype in BFLOAT16 for v in [*values, *made]) or any(_names(a, BFLOAT16) for a in casts)


def widen(model: ir.Model, narrow: Sequence[ir.DataType] = BFLOAT16) -> None:
    """In place; weights are converted when they are read."""
    for graph in [*model.graphs(), *(f.graph for f in model.functions.values())]:
        for value in [*graph.inputs, *graph.initializers.values()]:
            _value(value, narrow)
        for node in graph:
            for value in node.outputs:
                _value(value, narrow)
            for attribute in list(node.attributes.values()):
                _attribute(node, attribute, narrow)


def _value(value: ir.Value, narrow: Sequence[ir.DataType]) -> None:
    if value.dtype in narrow:
        value.type = ir.TensorType(_WIDE)  # clones share their types: never edit one in place
    if value.const_value is not None and value.const_value.dtype in narrow:
        value.const_value = _wide(value.const_value)


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    shape = ir.Shape([int(size) for size in tensor.shape.numpy()])
    return ir.LazyTensor(lambda: ir.Tensor(tensor.numpy().astype("f"), name=tensor.name), dtype=_WIDE, shape=shape, name=tensor.name)


def _names(attribute: ir.Attr, narrow: Sequence[ir.DataType]) -> bool:
    if attribute.is_ref() or attribute.type != ir.AttributeType.INT or attribute.name not in _NAMING_A_TYPE:
        return False
    return attribute.as_int() in [int(dtype) for dtype in narrow]


def _attribute(node: ir.Node, attribute: ir.Attr, narrow: Sequence[ir.DataType]) -> None:
    if _names(attribute, narrow):
        node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(_WIDE))
    if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref() and attribute.as_tensor().dtype in narrow:
        node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _wide(attribute.as_tensor()))
