"""Some values of a graph from others: node by node by onnx.reference, all floats in the float type of what is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.backends.files.archive import one_line
from rewriter.backends.onnx.constants import Constants
from rewriter.backends.onnx.tensors import onnx_dtype, torch_dtype
from rewriter.errors import RewriteError


def compute(wanted: Sequence[ir.Value], given: Mapping[ir.Value, Tensor], constants: Constants) -> list[Tensor]:
    """See rewriter.graph.Graph.compute."""
    dtype = next((t.dtype for t in given.values() if t.is_floating_point()), torch.float32)
    known = dict(given)
    for value in wanted:
        _settle(value, known, dtype, constants)
    return [known[value] for value in wanted]


def _settle(value: ir.Value, known: dict[ir.Value, Tensor], dtype: torch.dtype, constants: Constants) -> None:
    """Depth first without recursion: a chain may be thousands of nodes long."""
    stack = [value]
    while stack:
        value = stack[-1]
        if value in known:
            stack.pop()
            continue
        if constants.is_const(value):
            known[value] = _float(constants.load(value), dtype)
            continue
        node = value.producer()
        if node is None:
            raise RewriteError(f"{value.name} is neither given nor stored")
        missing = [v for v in node.inputs if v is not None and v not in known]
        if missing:
            stack.extend(missing)
            continue
        operands = {v.name or "": known[v] for v in node.inputs if v is not None}
        try:
            results = constants.evaluate(_typed(ir.to_proto(node), dtype), operands)
        except Exception as problem:
            raise RewriteError(f"{node.op_type} {node.name} cannot be computed: {one_line(problem)}") from problem
        known.update(zip((v for v in node.outputs if v.name), (_float(t, dtype) for t in results), strict=True))


def _float(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _typed(node: onnx.NodeProto, dtype: torch.dtype) -> onnx.NodeProto:
    """A cast to a float type goes to the float type at hand."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to":
            wanted = torch_dtype(ir.DataType(attribute.i))
            if wanted is not None and wanted.is_floating_point:
                attribute.i = int(onnx_dtype(dtype))
    return node
