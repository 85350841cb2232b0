"""Softmax attention as one operator: the standard one, which there is from opset 23 on, and com.microsoft.MultiHeadAttention.

Both want masks as long as queries and keys; the latter counts a causal mask from the last query, so it is added there. In a row whose every
key is hidden they differ from the softmax and from each other, so such rows are written afterwards where there can be any; and below opset
25 ONNX Runtime takes a row that adds the lowest number everywhere for such a one, so that number is raised: it still leaves nothing of the
score that it is added to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from rewriter.backends.onnx.tensors import from_torch

DOMAIN = "com.microsoft"
LOW = -1e38  # above the lowest float32, and any score is lost beside it


def halves(operator: Any) -> bool:
    """Whether `standard` may be of 16 bits: where nothing is added that LOW would be compared with."""
    return operator.boolean and operator.hidden == -math.inf and not operator.bias if operator.mask else True


def standard(tape: Tape, operator: Any, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    mask = _wide(tape, operator, inputs, _mask(tape, operator, inputs) if halves(operator) else _added(tape, operator, inputs))
    raised = mask if mask is None or halves(operator) else _raised(tape, operator, mask)
    attributes = {"scale": float(operator.scale), "is_causal": int(operator.causal)}
    out = tape.op("Attention", [*inputs[:3], *([] if raised is None else [raised])], attributes)
    return [_empty(tape, out, mask, {"nan": math.nan, "zero": 0.0}.get(operator.empty), halves(operator))]


def multi_head(tape: Tape, operator: Any, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    heads, group = operator.heads, operator.heads // operator.shared

    def rows(x: ir.Value, width: int, shared: bool) -> ir.Value:
        """(batch, heads, time, width) -> (batch, time, heads*width)."""
        if shared and group > 1:
            wide = tape.op("Expand", [tape.op("Unsqueeze", [x, _ints(tape, 2)]), _ints(tape, 1, 1, group, 1, 1)])
            x = tape.op("Reshape", [wide, _ints(tape, 0, heads, -1, width)])
        return tape.op("Reshape", [tape.op("Transpose", [x], {"perm": [0, 2, 1, 3]}), _ints(tape, 0, 0, heads * width)])

    widths = (operator.key, operator.key, operator.width)
    given = [rows(x, width, i > 0) for i, (x, width) in enumerate(zip(inputs, widths, strict=False))]
    added = _wide(tape, operator, inputs, _added(tape, operator, inputs))
    if operator.causal:
        added = _triangle(tape, inputs) if added is None else tape.op("Add", [added, _triangle(tape, inputs)])
    attributes = {"num_heads": heads, "scale": float(operator.scale)}
    masks = [] if added is None else [None, None, added]
    out = tape.op("MultiHeadAttention", [*given, *masks], attributes, domain=DOMAIN, version=1)
    out = tape.op("Transpose", [tape.op("Reshape", [out, _ints(tape, 0, 0, heads, operator.width)])], {"perm": [0, 2, 1, 3]})
    return [_empty(tape, out, added, 0.0 if operator.empty == "zero" else None, False)]  # by itself it gives what the softmax does


def _ints(tape: Tape, *numbers: int) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": list(numbers)})


def _number(tape: Tape, number: float, like: ir.Value) -> ir.Value:
    return tape.op("CastLike", [tape.op("Constant", [], {"value_float": number}), like])


def _mask(tape: Tape, operator: Any, inputs: Sequence[ir.Value]) -> ir.Value | None:
    return inputs[3] if operator.mask else None


def _added(tape: Tape, operator: Any, inputs: Sequence[ir.Value]) -> ir.Value | None:
    """The masks as one that is added."""
    mask = _mask(tape, operator, inputs)
    if mask is not None and operator.boolean:
        mask = tape.op("Where", [mask, _number(tape, 0.0, inputs[0]), _number(tape, operator.hidden, inputs[0])])
    return tape.op("Add", [mask, inputs[4]]) if operator.bias else mask


def _wide(tape: Tape, operator: Any, inputs: Sequence[ir.Value], mask: ir.Value | None) -> ir.Value | None:
    """(.., time, keys), also where it was the same for all of either."""
    dims = [operator.mask, operator.bias or operator.mask]
    if mask is None or all(any(d[axis] != 1 for d in dims) for axis in (2, 3)):
        return mask
    return tape.op("Expand", [mask, _sizes(tape, inputs)])


def _sizes(tape: Tape, inputs: Sequence[ir.Value]) -> ir.Value:
    """[1, 1, time, keys]."""
    time, keys = (tape.op("Shape", [x], {"start": 2, "end": 3}) for x in inputs[:2])
    return tape.op("Concat", [_ints(tape, 1, 1), time, keys], {"axis": 0})


def _triangle(tape: Tape, inputs: Sequence[ir.Value]) -> ir.Value:
    """-inf where the key is behind the query."""
    every = tape.op("ConstantOfShape", [_sizes(tape, inputs)], {"value": from_torch(torch.tensor([-math.inf]), "")})
    return tape.op("Trilu", [every, tape.op("Constant", [], {"value_int": 1})])


def _raised(tape: Tape, operator: Any, added: ir.Value) -> ir.Value:
    high = tape.op("Max", [added, _number(tape, LOW, added)])
    infinite = operator.boolean or operator.bias or operator.empty  # else none of it is
    return tape.op("Where", [tape.op("IsInf", [added]), added, high]) if infinite else high


def _empty(tape: Tape, out: ir.Value, mask: ir.Value | None, number: float | None, boolean: bool) -> ir.Value:
    """The result with a number in the rows that see no key."""
    if number is None or mask is None:
        return out
    if boolean:
        most = tape.op("ReduceMax", [tape.op("Cast", [mask], {"to": int(ir.DataType.INT32)}), _ints(tape, -1)], {"keepdims": 1})
        seen = tape.op("Cast", [most], {"to": int(ir.DataType.BOOL)})
    else:
        most = tape.op("ReduceMax", [mask, _ints(tape, -1)], {"keepdims": 1})
        seen = tape.op("Greater", [most, _number(tape, -math.inf, mask)])
    return tape.op("Where", [seen, out, _number(tape, number, out)])
