"""Any equation over one stored operand whose letters are features, outputs or batch is a linear, however its axes lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fx.models import Net, graph, normal, obeys_law, sites, splices

BATCH, FEATURES, MADE = "bst", "def", "xyz"
ELLIPSES = ["...i,oi->...o", "oi,...i->...o", "...i,oi->o...", "...i,io"]


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, dict[str, int], bool]:
    """An equation (x, weight -> y), sizes for its letters, and whether the weight stands first."""
    batch, features, made = (draw(st.integers(low, 3 if low else 2)) for low in (0, 1, 1))
    letters = [pool[:count] for pool, count in zip((BATCH, FEATURES, MADE), (batch, features, made), strict=True)]
    rows, joined, new = letters
    ins, own, out = ("".join(draw(st.permutations(a + b))) for a, b in ((rows, joined), (joined, new), (rows, new)))
    first = draw(st.booleans())
    arrow = f"->{out}" if draw(st.booleans()) else ""  # without one, the output is in the order of the alphabet
    sizes = {c: draw(st.integers(2 if c in FEATURES else 1, 5)) for c in "".join(letters)}
    return (f"{own},{ins}" if first else f"{ins},{own}") + arrow, sizes, first


class Many(torch.nn.Module):
    """Several equations on slices of one input: one export for all of them."""

    def __init__(self, given: Sequence[tuple[str, dict[str, int], bool]]) -> None:
        super().__init__()
        self.given = given
        for i, (equation, sizes, first) in enumerate(given):
            own = equation.split("->")[0].split(",")[0 if first else 1]
            self.register_parameter(f"w{i}", torch.nn.Parameter(normal(*(sizes[c] for c in own), seed=i)))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.one(i, x) for i in range(len(self.given))]

    def one(self, i: int, x: Tensor) -> Tensor:
        equation, sizes, first = self.given[i]
        weight: Any = getattr(self, f"w{i}")
        ins = equation.split("->")[0].split(",")[1 if first else 0]
        shape = [sizes[c] for c in ins]
        value = x[: torch.Size(shape).numel()].reshape(shape)
        return torch.einsum(equation, weight, value) if first else torch.einsum(equation, value, weight)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(equations(), min_size=6, max_size=6))
def test_random_equations(given: list[tuple[str, dict[str, int], bool]]) -> None:
    g = graph(Many(given), normal(5**5), dynamic=False)
    feeds = {"x": normal(5**5, seed=7)}
    found = sites(g, "linear")
    assert [s.name for s in found] == [f"w{i}" for i in range(len(given))]
    assert [s.reason for s in found] == [""] * len(given)
    for site in found:
        obeys_law(g, site, feeds)
    splices(g, found, feeds)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2), st.integers(2, 7), st.integers(1, 7), st.sampled_from(ELLIPSES))
def test_ellipsis_at_any_rank(leading: int, n: int, m: int, equation: str) -> None:
    weight = normal(m, n) if "oi" in equation else normal(n, m)
    x = normal(*range(2, 2 + leading), n)
    ordered = (lambda s, x: (s.w, x)) if equation.startswith("oi") else (lambda s, x: (x, s.w))
    g = graph(Net(lambda s, x: torch.einsum(equation, *ordered(s, x)), w=weight), x, dynamic=False)
    (site,) = sites(g)
    assert (site.shape, site.reason) == ((m, n), "")
    obeys_law(g, site, {"x": x})
    splices(g, [site], {"x": x})
