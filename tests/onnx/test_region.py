"""What a step computes elementwise is computed for all steps at once, in its order, however long the chain is."""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir
from onnx_ir.tape import Tape

from rewriter.backends.onnx.region import stand_in
from rewriter.graph import Port, Region
from rewriter.operator import flatten
from rewriter.passes.structures.attention import Attention
from tests.onnx.models import model


def hoisted(body: str, value: str) -> list[ir.Node]:
    """The nodes that stand in for a region whose only input is `value`, a step's, of the sequence x whose slice is t."""
    found = model(f"g (float[B,S,4] x, float[B,4] t) => (float[B,4] y) {{ {body} }}", weights={"w": (4,)})
    values = {v.name: v for node in found.graph for v in node.outputs}
    x, t = found.graph.inputs
    ports = (Port(values[value], hoist={t: x}),)
    tape = Tape()
    spec = flatten(Attention(1, 1, 4, 4, 1.0, False))[1]
    stand_in(tape, Region((found.graph.node(0),), ports, ()), lambda v: v, [], spec, "site")
    return list(tape.nodes)


def test_every_value_once_operands_first() -> None:
    made = hoisted("a = Exp(t) b = Neg(t) c = Mul(b, a) d = Add(c, w) e = Sub(d, b) y = Tanh(e)", "e")
    assert [node.op_type for node in made] == ["Neg", "Exp", "Mul", "Add", "Sub", "Attention"]
    neg, exp, mul, add, sub, last = made
    assert [v.name for v in (neg.inputs[0], exp.inputs[0], add.inputs[1]) if v is not None] == ["x", "x", "w"]
    assert [*mul.inputs] == [neg.outputs[0], exp.outputs[0]] and [*sub.inputs] == [add.outputs[0], neg.outputs[0]]
    assert last.inputs[0] is sub.outputs[0]


def test_a_long_chain() -> None:
    names = ["t", *(f"v{i}" for i in range(5_000))]
    body = " ".join(f"{b} = Neg({a})" for a, b in pairwise(names))
    made = hoisted(f"{body} y = Tanh({names[-1]})", names[-1])
    assert [node.op_type for node in made] == ["Neg"] * 5_000 + ["Attention"]
