"""Lowerings of maps to operators that only some files may use, com.microsoft's or a later opset's, by the map's name.

They must match its oracle in the same contract tests.

com.microsoft.LinearAttention takes one factor a token: n_h factors are n_h sub-steps, the gate at the first, the query at the last
(DeltaProduct as DeltaNet, Siems et al. 2025, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.tape import Tape

from rewriter.backends.onnx import attention
from rewriter.backends.onnx.attention import DOMAIN

NAME, STANDARD = "contrib", "standard"  # of the lowerings
Lower = Callable[[Tape, Any, Sequence[ir.Value]], Sequence[ir.Value]]  # of the inputs, the stored tensors after them


def steady(tape: Tape, x: ir.Value, like: ir.Value, width: int) -> ir.Value:
    """(n,) at every token of `like`, in its type."""
    lead = tape.op("Gather", [tape.op("Shape", [like]), tape.op("Constant", [], {"value_ints": [0, 1]})], {"axis": 0})
    shape = tape.op("Concat", [lead, tape.op("Constant", [], {"value_ints": [width]})], {"axis": 0})
    return tape.op("Expand", [tape.op("CastLike", [x, like]), shape])


def _linear_attention(tape: Tape, operator: Any, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    given = dict(zip(operator.inputs(), inputs, strict=True))
    count = operator.factors

    def ints(*numbers: int) -> ir.Value:
        return tape.op("Constant", [], {"value_ints": list(numbers)})

    def steps(name: str, width: int, front: int = 0, behind: int = 0) -> ir.Value | None:
        """(batch, time, width*n_h) -> (batch, time*n_h, width), zeros where a sub-step has nothing."""
        value = given.get(name)
        if value is None or count == 1:
            return value
        if front or behind:
            value = tape.op("Pad", [value, ints(0, 0, front * width, 0, 0, behind * width)])
        return tape.op("Reshape", [value, ints(0, -1, width)])

    rule = {"plain": ("linear", "gated"), "delta": ("delta", "gated_delta")}[operator.rule][bool(operator.decay)]
    per = operator.heads * (operator.key if operator.decay == "key" else 1)
    query = steps("query", operator.queries * operator.key, front=count - 1)
    key, value = steps("key", operator.keys * operator.key), steps("value", operator.heads * operator.width)
    decay, beta = steps("decay", per, behind=count - 1), steps("beta", operator.heads)
    attributes = {"q_num_heads": operator.queries, "kv_num_heads": operator.heads, "update_rule": rule, "scale": operator.scale}
    out, state = tape.op_multi_out(
        "LinearAttention", [query, key, value, given.get("state"), decay, beta], attributes, domain=DOMAIN, num_outputs=2, version=1
    )
    if count > 1:
        wide = operator.heads * operator.group * operator.width
        rows = tape.op("Reshape", [out, ints(0, -1, count * wide)])
        out = tape.op("Slice", [rows, ints((count - 1) * wide), ints(count * wide), ints(2)])
    return [out, state]


def _retention(tape: Tape, operator: Any, inputs: Sequence[ir.Value]) -> Sequence[ir.Value]:
    *given, rates = inputs
    return _linear_attention(tape, operator.moving(), operator.with_decay(given, steady(tape, rates, given[0], operator.rates.numel())))


CONTRIB: dict[str, Lower] = {"LinearAttention": _linear_attention, "Retention": _retention, "Attention": attention.multi_head}
LATER: dict[str, tuple[int, Lower]] = {"Attention": (23, attention.standard)}  # since which opset


def own_lowerings(kind: str, contrib: bool, opset: int) -> list[str]:
    """The lowerings of a map besides its forms."""
    later = kind in LATER and opset >= LATER[kind][0]
    return [*([STANDARD] if later else []), *([NAME] if contrib and kind in CONTRIB else [])]


def lower(name: str, kind: str) -> Lower | None:
    """The lowering of that name; None for a form."""
    return {NAME: CONTRIB.get(kind), STANDARD: LATER.get(kind, (0, None))[1]}.get(name)


def takes(name: str, operator: Any, dtype: ir.DataType | None) -> bool:
    """Whether the lowering is for values of this type; forms are for all."""
    if name not in (NAME, STANDARD) or dtype == ir.DataType.FLOAT:
        return True
    return name == STANDARD and dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) and attention.halves(operator)
