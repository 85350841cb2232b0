"""Points: balanced as a net is, independent from seed to seed, of the law that was asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewriter.errors import RewriteError
from rewriter.points import CHUNK, normal_points, principal_root, replicated, standard_normals, uniform_points
from rewriter.tolerances import EQUAL
from tests.engine.nets import normal

RTOL, ATOL = EQUAL[torch.float64]


def cells(points: torch.Tensor, parts: int) -> torch.Tensor:
    """How many points of each column lie in each of `parts` equal cells."""
    return torch.stack([torch.bincount((column * parts).long(), minlength=parts) for column in points.T])


@given(st.integers(0, 7), st.integers(1, 40), st.integers(0, 99))
def test_every_cell_of_every_dimension_holds_one_point(k: int, dimensions: int, seed: int) -> None:
    """Of 2^k points, and again of the next 2^k; of both together each half cell holds one."""
    n = 2**k
    first, second = uniform_points(n, dimensions, seed), uniform_points(n, dimensions, seed, start=n)
    assert bool((cells(first, n) == 1).all()) and bool((cells(second, n) == 1).all())
    assert bool((cells(torch.cat([first, second]), 2 * n) == 1).all())
    assert torch.equal(uniform_points(2 * n, dimensions, seed), torch.cat([first, second]))


@pytest.mark.parametrize("dimensions", [CHUNK + 1, 2 * CHUNK + 300])
def test_chunks_beyond_one_net_are_nets_too(dimensions: int) -> None:
    for start in (0, 64):
        assert bool((cells(uniform_points(64, dimensions, 5, start), 64) == 1).all())
    both = torch.cat([uniform_points(64, dimensions, 5), uniform_points(64, dimensions, 5, 64)])
    assert bool((cells(both, 128) == 1).all())


def test_chunks_are_independent() -> None:
    """Columns at the same place of two chunks must not be one another's function."""
    drawn = standard_normals(512, 2 * CHUNK, 0)
    products = (drawn[:, :CHUNK] * drawn[:, CHUNK:]).mean(0)
    assert float(products.square().mean().sqrt()) < 2 / 512**0.5


def test_replications_are_independent_scramblings() -> None:
    """No two are one set of points, and errors of their means do not go together: 200 pairs correlate like 200 pairs of noise."""
    found = list(replicated(lambda seed: uniform_points(8, 3, seed), 400, 1))
    assert len({tuple(points.flatten().tolist()) for points in found}) == 400
    errors = torch.stack([(points.prod(1)).mean() for points in found]).reshape(200, 2)
    correlation = float(torch.corrcoef(errors.T)[0, 1])
    assert abs(correlation) < 4 / 200**0.5
    assert float(errors.var()) > 0


def test_a_seed_names_its_points() -> None:
    assert torch.equal(uniform_points(16, 5, (3, 1)), uniform_points(16, 5, (3, 1)))
    assert not torch.equal(uniform_points(16, 5, (3, 1)), uniform_points(16, 5, (3, 2)))
    before = uniform_points(4, 5, 7, start=8)
    uniform_points(64, 5, 7)  # what was drawn between does not count
    assert torch.equal(before, uniform_points(4, 5, 7, start=8))


@pytest.mark.parametrize("width", [1, 5, 1024, 2500])
def test_normals_look_normal(width: int) -> None:
    drawn = standard_normals(256, width, 3)
    assert bool(drawn.isfinite().all())
    spread = 1 / 256**0.5  # the error of plain sampling; a net's means are far closer
    assert float(drawn.mean(0).abs().max()) < spread


def test_the_first_dimension_carries_the_largest_eigenvalue() -> None:
    factor = normal(6, 6, dtype=torch.float64)
    covariance = factor @ factor.T
    root = principal_root(covariance)
    torch.testing.assert_close(root @ root.T, covariance, rtol=RTOL, atol=ATOL)
    lengths = root.square().sum(0)
    torch.testing.assert_close(lengths, torch.linalg.eigvalsh(covariance).flip(0), rtol=RTOL, atol=ATOL)
    assert bool((lengths.diff() <= 0).all())


def test_normal_points_have_their_moments() -> None:
    """A rank-deficient covariance too; against plain sampling's error of the mean and of the variances."""
    factor, mean, n = normal(5, 3, dtype=torch.float64), normal(5, seed=1, dtype=torch.float64), 4096
    covariance = factor @ factor.T
    x = normal_points(mean, covariance, n, 0)
    deviation = covariance.diagonal().sqrt()
    assert bool(((x.mean(0) - mean).abs() < deviation / n**0.5).all())
    allowed = 4 / n**0.5 * (covariance.abs() + deviation.max() ** 2)  # four standard errors of plain sampling
    assert bool(((x.T.cov() - covariance).abs() <= allowed).all())
    rtol, atol = EQUAL[torch.float32]  # the root of a zero eigenvalue that rounding left
    torch.testing.assert_close((x - mean) @ torch.linalg.pinv(factor).T @ factor.T, x - mean, rtol=rtol, atol=atol)


def test_what_is_no_net_is_refused() -> None:
    for n, dimensions, start in ((0, 3, 0), (4, 0, 0), (4, 3, -1)):
        with pytest.raises(RewriteError, match="give at least one point and one dimension"):
            uniform_points(n, dimensions, 0, start)
    with pytest.raises(RewriteError, match=r"a covariance of shape \[2, 3\] is not square"):
        principal_root(torch.zeros(2, 3))
