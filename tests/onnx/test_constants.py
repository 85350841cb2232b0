"""Constants behind long chains and behind many ways: each value is looked at and computed once, without recursion."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from rewriter.backends.onnx.constants import SMALL, Constants
from tests.onnx.models import model

LONG = 5_000
WAYS = 60  # each step is taken twice: 2^60 of them


class Counted(Constants):
    """Counts the nodes that it evaluates, and how many results are alive at most."""

    def __init__(self) -> None:
        super().__init__(18)
        self.evaluated, self.alive = 0, 0
        self._results: list[weakref.ref[Tensor]] = []

    def evaluate(self, node: onnx.NodeProto, operands: Mapping[str, Tensor]) -> list[Tensor]:
        found = super().evaluate(node, operands)
        self._results = [r for r in self._results if r() is not None] + [weakref.ref(tensor) for tensor in found]
        self.evaluated, self.alive = self.evaluated + 1, max(self.alive, len(self._results))
        return found


def chain(op: str, operands: int, count: int, size: int = 1) -> tuple[ir.Value, ir.Value]:
    """Stored ones and what `count` operations make of them, which an Add to the model's input reads."""
    first = ir.Value(name="w", const_value=ir.tensor(np.ones(size, "f"), name="w"))
    x, value, nodes = ir.Value(name="x"), first, list[ir.Node]()
    for i in range(count):
        nodes.append(ir.Node("", op, [value] * operands, name=f"n{i}"))
        value = nodes[-1].outputs[0]
        value.name = f"v{i}"
    nodes.append(ir.Node("", "Add", [x, value], name="reader"))
    ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=[first], opset_imports={"": 18})
    return first, value


@pytest.mark.parametrize(("operands", "count"), [(1, LONG), (2, WAYS)], ids=["long", "many ways"])
def test_the_parameter_behind_a_chain(operands: int, count: int) -> None:
    first, last = chain("Sum", operands, count)
    constants = Constants(18)
    assert constants.is_const(last)
    assert constants.root(last) is first
    assert [(node.name, value) for node, value in constants.users(first)] == [("reader", last)]


@pytest.mark.parametrize(("op", "operands", "count", "result"), [("Neg", 1, 1_200, 1.0), ("Add", 2, WAYS, 2.0**WAYS)])
def test_a_chain_is_computed_link_by_link(op: str, operands: int, count: int, result: float) -> None:
    constants = Counted()
    assert bool((constants.load(chain(op, operands, count, size=SMALL + 1)[1]) == result).all())
    assert (constants.evaluated, constants.alive) == (count, 2)


def test_a_small_constant_is_computed_once_until_an_edit() -> None:
    constants, last = Counted(), chain("Neg", 1, 4)[1]
    middle = last.producer().inputs[0]  # type: ignore[union-attr]
    assert middle is not None
    assert [float(constants.load(v)) for v in (last, middle, last)] == [1.0, -1.0, 1.0] and constants.evaluated == 4
    constants.forget()
    assert float(constants.load(middle)) == -1.0 and constants.evaluated == 7


def test_a_node_of_several_results_is_computed_once() -> None:
    text = "g (float[4] x) => (float[4] y) { a, b = Split<axis=0>(w, sizes) c = Concat<axis=0>(b, a, b) y = Add(x, c) }"
    found = model(text, weights={"w": np.arange(4.0), "sizes": np.array([3, 1])})
    constants = Counted()
    assert torch.equal(constants.load(found.graph.node(1).outputs[0]), torch.tensor([3.0, 0, 1, 2, 3]).double())
    assert constants.evaluated == 2
