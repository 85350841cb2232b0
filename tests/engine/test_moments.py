"""Moments against float64 oracles and sampled truths."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rewriter.moments import Accumulator, Moments, isotropic, layer_norm
from tests.engine.nets import normal


def streamed(rows: Tensor, chunk: int = 7, step: int = 10) -> Moments:
    accumulator = Accumulator(rows.shape[-1], chunk)
    for part in rows.split(step):
        accumulator.update(part)
    return accumulator.moments("test")


def covariance(rows: Tensor) -> Tensor:
    """The oracle, (n, n): float64, two passes, then the documented shrinkage."""
    x = rows.reshape(-1, rows.shape[-1]).double()
    found = torch.cov(x.T, correction=0)
    away = min(0.5, x.shape[1] / (10 * len(x)))
    return found * (1 - away) + torch.diag(found.diagonal()) * away


@pytest.mark.parametrize("count", [3, 40, 1000])
def test_streamed_equals_batch(count: int) -> None:
    rows = normal(count, 6, dtype=torch.float64) @ normal(6, 6, seed=1, dtype=torch.float64) + normal(6, seed=2, dtype=torch.float64)
    found = streamed(rows)
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.covariance(), covariance(rows))
    torch.testing.assert_close(found.second, covariance(rows) + torch.outer(rows.mean(0), rows.mean(0)))
    assert (found.count, found.features, found.law) == (count, 6, "test")


def test_leading_axes_are_rows() -> None:
    rows = normal(4, 5, 3, dtype=torch.float64)
    found = streamed(rows, step=2)
    assert found.count == 20
    torch.testing.assert_close(found.covariance(), covariance(rows))


def test_large_mean_loses_no_digits() -> None:
    rows = normal(4000, 5) + 1e4
    found = streamed(rows, chunk=500, step=1000).covariance()
    torch.testing.assert_close(found.float(), covariance(rows).float())


@pytest.mark.parametrize(("count", "away"), [(2, 0.5), (12, 0.1), (120, 0.01)])
def test_few_rows_shrink_towards_the_diagonal(count: int, away: float) -> None:
    rows = normal(count, 12, dtype=torch.float64)
    plain, found = torch.cov(rows.T, correction=0), streamed(rows).covariance()
    off = ~torch.eye(12, dtype=torch.bool)
    torch.testing.assert_close(found[off], plain[off] * (1 - away))
    torch.testing.assert_close(found.diagonal(), plain.diagonal())


def test_few_rows_have_no_dead_direction() -> None:
    """Three rows span two directions; a fit must not take the other four for silent."""
    assert torch.linalg.matrix_rank(streamed(normal(3, 6, dtype=torch.float64)).covariance()) == 6


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("with_beta", [False, True])
def test_layer_norm_formula_against_samples(rms: bool, with_beta: bool) -> None:
    n, count = 5, 100_000
    gamma, beta = normal(n, seed=1), normal(n, seed=2) if with_beta else None
    z = normal(count, n, dtype=torch.float64)
    z = z if rms else z - z.mean(1, keepdim=True)
    z = z * math.sqrt(n) / z.norm(dim=1, keepdim=True)
    x = z * gamma.double() + (0 if beta is None else beta.double())
    products = x[:, :, None] * x[:, None, :]
    standard_error = products.std(0) / math.sqrt(count)
    found = layer_norm(gamma, beta, rms)
    # five standard errors and, for entries that do not vary (a single value), rounding
    assert bool(((found.second - products.mean(0)).abs() <= 5 * standard_error + torch.finfo(torch.float32).eps).all())
    torch.testing.assert_close(found.mean, torch.zeros(n, dtype=torch.float64) if beta is None else beta.double())


def test_layer_norm_and_rms_norm_differ_by_the_mean_direction() -> None:
    ones = torch.ones(4)
    assert float(ones.double() @ layer_norm(ones, None, rms=False).second @ ones.double()) == pytest.approx(0)
    assert float(ones.double() @ layer_norm(ones, None, rms=True).second @ ones.double()) == pytest.approx(4)


def test_error_shift_and_centered_are_those_of_the_rows() -> None:
    rows = normal(50_000, 4, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.5, 0.1]).double() + 1
    exact = Moments(rows.T @ rows / len(rows), rows.mean(0), len(rows), "all")
    weight, other = normal(3, 4), normal(3, 4, seed=1)
    gap, full = rows @ (weight - other).double().T, rows @ weight.double().T
    torch.testing.assert_close(exact.error(weight, other), float(gap.norm() / full.norm()))
    torch.testing.assert_close(exact.shift(weight, other), gap.mean(0))
    torch.testing.assert_close(exact.error(weight, other, shifted=True), float((gap - gap.mean(0)).norm() / full.norm()))
    centred = exact.centered()
    torch.testing.assert_close(centred.second, torch.cov(rows.T, correction=0))
    assert not centred.mean.any()
    torch.testing.assert_close(centred.energy(weight), float((full - full.mean(0)).square().sum() / len(rows)))


def test_errors_at_the_ends() -> None:
    weight, moments = normal(3, 4), isotropic(4)
    assert moments.error(weight, weight) == 0
    assert moments.error(weight, torch.zeros(3, 4)) == pytest.approx(1)
    torch.testing.assert_close(moments.error(weight, weight * 0.75), 0.25)


def test_remembered_energy_is_never_another_weights() -> None:
    moments = isotropic(4)
    first = normal(3, 4)
    before = moments.energy(first)
    assert moments.energy(first * 2) == pytest.approx(4 * before)
    assert moments.energy(first) == pytest.approx(before)
    wider = replace(moments, second=9 * moments.second)
    assert wider.energy(first) == pytest.approx(9 * before)
    assert moments.energy(first) == pytest.approx(before)


def test_remembered_energy_survives_reuse_of_an_address() -> None:
    """A weight that was freed and another at its place: identity is by life, not by address."""
    moments = isotropic(4)
    for scale in range(1, 20):
        weight = torch.full((3, 4), float(scale))
        assert moments.energy(weight) == pytest.approx(12 * scale**2)
        del weight


def test_energy_is_computed_once_for_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    moments, weight = isotropic(4), normal(3, 4)
    before = moments.energy(weight)
    monkeypatch.setattr(Tensor, "double", lambda self: pytest.fail("computed again"))
    assert moments.energy(weight) == before


def test_energy_of_a_weight_changed_in_place() -> None:
    moments, weight = isotropic(4), torch.ones(3, 4)
    assert moments.energy(weight) == pytest.approx(12)
    weight.mul_(2)
    assert moments.energy(weight) == pytest.approx(48)
