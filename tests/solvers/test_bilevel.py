"""Bilevel descent on ridge problems, whose lower solutions, gradients and optima are known in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from rewriter.passes.solvers.bilevel import AbstractBilevel, Settings, Solved, solve
from rewriter.tolerances import CONVERGED, EQUAL, EXACT

WIDE, BLOCKS, ROWS = 3, 4, 24
FP64 = torch.float64
FULL = Settings(blocks=BLOCKS, batch=ROWS, steps=60, tau=0.4, tau_v=0.4, eta=0.0)
versions = pytest.mark.parametrize("version", [1, 2])


class Ridge(AbstractBilevel):
    """y_i = argmin |A_i y - b_i|^2 / 2 n + exp((M x)_i) |y|^2 / 2, judged on other rows; `chained`: by the product of all y as well."""

    def __init__(self, seed: int, chained: bool = False) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.blocks, self.samples, self.chained = BLOCKS, ROWS, chained
        self.mix = torch.randn(BLOCKS, 2, generator=rng, dtype=FP64)  # two numbers of x for all blocks
        self.a, self.c = (torch.randn(BLOCKS, ROWS, WIDE, generator=rng, dtype=FP64) for _ in range(2))
        planted = torch.randn(BLOCKS, WIDE, generator=rng, dtype=FP64)
        noise = torch.randn(2, BLOCKS, ROWS, generator=rng, dtype=FP64)
        self.b, self.d = torch.einsum("inw,iw->in", self.a, planted) + noise[0], torch.einsum("inw,iw->in", self.c, planted) + noise[1]

    def lower(self, x: Tensor, y: Tensor, i: int, rows: Tensor) -> Tensor:
        return (self.a[i, rows] @ y - self.b[i, rows]).square().mean() / 2 + (self.mix[i] @ x).exp() * y.square().sum() / 2

    def upper(self, x: Tensor, y: Sequence[Tensor], i: int, rows: Tensor) -> Tensor:
        own = (self.c[i, rows] @ y[i] - self.d[i, rows]).square().mean() / 2 + x.square().sum() / 20
        return own + torch.stack(list(y)).sum(0).square().sum() / 10 if self.chained else own

    def solution(self, x: Tensor) -> list[Tensor]:
        """(A^T A / n + exp(x_i) I)^-1 A^T b / n, differentiable."""
        eye = torch.eye(WIDE, dtype=FP64)
        return [
            torch.linalg.solve(a.T @ a / ROWS + (row @ x).exp() * eye, a.T @ b / ROWS)
            for a, b, row in zip(self.a, self.b, self.mix, strict=True)
        ]

    def objective(self, x: Tensor) -> Tensor:
        y = self.solution(x)
        return torch.stack([self.upper(x, y, i, torch.arange(ROWS)) for i in range(BLOCKS)]).mean()

    def gradient(self, x: Tensor) -> Tensor:
        """By autograd through the solve."""
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.objective(x), x)[0]


def solved(problem: Ridge, x: Tensor, settings: Settings, seed: int = 0) -> Solved:
    return solve(problem, x, [torch.zeros(WIDE, dtype=FP64)] * BLOCKS, settings, torch.Generator().manual_seed(seed))


@versions
@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_hypergradient_is_the_exact_one_at_rest(seed: int, chained: bool, version: Any) -> None:
    problem, x = Ridge(seed, chained), torch.tensor([0.3, -0.4], dtype=FP64)
    got = solved(problem, x, replace(FULL, version=version))
    exact = problem.gradient(x)
    assert torch.allclose(got.slope, exact, rtol=CONVERGED[FP64], atol=CONVERGED[FP64])
    assert all(torch.allclose(a, b, rtol=CONVERGED[FP64], atol=CONVERGED[FP64]) for a, b in zip(got.y, problem.solution(x), strict=True))
    assert torch.equal(got.x, x)


def test_the_oracle_agrees_with_finite_differences() -> None:
    problem, x, step = Ridge(0, True), torch.tensor([0.3, -0.4], dtype=FP64), 1e-5
    slope = [(problem.objective(x + e) - problem.objective(x - e)) / (2 * step) for e in step * torch.eye(2, dtype=FP64)]
    assert torch.allclose(torch.stack(slope), problem.gradient(x), *EQUAL[torch.float32])


@versions
@pytest.mark.parametrize(("seed", "chained"), [(0, True), (1, True), (1, False)])
def test_full_batches_end_where_the_gradient_vanishes(seed: int, chained: bool, version: Any) -> None:
    problem = Ridge(seed, chained)
    got = solved(problem, torch.tensor([0.5, 0.5], dtype=FP64), replace(FULL, version=version, eta=0.6, steps=200))
    assert float(problem.gradient(got.x).norm()) <= EXACT[torch.float32]
    assert got.trace[-1][0] == pytest.approx(float(problem.objective(got.x)), rel=EXACT[torch.float32])


@versions
@pytest.mark.parametrize("seed", range(2))
def test_samples_of_blocks_and_rows_descend_too(seed: int, version: Any) -> None:
    """Most of the way from the start to the optimum, by half of the blocks and a quarter of the rows a step."""
    problem, start = Ridge(seed), torch.tensor([1.5, 1.5], dtype=FP64)
    best = solved(problem, start, replace(FULL, eta=0.6, steps=200)).x
    settings = Settings(version, blocks=2, batch=8, steps=250, alpha=0.3, beta=0.1, tau=0.2, tau_v=0.2, eta=0.05)
    got = solved(problem, start, settings, seed)
    first, last, least = (float(problem.objective(x)) for x in (start, got.x, best))
    assert least - EXACT[FP64] <= last <= least + (first - least) / 4


@versions
def test_full_batches_leave_nothing_to_forget(version: Any) -> None:
    """The estimates follow what changes: without noise they are exact from the start, whatever alpha and beta."""
    start = torch.tensor([0.5, 0.5], dtype=FP64)
    slow, fast, blind = (
        solved(Ridge(0), start, replace(FULL, version=version, eta=0.3, steps=12, alpha=alpha, beta=alpha, gamma=gamma))
        for alpha, gamma in ((0.3, None), (1.0, None), (0.3, 0.0))
    )
    assert torch.allclose(slow.x, fast.x, *EQUAL[FP64])
    assert torch.allclose(slow.slope, fast.slope, *EQUAL[FP64])
    assert not torch.allclose(slow.x, blind.x, *EQUAL[FP64])


@versions
def test_same_seed_same_numbers(version: Any) -> None:
    settings = Settings(version, blocks=2, batch=12, steps=12, tau=0.1, tau_v=0.1)
    first, second, other = (solved(Ridge(0), torch.zeros(2, dtype=FP64), settings, seed) for seed in (3, 3, 4))
    assert torch.equal(first.x, second.x) and first.trace == second.trace
    assert not torch.equal(first.x, other.x)


def test_v2_steps_only_what_was_sampled_for_all_rounds_missed() -> None:
    problem, x = Ridge(0), torch.zeros(2, dtype=FP64)
    settings = Settings(2, blocks=1, batch=ROWS, steps=1, alpha=1.0, tau=0.1)
    one = solved(problem, x, settings)
    assert sum(bool(y.any()) for y in one.y) == 1
    assert all(bool(y.any()) for y in solved(problem, x, replace(settings, version=1)).y)
    seen: list[int] = []

    class Watched(Ridge):
        def upper(self, x: Tensor, y: Sequence[Tensor], i: int, rows: Tensor) -> Tensor:
            seen.append(i)
            return super().upper(x, y, i, rows)

    steps = 9
    got = solved(Watched(0), x, replace(settings, steps=steps, eta=0.0))
    order = seen[BLOCKS:]  # the start looks at all
    chosen = order[:: len(order) // steps]
    expected = [torch.zeros(WIDE, dtype=FP64) for _ in range(BLOCKS)]
    last = dict.fromkeys(range(BLOCKS), -1)
    for step, i in enumerate(chosen):
        y = expected[i].clone().requires_grad_()
        (slope,) = torch.autograd.grad(problem.lower(x, y, i, torch.arange(ROWS)), y)
        expected[i] = expected[i] - 0.1 * (step - last[i]) * slope
        last[i] = step
    assert all(torch.allclose(a, b, *EQUAL[FP64]) for a, b in zip(got.y, expected, strict=True))


@versions
def test_bounds_hold(version: Any) -> None:
    """The ball that v stays in, and the least eigenvalue that H is given, limit the implicit part of the gradient."""
    problem, x = Ridge(0), torch.tensor([0.3, -0.4], dtype=FP64)
    free = solved(problem, x, replace(FULL, version=version))
    held = solved(problem, x, replace(FULL, version=version, bound=1e6, radius=1e-6))
    direct = x / 10  # of the upper loss itself
    assert float((held.slope - direct).norm()) < EXACT[torch.float16] * float((free.slope - direct).norm())


@pytest.mark.parametrize(
    ("name", "value"),
    [("alpha", 0.0), ("alpha", 1.1), ("beta", 0.0), ("beta", 1.1), ("tau", 0.0), ("tau_v", 0.0), ("bound", 0.0), ("radius", 0.0)]
    + [("blocks", 0), ("batch", 0), ("steps", 0), ("eta", -1.0), ("version", 3), ("tau", float("nan"))],
)
def test_settings_that_cannot_be_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        Settings(**cast(Any, {name: value}))


def test_blocks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="5 blocks a step; there are 4 blocks"):
        solved(Ridge(0), torch.zeros(2, dtype=FP64), Settings(blocks=5))
    with pytest.raises(ValueError, match="3 starts"):
        solve(Ridge(0), torch.zeros(2, dtype=FP64), [torch.zeros(WIDE, dtype=FP64)] * 3, Settings(), torch.Generator())


def test_coupled_losses_ask_for_all_blocks() -> None:
    with pytest.raises(ValueError, match="take all 4 blocks in a step"):
        solved(Ridge(0, True), torch.zeros(2, dtype=FP64), Settings(blocks=2))


def test_a_descent_that_leaves_the_numbers_says_so() -> None:
    with pytest.raises(ValueError, match="smaller eta"):
        solved(Ridge(0), torch.zeros(2, dtype=FP64), replace(FULL, tau=1e9))


@versions
def test_what_a_loss_does_not_read_has_no_slope(version: Any) -> None:
    class Apart(Ridge):
        def lower(self, x: Tensor, y: Tensor, i: int, rows: Tensor) -> Tensor:
            return super().lower(torch.zeros_like(x).detach(), y, i, rows)

        def upper(self, x: Tensor, y: Sequence[Tensor], i: int, rows: Tensor) -> Tensor:
            return y[0].square().sum()

    got = solved(Apart(0), torch.ones(2, dtype=FP64), replace(FULL, version=version, steps=3, eta=1.0))
    assert not bool(got.slope.any())
    assert torch.equal(got.x, torch.ones(2, dtype=FP64))
