"""Lowerings of maps to com.microsoft operators, by the operator's name; they must match its oracle in the same contract tests.

com.microsoft.LinearAttention takes one factor a token: n_h factors are n_h sub-steps, the gate at the first, the query at the last
(DeltaProduct as DeltaNet, Siems et al. 2025, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.tape import Tape

DOMAIN = "com.microsoft"
NAME = "contrib"  # of the lowering
Lower = Callable[[Tape, Any, Sequence[ir.Value]], Sequence[ir.Value]]
DTYPES = (ir.DataType.FLOAT,)  # that the CPU kernels have


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


CONTRIB: dict[str, Lower] = {"LinearAttention": _linear_attention}
