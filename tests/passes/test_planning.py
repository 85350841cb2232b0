"""Every form of a product or a sum is the same matrix, whatever it is made of."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.algebra import BlockDiagonal, Compose, Dense, Diagonal, Permutation, Sum
from rewriter.operator import AbstractMatrix
from rewriter.passes.planning.choice import dispatch, fastest
from rewriter.passes.planning.forms import MOST, form, groupings, products, sums
from rewriter.passes.structures.block_dense import BlockDense
from rewriter.passes.structures.low_rank import LowRank
from rewriter.tolerances import EQUAL
from tests.engine.nets import normal

few = settings(max_examples=40, deadline=None, derandomize=True)


def same(found: AbstractMatrix, expected: torch.Tensor) -> None:
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(found.dense(), expected.float(), rtol=rtol, atol=atol * float(expected.abs().max()))


def factor(kind: str, n: int, m: int, seed: int) -> AbstractMatrix:
    """n -> m, but for kinds that keep the width."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "low rank":
        return LowRank(normal(n, 2, seed=seed), normal(2, m, seed=seed + 1))
    if kind == "block dense":
        return BlockDense(normal(2, -(-n // 2), 3, seed=seed), normal(6, m, seed=seed + 1), n)
    if kind == "blocks":
        return BlockDiagonal(normal(1, n, m, seed=seed))
    if kind == "permutation":
        return Permutation(torch.randperm(n, generator=rng), n)
    return Diagonal(normal(n, seed=seed)) if kind == "diagonal" else Dense(normal(n, m, seed=seed))


kinds = st.sampled_from(["dense", "low rank", "block dense", "blocks", "permutation", "diagonal"])


@few
@given(st.lists(st.tuples(kinds, st.integers(1, 9)), min_size=1, max_size=4), st.integers(1, 9), st.integers(0, 99))
def test_every_form_of_a_product_is_the_same_matrix(chain: list[tuple[str, int]], inputs: int, seed: int) -> None:
    factors: list[AbstractMatrix] = []
    for i, (kind, m) in enumerate(chain):
        factors.append(factor(kind, factors[-1].shape[0] if factors else inputs, m, seed + i))
    whole = Compose(tuple(factors))
    if all(isinstance(f, Permutation) for f in factors):
        assert products(whole) == [whole]
        return
    expected = whole.to(torch.float64).dense()
    found = products(whole)
    assert found[0] is whole and len(found) <= MOST
    for made in found:
        same(made, expected)


@few
@given(st.lists(kinds.filter(lambda kind: kind not in ("permutation", "diagonal")), min_size=2, max_size=4), st.integers(0, 99))
def test_every_form_of_a_sum_is_the_same_matrix(terms: list[str], seed: int) -> None:
    made = [factor(kind, 6, 5, seed + i) for i, kind in enumerate(terms)]
    expected = Sum(tuple(made)).to(torch.float64).dense()
    found = sums(made)
    assert len(found) == 2 + (terms.count("low rank") > 1)
    for each in found:
        same(each, expected)


def test_groupings_are_all_of_them_as_it_stands_first() -> None:
    assert groupings(3) == [(1, 2), (1,), (2,), ()]
    assert len(groupings(5)) == 2**4


@pytest.mark.parametrize("cuts", groupings(3))
def test_a_grouping_has_a_factor_for_each_run(cuts: tuple[int, ...]) -> None:
    merged = form([Dense(normal(24, 4)), Dense(normal(4, 6, seed=1)), Dense(normal(6, 20, seed=2))], cuts)
    assert (len(merged.factors) if isinstance(merged, Compose) else 1) == len(cuts) + 1


def test_of_many_forms_those_with_the_fewest_numbers_are_made() -> None:
    widths = [8, 2, 9, 3, 7, 4, 6]
    whole = Compose(tuple(Dense(normal(a, b, seed=a)) for a, b in pairwise(widths)))
    found = products(whole)
    assert len(found) == MOST < len(groupings(6)) and found[0] is whole
    numbers = [made.cost().params for made in found[1:]]
    assert (
        numbers == sorted(numbers) and min(made.cost().params for made in map(lambda c: form(whole.factors, c), groupings(6))) == numbers[0]
    )


FORMS = [Dense(normal(4, 4, seed=i)) for i in range(3)]


def test_the_fastest_has_the_least_sum() -> None:
    assert fastest([[3.0, 1.0, 2.0], [1.0, 4.0, 2.0]]) == 0
    assert fastest([[3.0, 1.0, 2.0], [1.0, 4.0, 2.0]], [0]) == 1


def test_two_forms_are_cut_where_they_gain_most() -> None:
    tokens = (256, 1, 16)  # in whatever order they were asked
    found = dispatch(tokens, FORMS, [[1.0, 4.0, 9.0], [4.0, 1.0, 9.0], [3.9, 1.0, 9.0]])
    assert found is not None and (found.few, found.many, found.most) == (FORMS[1], FORMS[0], 64)


@pytest.mark.parametrize("table", [[[1.0, 1.05, 9.0], [1.05, 1.0, 9.0]], [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]], ids=["close", "one wins"])
def test_one_form_is_enough(table: list[list[float]]) -> None:
    assert dispatch((1, 256), FORMS, table) is None
