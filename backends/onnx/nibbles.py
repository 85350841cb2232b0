"""Weights of 4 bits as ONNX nodes: taken apart and scaled by standard operators, which a runtime that folds constants does once, when it
loads; or multiplied as they are by com.microsoft.MatMulNBits, in 8-bit arithmetic with inputs rounded by row and group.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from rewriter.backends.onnx.attention import DOMAIN
from rewriter.backends.onnx.tensors import from_torch

NBITS = "nbits"  # the lowering to MatMulNBits
GROUPS = (16, 32, 64, 128, 256)  # rows a scale that it takes
INT8_ARITHMETIC = 4  # its accuracy_level


def _ints(tape: Tape, *numbers: int) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": list(numbers)})


def whole(tape: Tape, packed: ir.Value, shape: Sequence[int]) -> ir.Value:
    """uint8 (..., q / 2, p) -> int8 of `shape`, (..., q, p)."""

    def byte(number: int) -> ir.Value:
        return tape.op("Constant", [], {"value": from_torch(torch.tensor([number], dtype=torch.uint8), "")})

    low, high = tape.op("Mod", [packed, byte(16)]), tape.op("BitShift", [packed, byte(4)], {"direction": "RIGHT"})
    both = tape.op("Concat", [tape.op("Unsqueeze", [half, _ints(tape, -2)]) for half in (low, high)], {"axis": -2})
    signed = tape.op("Cast", [tape.op("Reshape", [both, _ints(tape, *shape)])], {"to": ir.DataType.INT32.value})
    eight = tape.op("Constant", [], {"value": from_torch(torch.tensor([8], dtype=torch.int32), "")})
    return tape.op("Cast", [tape.op("Sub", [signed, eight])], {"to": ir.DataType.INT8.value})


def weighted(tape: Tape, values: ir.Value, scales: ir.Value, shape: Sequence[int], groups: int) -> ir.Value:
    """int8 (..., q, p) and scales (..., groups, p) -> floats (..., q, p)."""
    *blocks, q, p = shape
    cut = tape.op("Reshape", [tape.op("CastLike", [values, scales]), _ints(tape, *blocks, groups, q // groups, p)])
    return tape.op("Reshape", [tape.op("Mul", [cut, tape.op("Unsqueeze", [scales, _ints(tape, -2)])]), _ints(tape, *shape)])


def product(tape: Tape, x: ir.Value, packed: ir.Value, scales: ir.Value, shape: Sequence[int], groups: int) -> ir.Value:
    """x (..., q) times a weight (q, p); that operator has outputs first and counts a group's rows as a block."""
    q, p = shape
    turned = [tape.op("Transpose", [value], {"perm": [1, 0]}) for value in (packed, scales)]
    blocks = tape.op("Reshape", [turned[0], _ints(tape, p, groups, q // groups // 2)])
    flat = tape.op("Reshape", [turned[1], _ints(tape, -1)])
    options = {"K": q, "N": p, "bits": 4, "block_size": q // groups, "accuracy_level": INT8_ARITHMETIC}
    return tape.op("MatMulNBits", [x, blocks, flat], options, domain=DOMAIN)
