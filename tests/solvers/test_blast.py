"""The descent in blocks that share their sides: moves change the objective by what they say, it never rises, planted factors are found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.moments import isotropic
from rewriter.passes.solvers import blast
from rewriter.passes.solvers.blast import Shared, SharedFit
from rewriter.passes.solvers.spectral import ridged, spectrum
from rewriter.tolerances import EQUAL, EXACT
from tests.structures.inputs import anisotropic, decaying, generator

many = settings(max_examples=40, deadline=None, derandomize=True)
sides = st.integers(2, 40)
GRIDS = [(30, 40, 2, 6), (40, 30, 4, 9), (31, 23, 3, 5), (12, 60, 4, 3), (24, 24, 1, 4)]


def planted(b: int, p: int, q: int, r: int, seed: int) -> Shared:
    rng = generator(seed)
    return Shared(*(torch.randn(*shape, r, generator=rng, dtype=torch.float64) for shape in ((b, p), (b, b), (b, q))))


def loss(weight: Tensor, second: Tensor, factors: Shared) -> float:
    """From the dense form, under the H that the solver sees."""
    gap = weight.double() - factors.dense()[: weight.shape[0], : weight.shape[1]]
    return float(((gap @ ridged(second)) * gap).sum())


@many
@given(b=st.integers(1, 5), p=st.integers(1, 7), q=st.integers(1, 7), r=st.integers(1, 6))
def test_dense_is_the_loop_over_blocks(b: int, p: int, q: int, r: int) -> None:
    factors = planted(b, p, q, r, 0)
    rows = [torch.cat([factors.left[i] @ torch.diag(factors.coupling[i, j]) @ factors.right[j].T for j in range(b)], 1) for i in range(b)]
    assert torch.allclose(factors.dense(), torch.cat(rows), *EQUAL[torch.float64])


@many
@given(m=sides, n=sides, b=st.integers(1, 4), rank=st.integers(1, 9), seed=st.integers(0, 3))
def test_loss_falls_is_true_and_never_above_low_rank(m: int, n: int, b: int, rank: int, seed: int) -> None:
    b, rank = min(b, m, n), min(rank, m, n)
    weight, second = decaying(m, n, seed), anisotropic(n, seed).second
    fit = SharedFit(weight, second, b, rank)
    fit.descend(6)
    energy = loss(weight, second, Shared(*(torch.zeros(b, k, 1).double() for k in (-(-m // b), b, -(-n // b)))))
    slack = EQUAL[torch.float64][0] * energy
    assert all(after <= before + slack for before, after in zip(fit.losses, fit.losses[1:], strict=False))
    assert loss(weight, second, fit.factors) == pytest.approx(fit.losses[-1], abs=slack)
    down, up = spectrum(weight, second).truncate(rank)
    gap = weight.double() - up.T @ down.T
    assert fit.losses[-1] <= float(((gap @ ridged(second)) * gap).sum()) + slack


@pytest.mark.parametrize("name", ["left", "coupling", "right", "ahead"])
@pytest.mark.parametrize(("m", "n", "b", "rank"), GRIDS)
def test_a_move_changes_the_objective_by_what_it_says(m: int, n: int, b: int, rank: int, name: str) -> None:
    weight, second = decaying(m, n), anisotropic(n).second
    fit = SharedFit(weight, second, b, rank)
    fit.descend(2)
    before = loss(weight, second, fit.factors)
    problem = fit._problem
    move = getattr(problem, name)()
    problem.apply(name, move)
    after = loss(weight, second, fit.factors)
    assert after - before == pytest.approx(move.change, abs=EQUAL[torch.float64][0] * fit.losses[0])
    fresh = problem._at(problem.point.left, problem.point.coupling, problem.point.right)
    assert torch.allclose(problem.point.image, fresh.image, *EQUAL[torch.float64])
    assert torch.allclose(problem.point.gram, fresh.gram, *EQUAL[torch.float64])


@pytest.mark.parametrize(("name", "steps"), [("left", ""), ("coupling", "COUPLING_STEPS"), ("right", "RIGHT_STEPS")])
@pytest.mark.parametrize(("m", "n", "b", "rank"), GRIDS)
def test_exact_moves_end_where_autograd_sees_no_slope(
    m: int, n: int, b: int, rank: int, name: str, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With conjugate gradients run to the end."""
    if steps:
        monkeypatch.setattr(blast, steps, 500)
    weight, second = decaying(m, n).double(), isotropic(n).second
    problem = SharedFit(weight, second, b, rank)._problem
    for _ in range(2):
        problem.apply(name, getattr(problem, name)())
    at = problem.point
    factors = {key: getattr(at, key).clone().requires_grad_(key == name) for key in ("left", "coupling", "right")}
    gap = weight - Shared(**factors).dense()[:m, :n]
    (slope,) = torch.autograd.grad(((gap @ ridged(second)) * gap).sum(), factors[name])
    assert float(slope.norm()) <= EXACT[torch.float32] * float(weight.square().sum()) * max(1.0, float(factors[name].detach().norm()))


