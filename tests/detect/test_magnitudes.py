"""Bounds that hold and numbers that are numbers; what cannot be bounded is infinite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.passes.detect.magnitudes import bound, fixed, number, operand, sources
from tests.fx.models import BATCH, Net, graph, normal

X = normal(BATCH, 5, 8)
LOWEST = float(torch.finfo(torch.float32).min)
TABLE = torch.linspace(-3.0, 2.0, 16).reshape(8, 2)


def seen(x: Tensor) -> Tensor:
    return x > 0


BOUNDED: dict[str, tuple[Callable[[Any, Tensor], Tensor], float]] = {
    "chosen": (lambda s, x: torch.where(seen(x), 0.0, -7.0), 7.0),
    "filled": (lambda s, x: torch.zeros_like(x).masked_fill(seen(x), -7.0), 7.0),
    "the lowest": (lambda s, x: torch.where(seen(x), 0.0, LOWEST), -LOWEST),
    "subtracted": (lambda s, x: (1.0 - seen(x).float()) * -4.0, 8.0),  # 1 - 1 is not known to be 0
    "divided": (lambda s, x: seen(x).float() / 4, 0.25),
    "squashed": (lambda s, x: x.tanh() * 2, 2.0),
    "laid out": (lambda s, x: torch.full((5, 8), 3.0)[None, :, :, None].expand(2, -1, -1, 2).transpose(1, 2).flatten(1), 3.0),
    "looked up": (lambda s, x: torch.nn.functional.embedding((x[:, :, 0] > 0).long(), s.table), 3.0),
    "side by side": (lambda s, x: torch.cat([x.sigmoid(), torch.full_like(x, -2.0)], 1), 2.0),
}
UNBOUNDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "given": lambda s, x: x * 1.0,
    "infinite": lambda s, x: torch.where(seen(x), 0.0, -math.inf),
    "overflown": lambda s, x: torch.where(seen(x), 0.0, LOWEST) + torch.where(seen(x), LOWEST, 0.0),
    "overflown, then small": lambda s, x: (torch.where(seen(x), 0.0, LOWEST) * 2.0) * 1e-30,
    "exponential": lambda s, x: seen(x).float().exp() * 1.0,
    "of an integer": lambda s, x: (x * 100).long().float() * 1.0,
    "divided by what varies": lambda s, x: seen(x).float() / x,
}


def result(function: Callable[[Any, Tensor], Tensor]) -> tuple[Any, Any]:
    g = graph(Net(function, table=TABLE), X)
    return g, next(n for n in g.nodes() if g.op(n) == "output").args[0][0]


@pytest.mark.parametrize("name", BOUNDED)
def test_bounds(name: str) -> None:
    function, most = BOUNDED[name]
    g, value = result(function)
    assert bound(g, value) == pytest.approx(most)
    assert float(function(Net(function, table=TABLE), X).abs().max()) <= most


@pytest.mark.parametrize("name", UNBOUNDED)
def test_no_bounds(name: str) -> None:
    assert bound(*result(UNBOUNDED[name])) == math.inf


def test_numbers() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = x * 0.5 / torch.sqrt(torch.tensor(4.0)) / torch.full([], 8.0)
        return y / (x.shape[0] * torch.ones([])) * torch.where(seen(x), 1.0, 2.0)

    g, _ = result(forward)
    found = [(g.op(n), operand(g, n, 1)) for n in g.nodes() if g.op(n) in ("mul", "div")]
    assert [value for op, value in found if op == "div"][:2] == [2.0, 8.0]
    assert ("mul", 0.5) in found
    varying = [value for _, value in found if value is None]
    assert len(varying) >= 2  # a size that varies, and what depends on the input
    where = next(n for n in g.nodes() if g.op(n) == "where")
    assert (operand(g, where, 0), operand(g, where, 1), operand(g, where, 2)) == (None, 1.0, 2.0)


def test_a_value_of_sizes_alone_is_seen_at_several() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[0])
        return x[0, 0, :1] + (place[:, None] >= place).float()

    g, _ = result(forward)
    triangle = next(n for n in g.nodes() if g.op(n) == "cast")
    assert {tuple(t.shape) for t in fixed(g, triangle)} == {(2, 2), (3, 3), (5, 5)}
    assert number(g, triangle) is None
    assert sources(g, triangle, ()) is not None
    assert fixed(g, next(n for n in g.nodes() if g.op(n) == "add")) == []
