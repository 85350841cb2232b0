"""Row bases stay well conditioned; components and rank searches answer for adversarial patterns."""

from __future__ import annotations

import pytest
import torch

from rewriter.passes.solvers import spectral
from rewriter.passes.solvers.components import components
from rewriter.passes.solvers.pivoting import BOUND, row_basis
from rewriter.passes.solvers.rank_search import Grid, block_counts, find_grid, find_rank
from rewriter.passes.solvers.spectral import spectrum
from rewriter.tolerances import EQUAL, EXACT


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kahan(n: int, c: float = 0.3) -> torch.Tensor:
    """The matrix on which column pivoting alone is known to fail."""
    s = (1 - c * c) ** 0.5
    upper = torch.eye(n, dtype=torch.float64) - c * torch.ones(n, n, dtype=torch.float64).triu(1)
    return torch.diag(s ** torch.arange(n, dtype=torch.float64)) @ upper


BASES = [random(40, 7), random(5, 5), random(30, 1), kahan(40).T[:, :39], random(50, 6) @ torch.diag(torch.logspace(0, -6, 6))]


@pytest.mark.parametrize("basis", BASES)
def test_row_basis_is_exact_and_bounded(basis: torch.Tensor) -> None:
    pivots, coefficients, largest = row_basis(basis)
    assert len(set(pivots.tolist())) == basis.shape[1]
    assert torch.allclose(coefficients @ basis.double()[pivots], basis.double(), *EQUAL[torch.float64])
    assert largest <= BOUND + EXACT[torch.float32]


def test_components_of_a_chain() -> None:
    """A bidiagonal pattern is one component of the largest diameter."""
    chain = torch.eye(50) + torch.eye(50).roll(1, 1).triu()
    assert len(components(chain)) == 1
    chain[20, :] = chain[:, 20] = 0
    assert len(components(chain)) == 2
    assert components(torch.zeros(3, 4)) == []


@pytest.mark.parametrize("length", [1, 2, 7, 12, 768])
def test_block_counts_leave_no_block_empty(length: int) -> None:
    for count in block_counts(length, 256):
        assert 0 < length - (count - 1) * -(-length // count) <= -(-length // count)


def test_rank_search_sees_what_a_sample_may_miss() -> None:
    """One block of another rank, one dense corner, one tiny direction."""
    weight = random(60, 3) @ random(3, 80, seed=1)
    assert find_rank(weight, 30).rank == 3
    weight[0, 0] += 1
    assert find_rank(weight, 30).rank == 4
    assert find_rank(weight, 3) is None
    grids = [Grid(2, 2), Grid(3, 2), Grid(4, 4)]
    corner = weight.clone()
    corner[:30, :40] = random(30, 40, seed=2)
    assert find_grid(corner, grids) is None
    assert find_grid(weight, grids).grid == Grid(2, 2)


def test_single_precision_spectrum_is_polished(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, second = random(50, 5) @ random(5, 70), torch.eye(70)
    monkeypatch.setattr(spectral, "FP64_SIZE", 0)
    down, up = spectrum(weight, second).truncate(5)
    assert torch.linalg.norm((down @ up).T - weight) <= EXACT[torch.float32] * torch.linalg.norm(weight)
