"""Weighted and masked low rank: closed forms as oracles, exact half-steps against inexact ones, planted parts found."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewriter.passes.solvers import observed
from rewriter.passes.solvers.observed import Sampled, Whole
from rewriter.passes.solvers.weighted_low_rank import Completed, complete
from rewriter.tolerances import CONVERGED, EQUAL

ROWS, COLUMNS, RANK = 40, 30, 3
RTOL, ATOL = EQUAL[torch.float64]
REACHED = CONVERGED[torch.float64]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def planted(noise: float = 0.0) -> Tensor:
    return normal(ROWS, RANK) @ normal(RANK, COLUMNS, seed=1) + noise * normal(ROWS, COLUMNS, seed=2)


def mask(share: float, seed: int = 3) -> Tensor:
    return (torch.rand(ROWS, COLUMNS, generator=rng(seed)) < share).double()


def lost(found: Completed, target: Tensor, weights: Tensor) -> float:
    return float((weights * (target - found.dense()).square()).sum())


WEIGHTS = {"all": torch.ones(ROWS, COLUMNS), "half": mask(0.5), "few": mask(0.18), "real": normal(ROWS, COLUMNS, seed=4).exp()}


@pytest.mark.parametrize("inner", [0, 2])
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_loss_falls_and_is_true(name: str, inner: int) -> None:
    target, weights = planted(0.1), WEIGHTS[name].double()
    found = complete(target, weights, RANK, rng(), inner=inner)
    assert all(b <= a for a, b in itertools.pairwise(found.losses)) and len(found.losses) == 11
    assert found.losses[-1] == pytest.approx(lost(found, target, weights), rel=RTOL, abs=ATOL)
    again = complete(target, weights, RANK, rng(), inner=inner)
    assert torch.equal(found.left, again.left) and torch.equal(found.right, again.right)


def test_even_weights_give_the_singular_vectors() -> None:
    target = planted(0.3)
    found = complete(target, torch.ones_like(target), RANK, rng(), rounds=30)
    assert found.losses[-1] == pytest.approx(float(torch.linalg.svdvals(target)[RANK:].square().sum()), rel=REACHED)


def test_separable_weights_have_a_closed_form() -> None:
    """w_ij = a_i b_j: a plain truncation of the scaled matrix."""
    target, a, b = planted(0.3), normal(ROWS, seed=5).exp(), normal(COLUMNS, seed=6).exp()
    found = complete(target, torch.outer(a, b), RANK, rng(), rounds=200)
    scaled = a.sqrt()[:, None] * target * b.sqrt()
    assert found.losses[-1] == pytest.approx(float(torch.linalg.svdvals(scaled)[RANK:].square().sum()), rel=REACHED)


@pytest.mark.parametrize("name", ["half", "real"])
def test_half_steps_need_not_be_exact(name: str) -> None:
    target, weights = planted(0.1), WEIGHTS[name]
    exact, inexact = (complete(target, weights, RANK, rng(), inner=inner, rounds=200) for inner in (0, 2))
    assert inexact.losses[-1] == pytest.approx(exact.losses[-1], rel=REACHED)


@pytest.mark.parametrize(("size", "share"), [(40, 0.5), (200, 0.15)], ids=["whole", "sampled"])
def test_what_was_not_observed_is_recovered_and_never_read(size: int, share: float) -> None:
    target = normal(size, RANK) @ normal(RANK, size, seed=1)
    seen = torch.rand(target.shape, generator=rng(3)) < share
    found = complete(torch.where(seen, target, torch.nan), seen.double(), RANK, rng(), rounds=200)
    assert isinstance(observed.observed(seen), Sampled) == (share < 0.2)
    assert float((found.dense() - target).norm() / target.norm()) < REACHED


def test_a_planted_sparse_part_is_taken_apart() -> None:
    low = planted()
    where = torch.randperm(ROWS * COLUMNS, generator=rng(7))[:40]
    spikes = torch.zeros(ROWS * COLUMNS, dtype=torch.float64)
    spikes[where] = 10 * normal(40, seed=8).sign()
    target = low + spikes.view(ROWS, COLUMNS)
    found = complete(target, torch.ones_like(target), RANK, rng(), kept=40, rounds=100)
    assert found.sparse is not None
    torch.testing.assert_close(found.sparse.to_dense(), spikes.view(ROWS, COLUMNS), rtol=REACHED, atol=REACHED)
    torch.testing.assert_close(found.left @ found.right.T, low, rtol=REACHED, atol=REACHED)
    assert lost(found, target, torch.ones_like(target)) <= found.losses[0]


def test_sparse_entries_are_no_more_than_are_observed() -> None:
    target, seen = planted(0.1), mask(0.18)
    found = complete(target, seen, RANK, rng(), kept=ROWS * COLUMNS)
    assert found.sparse is not None and found.losses[-1] == pytest.approx(0, abs=ATOL)
    assert bool((found.sparse.to_dense()[seen == 0] == 0).all())


def test_columns_of_both_factors_are_balanced() -> None:
    found = complete(planted(0.1), WEIGHTS["real"], RANK, rng())
    torch.testing.assert_close(found.left.norm(dim=0), found.right.norm(dim=0))
    gram = found.left.T @ found.left
    gram = gram / gram.max()
    torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=RTOL, atol=ATOL)  # off the diagonal 0 is expected


def test_rows_without_a_weight_are_finite() -> None:
    weights = WEIGHTS["real"].clone()
    weights[3], weights[:, 5] = 0, 0
    for inner in (0, 2):
        assert bool(complete(planted(0.1), weights, RANK, rng(), inner=inner).dense().isfinite().all())
    assert not bool(complete(planted(), torch.zeros_like(weights), RANK, rng()).dense().isnan().any())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 500))
def test_sampled_products_are_those_of_whole_matrices(m: int, n: int, r: int, seed: int) -> None:
    seen = torch.rand(m, n, generator=rng(seed)) < 0.4
    left, right, matrix = normal(m, r, seed=seed), normal(n, r, seed=seed + 1), normal(m, n, seed=seed + 2) * seen
    sampled, whole = Sampled.of(seen), Whole()
    values = sampled.values(matrix)
    torch.testing.assert_close(sampled.matrix(values), matrix)
    torch.testing.assert_close(sampled.matrix(sampled.image(left, right)), whole.image(left, right) * seen, rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(sampled.onto_left(values, right), whole.onto_left(matrix, right), rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(sampled.onto_right(values, left), whole.onto_right(matrix, left), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_sampled_products_are_taken_where_few_entries_are_observed(share: float) -> None:
    assert isinstance(observed.observed(mask(share).bool()), Sampled) == (share == 0.1)


@pytest.mark.parametrize(
    ("weights", "rank", "kept", "said"),
    [
        (torch.ones(3, 3), RANK, 0, "weights of shape"),
        (-torch.ones(ROWS, COLUMNS), RANK, 0, "one finite weight >= 0"),
        (torch.full((ROWS, COLUMNS), torch.inf), RANK, 0, "one finite weight >= 0"),
        (torch.full((ROWS, COLUMNS), torch.nan), RANK, 0, "one finite weight >= 0"),
        (torch.ones(ROWS, COLUMNS), 31, 0, "the rank is 1 to 30"),
        (torch.ones(ROWS, COLUMNS), RANK, -1, "with -1 sparse entries"),
    ],
)
def test_what_cannot_be_is_refused(weights: Tensor, rank: int, kept: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        complete(planted(), weights, rank, rng(), kept=kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_where_it_is_read(bad: float) -> None:
    target, weights = planted(), torch.ones_like(planted())
    target[0, 0] = bad
    with pytest.raises(ValueError, match="the target holds NaN or inf where the weight is not zero"):
        complete(target, weights, RANK, rng())
    weights[0, 0] = 0
    assert complete(target, weights, RANK, rng()).left.isfinite().all()
