"""The knapsack against every combination, and budgets as users write them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.allocate import FLOOR, GAP, Budget, choose
from rewriter.curves import limits
from rewriter.errors import RewriteError

PARTS = st.integers(0, 64).map(lambda i: i / 64)
CHOICES = st.lists(st.tuples(PARTS, PARTS), min_size=1, max_size=4)


@given(sites=st.lists(CHOICES, min_size=1, max_size=4), budget=st.integers(1, 128).map(lambda i: i / 64))
def test_the_choice_is_the_best_of_all_combinations(sites: list[list[tuple[float, float]]], budget: float) -> None:
    costs, losses = ([[pair[i] for pair in site] for site in sites] for i in (0, 1))
    within = [p for p in itertools.product(*map(enumerate, sites)) if sum(pair[0] for _, pair in p) <= budget]
    picked = choose(costs, losses, budget)
    assert (picked is None) == (not within)
    if picked is not None:
        assert sum(c[k] for c, k in zip(costs, picked, strict=True)) <= budget
        best = min(sum(pair[1] for _, pair in p) for p in within)
        assert sum(x[k] for x, k in zip(losses, picked, strict=True)) <= best * (1 + GAP) + GAP * max(map(max, losses))


def test_what_matters_more_gets_more() -> None:
    curve = [(0.25, 0.5), (0.5, 0.25), (0.75, 0.125)]
    costs = [[c for c, _ in curve]] * 2
    losses = [[e * e for _, e in curve], [100 * e * e for _, e in curve]]
    assert choose(costs, losses, 1.0) == [0, 2]


@pytest.mark.parametrize("text", ["params", "params=", "params=0", "params=1.5", "params=nan", "bits=0.5", "0.5", "ms=-1"])
def test_a_budget_that_is_none(text: str) -> None:
    with pytest.raises(RewriteError, match=r"give one of params, flops, nbytes, ms and a share"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["params=0.5", "flops=0.25", "nbytes=0.4", "ms=1.0"])
def test_a_budget_prints_as_it_was_written(text: str) -> None:
    assert str(Budget.parse(text)) == text


@given(share=st.floats(0.01, 1.0), cap=st.floats(0.01, 1.0))
def test_the_limits_of_a_curve(share: float, cap: float) -> None:
    """From the floor upwards, the even share among them, none above what the pass allows."""
    found = limits(share, cap)
    assert all(FLOOR * share <= x <= cap for x in found) and found == sorted(set(found))
    assert (share in found) == (share <= cap)
