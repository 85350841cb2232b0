"""Shapes of every value: onnx's own inference, then ONNX Runtime's symbolic one for what com.microsoft operators hide.

Weights stay out of both, so that the size of a model does not matter.
"""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnx_ir.passes.common._c_api_utils import call_onnx_api


def infer(model: ir.Model) -> None:
    """In place. What neither can say stays unknown; known shapes are only ever added to."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # an inference that gives up is no news: sites say so themselves
    try:
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
        if any(node.domain == "com.microsoft" for node in model.graph) and any(
            v.shape is None for node in model.graph for v in node.outputs
        ):
            _fill(model, call_onnx_api(_symbolic, model))
    finally:
        logging.disable(level)


def _fill(model: ir.Model, found: onnx.ModelProto) -> None:
    infos = {info.name: info for info in [*found.graph.output, *found.graph.value_info]}
    for node in model.graph:
        for value in node.outputs:
            info = infos.get(value.name or "")
            if info is None or not info.type.tensor_type.elem_type:
                continue
            if value.shape is None and info.type.tensor_type.shape.dim:  # it writes what it does not know as a scalar
                value.shape = ir.serde.deserialize_type_proto_for_shape(info.type)
            if value.type is None:
                value.type = ir.TensorType(ir.DataType(info.type.tensor_type.elem_type))


def _symbolic(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Step by step: the one-call form leaves a file in the working folder when some operator stays unknown."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    inference = SymbolicShapeInference(int_max=2**31 - 1, auto_merge=True, guess_output_rank=False, verbose=0)
    result = onnx.ModelProto()
    try:
        inference._preprocess(proto)
        while inference.run_:
            inference._infer_impl()
        result.CopyFrom(inference.out_mp_)
    except Exception:  # it asserts and raises plain Exceptions on what it does not know
        return onnx.ModelProto()
    return result