def test_the_step_ahead_looks_for_its_length() -> None:
    """It is as good as the strides about it, and not always one."""
    best = []
    for m, n, b, rank in GRIDS[:4]:
        fit = SharedFit(decaying(m, n), anisotropic(n).second, b, rank)
        for _ in range(3):
            fit.descend(1)
            problem = fit._problem
            at = problem.point = problem.latest  # as it was before the last step ahead
            last, at_stride = problem.before, {}
            for stride in (0.5, 1.0, 2.0):
                moved = [getattr(at, name) + stride * (getattr(at, name) - getattr(last, name)) for name in ("left", "coupling", "right")]
                at_stride[stride] = problem.objective(problem._at(*moved)) - problem.objective(problem.point)
            slack = EQUAL[torch.float64][0] * fit.losses[0]
            assert problem.ahead().change <= min(at_stride.values()) + slack
            best.append(min(at_stride, key=lambda stride: at_stride[stride]))
    assert set(best) != {1.0}


def test_it_leaves_the_low_rank_start_without_noise() -> None:
    weight, second = decaying(48, 64), anisotropic(64).second
    fit = SharedFit(weight, second, 4, 12)
    assert torch.equal(fit.factors.coupling, torch.ones(4, 4, 12, dtype=torch.float64))
    fit.descend(20)
    assert fit.losses[-1] < (1 - EQUAL[torch.float32][0]) * fit.losses[0]


@pytest.mark.parametrize("law", [isotropic, anisotropic])
@pytest.mark.parametrize("seed", range(4))
def test_planted_factors_are_found(seed: int, law: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(law)
    monkeypatch.setattr(blast, "GAIN", 0.0)
    weight, second = planted(4, 16, 16, 2, seed).dense(), law(64).second
    fit = SharedFit(weight, second, 4, 2)
    fit.descend(120)
    scale = float(((weight @ ridged(second)) * weight).sum())
    assert loss(weight, second, fit.factors) <= EXACT[torch.float32] ** 2 * scale


@pytest.mark.parametrize(("b", "each", "rest"), [(2, 2, 0), (3, 1, 0), (3, 2, 1)])
def test_a_grid_of_low_rank_blocks_is_a_member(b: int, each: int, rest: int) -> None:
    rng = generator(b)
    blocks = [[torch.randn(9, each, generator=rng) @ torch.randn(each, 7, generator=rng) for _ in range(b)] for _ in range(b)]
    weight = torch.cat([torch.cat(row, 1) for row in blocks]).double()
    fit = SharedFit(weight, isotropic(7 * b).second, b, b * each + rest)
    assert fit.losses[0] <= EXACT[torch.float32] ** 2 * float(weight.square().sum())


def test_going_on_is_the_same_as_not_stopping() -> None:
    weight, second = decaying(30, 40), anisotropic(40).second
    whole, parts = (SharedFit(weight, second, 4, 8) for _ in range(2))
    whole.descend(7)
    parts.descend(3)
    parts.descend(4)
    assert whole.losses == pytest.approx(parts.losses, rel=EQUAL[torch.float64][0])
    assert torch.equal(whole.factors.left, parts.factors.left)


def test_large_products_in_float32_end_at_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, second = decaying(48, 64), anisotropic(64).second
    fits = []
    for work in (blast.FP64_WORK, 0):
        monkeypatch.setattr(blast, "FP64_WORK", work)
        fits.append(SharedFit(weight, second, 4, 12))
        fits[-1].descend(6)
    exact, single = (loss(weight, second, fit.factors) for fit in fits)
    assert single == pytest.approx(exact, rel=EQUAL[torch.float32][0])
