"""Refitting kept values: the optimum on the support, never further away than before, for any wrappers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.passes.solvers import pruning
from rewriter.passes.solvers.armor import Pattern, armor
from rewriter.passes.solvers.armor_refit import refitted, repruned
from rewriter.tolerances import CONVERGED, EQUAL

RTOL, ATOL = EQUAL[torch.float64]


def case(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight, and second moments of correlated inputs."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=rng, dtype=torch.float64) * torch.linspace(0.5, 3, columns)
    x = x + 0.7 * x.roll(1, 1)
    return torch.randn(rows, columns, generator=rng, dtype=torch.float64), x.T @ x / len(x)


def error(weight: Tensor, other: Tensor, second: Tensor) -> float:
    gap = weight - other
    return float(((gap @ second) * gap).sum())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(high=st.integers(1, 3), wide=st.integers(1, 3), steps=st.integers(0, 8), sweeps=st.integers(0, 2), seed=st.integers(0, 9))
def test_the_weighted_error_never_rises_and_the_mask_stays(high: int, wide: int, steps: int, sweeps: int, seed: int) -> None:
    weight, second = case(8 * high, 8 * wide, seed)
    found = armor(weight, second.diagonal(), 8, Pattern(), torch.Generator().manual_seed(seed), sweeps)
    again = refitted(found, weight, second, steps)
    before, after = (error(weight, f.dense(), second) for f in (found, again))
    assert after <= before * (1 + RTOL) + ATOL
    assert bool((again.core[found.core == 0] == 0).all())
    assert torch.equal(again.left, found.left) and torch.equal(again.right, found.right)


def test_it_goes_to_the_least_squares_on_the_support() -> None:
    """Against a dense solve of all values at once, whose design has a column for each kept value."""
    weight, second = case(8, 16, 0)
    found = armor(weight, second.diagonal(), 8, Pattern(), torch.Generator().manual_seed(0), 3)
    left, right = torch.block_diag(*found.left), torch.block_diag(*found.right)
    root = torch.linalg.cholesky(second)
    design = torch.stack([torch.outer(left[:, i], (right @ root)[j]).flatten() for i, j in found.core.nonzero().tolist()], 1)
    best = torch.linalg.lstsq(design, (weight @ root).flatten()).solution
    again = refitted(found, weight, second, steps=500)
    torch.testing.assert_close(again.core[found.core != 0], best, rtol=CONVERGED[torch.float64], atol=CONVERGED[torch.float64])


def test_pruned_rows_are_regressions_on_what_they_keep() -> None:
    weight, second = case(6, 8, 1)
    pruned = pruning.sparsegpt(weight, second, 2, 4)
    again = repruned(pruned, weight, second)  # four values a row: as many steps are enough, fewer than are taken
    for row, kept in enumerate(pruned != 0):
        best = torch.linalg.solve(second[kept][:, kept], second[kept] @ weight[row])
        torch.testing.assert_close(again[row, kept], best)
        assert not bool(again[row, ~kept].any())


@pytest.mark.parametrize("second", [torch.zeros(16, 16), torch.ones(16, 16)], ids=["no input", "one direction"])
def test_inputs_that_say_nothing_leave_finite_values(second: Tensor) -> None:
    weight, moments = case(8, 16, 0)
    found = armor(weight, moments.diagonal(), 8, Pattern(), torch.Generator().manual_seed(0), 1)
    assert bool(refitted(found, weight, second.double()).dense().isfinite().all())
