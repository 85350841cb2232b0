"""Small ONNX models in the parser's text, with seeded weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import torch

from rewriter.tolerances import EQUAL


def model(text: str, opset: int = 18, weights: Mapping[str, Any] | None = None) -> ir.Model:
    """`text` is a graph; weights are shapes (seeded normals) or arrays."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1, "local" : 1]>\n{text}')
    rng = np.random.default_rng(0)
    for name, given in (weights or {}).items():
        array = rng.standard_normal(given).astype("f") if isinstance(given, tuple) else np.asarray(given)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within the dtype's row of the table; values of order one."""
    rtol, atol = EQUAL[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


MLP = """
g (float[B,S,6] x) => (float[B,S,5] y) {
  t = MatMul(x, w1)
  h = Add(t, b1)
  r = Relu(h)
  u = MatMul(r, w2)
  y = Add(b2, u)
}"""
MLP_WEIGHTS = {"w1": (6, 8), "b1": (8,), "w2": (8, 5), "b2": (5,)}
