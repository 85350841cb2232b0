"""Chains as long as a hostile file makes them, and values that are reached in more ways than anyone could try."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.passes.detect.axes import Frame, fresh
from rewriter.passes.detect.linear import alike
from rewriter.passes.detect.masks import _normal
from rewriter.passes.detect.recurrence import detect
from rewriter.passes.detect.scores import Mask, Operand, leads_back, leads_on
from rewriter.passes.detect.unrolled import unrolled
from tests.onnx.models import model


def graph(text: str, **weights: object) -> OnnxGraph:
    return OnnxGraph(model(text, weights=weights))


@pytest.mark.parametrize("count", [2_000, 2_001])
def test_a_mask_that_is_negated_often(count: int) -> None:
    names = ["c", *(f"n{i}" for i in range(count))]
    nots = " ".join(f"{b} = Not({a})" for a, b in pairwise(names))
    g = graph(f"g (bool[2,3] c) => (float[2,3] y) {{ {nots} y = Where({names[-1]}, zero, never) }}", zero=0.0, never=-float("inf"))
    y, (c,) = g.model.graph.outputs[0], g.model.graph.inputs
    found = _normal(g, Frame(), Mask(Operand(y, fresh((2, 3)))))
    assert found.at.value is c and found.boolean and found.negated == bool(count % 2)


def layers(count: int, width: int, inputs: int) -> str:
    """Each value of a layer is made of all of the layer before."""
    rows = [[f"v{i}_{k}" for k in range(width)] for i in range(count)]
    steps = pairwise([["x"], *rows])
    return " ".join(f"{value} = Concat<axis=0>({', '.join(before * inputs)})" for before, row in steps for value in row)


def test_a_product_behind_many_ways() -> None:
    """Six steps behind with 2^10 operands each, all of them one value: 2^60 ways."""
    g = graph(f"g (float[2,2] x) => (float[2,2] y) {{ {layers(6, 1, 1024)} y = Softmax(v5_0) }}")
    y = g.model.graph.outputs[0].producer()
    assert y is not None and not leads_back(g, y.inputs[0])


def test_a_product_ahead_of_many_ways() -> None:
    """Five steps ahead with 2^7 readers each: 2^35 ways."""
    g = graph(f"g (float[2,2] x) => (float[2,2] y) {{ {layers(5, 128, 1)} y = Softmax(v4_0) }}")
    assert not leads_on(g, g.model.graph.inputs[0])


@pytest.mark.parametrize(("steps", "back", "on"), [(3, True, True), (4, True, True), (5, True, False), (6, True, False), (7, False, False)])
def test_a_product_is_looked_for_a_few_steps_away(steps: int, back: bool, on: bool) -> None:
    casts = "".join(f" {end}{i + 1} = Identity({end}{i})" for end in "ab" for i in range(steps))
    text = f"a0 = MatMul(x, x){casts} y = MatMul(b{steps}, x)"
    g = graph(f"g (float[2,2] x, float[2,2] b0) => (float[2,2] y, float[2,2] a{steps}) {{ {text} }}")
    assert leads_back(g, g.model.graph.outputs[1]) == back
    assert leads_on(g, g.model.graph.inputs[1]) == on


def test_a_step_whose_state_is_reached_in_many_ways() -> None:
    """s + s, sixty times in a step: 2^60 ways from its result back to its state."""
    body = ""
    for t in range(3):
        doubled = " ".join(f"d{t}_{i + 1} = Add(d{t}_{i}, d{t}_{i})" for i in range(60))
        body += f" x{t} = Gather<axis=1>(x, i{t}) d{t}_0 = Identity(s{t}) {doubled} s{t + 1} = Add(d{t}_60, x{t})"
    g = graph(f"g (float[2,3,4] x, float[2,4] s0) => (float[2,4] s3) {{ {body} }}", i0=0, i1=1, i2=2)
    (loop,) = unrolled(g)
    assert len(loop.carries) == len(loop.xs) == 1


def test_one_slice_of_a_long_axis_is_no_loop() -> None:
    """Every step of a loop has a slice: the steps of so long an axis are not even counted."""
    g = graph(f"g (float[{1 << 40},4] x) => (float[4] y) {{ y = Gather<axis=0>(x, first) }}", first=0)
    assert list(unrolled(g)) == []


@pytest.mark.parametrize(("count", "step"), [(2_000, "Neg({0})"), (60, "Add({0}, {0})")], ids=["long", "wide"])
def test_two_equal_ways_from_one_weight(count: int, step: str) -> None:
    made = " ".join(f"{end}{i + 1} = {step.format(f'{end}{i}')}" for end in "ab" for i in range(count))
    text = f"a0 = Identity(w) b0 = Identity(w) {made} y = MatMul(x, a{count}) z = MatMul(x, b{count})"
    g = graph(f"g (float[2,2] x) => (float[2,2] y, float[2,2] z) {{ {text} }}", w=torch.eye(2))
    y, z = (value.producer() for value in g.model.graph.outputs)
    assert y is not None and z is not None and y.inputs[1] is not None and z.inputs[1] is not None
    assert alike(g, y.inputs[1], z.inputs[1]) and not alike(g, y.inputs[1], g.model.graph.inputs[0])


def test_an_axis_that_was_cut_often() -> None:
    frame, (group,) = Frame(), fresh((1 << 1200,))
    (atom,) = group
    for _ in range(1200):
        (atom, _) = frame.cut(atom, (atom.size // 2, 2))
    assert [a.size for a in frame.resolve(group)] == [1, *[2] * 1200]


def test_an_input_that_is_reached_in_many_ways() -> None:
    """g * g, sixty times, in the step of a gated recurrence."""
    doubled = " ".join(f"g{i + 1} = Mul(g{i}, g{i})" for i in range(60))
    steps = f"{doubled} k = Sigmoid(g60) d = Mul(s, k) s1 = Add(d, u) y = Identity(s1)"
    body = f"(float[2,4] s, float[2,4] g0, float[2,4] u) => (float[2,4] s1, float[2,4] y) {{ {steps} }}"
    text = f"last, ys = Scan <num_scan_inputs = 2, body = step {body}> (s0, g, u)"
    g = graph(f"g (float[2,4] s0, float[5,2,4] g, float[5,2,4] u) => (float[5,2,4] ys) {{ {text} }}")
    (site,) = detect(g)
    assert type(site.form).__name__ == "DiagonalRecurrence"
