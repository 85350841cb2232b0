"""The word `scatter` as ONNX nodes: packed positions taken apart by shifts, kept values put at them, zeros elsewhere.

All of it hangs on initializers, so the file holds the few values and a runtime that folds constants makes them dense once, as it loads.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from rewriter.backends.onnx.tensors import from_torch
from rewriter.packing import bits

Shaped = tuple[ir.Value, tuple[int | None, ...]]


def scattered(tape: Tape, values: Shaped, positions: Shaped, n: int, m: int) -> tuple[ir.Value, tuple[int, int]]:
    """The dense constant and its shape."""

    def ints(*numbers: int) -> ir.Value:
        return tape.op("Constant", [], {"value_ints": list(numbers)})

    (held, (rows, columns)), (packed, (_, owners)), width = values, positions, bits(m)
    assert rows is not None and columns is not None and owners is not None
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
    at = tape.op("Unsqueeze", [packed, ints(1)])
    if width < 8:
        at = tape.op("BitShift", [at, tape.op("Constant", [], {"value": from_torch(shifts, "")})], {"direction": "RIGHT"})
        low = torch.full((1,), 2**width, dtype=torch.uint8)
        at = tape.op("Mod", [at, tape.op("Constant", [], {"value": from_torch(low, "")})])  # the low bits
    at = tape.op("Cast", [tape.op("Reshape", [at, ints(-1, owners)])], {"to": ir.DataType.INT64.value})
    at = tape.op("Slice", [at, ints(0), ints(rows), ints(0)])  # the last byte may not be full
    if owners < columns:
        at = tape.op("Expand", [tape.op("Unsqueeze", [at, ints(2)]), ints(1, 1, columns // owners)])
    at, updates = (tape.op("Reshape", [v, ints(-1, n, columns)]) for v in (at, held))
    zeros = tape.op("CastLike", [tape.op("ConstantOfShape", [ints(rows // n, m, columns)]), held])
    spread = tape.op("ScatterElements", [zeros, at, updates], {"axis": 1})
    return tape.op("Reshape", [spread, ints(-1, columns)]), (rows // n * m, columns)
