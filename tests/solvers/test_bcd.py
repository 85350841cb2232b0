"""Block coordinate descent: laws of the engine, its problems, selections and updates; other solvers as oracles."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import scipy.optimize
import torch
from torch import Tensor

from rewriter.passes.solvers.bcd import partition
from rewriter.passes.solvers.bcd.engine import AbstractProblem, AbstractSelection, AbstractUpdate, Result, Stage, Stop, minimise
from rewriter.passes.solvers.bcd.selection import Custom, Cyclic, Greedy, Permuted, Random, Top
from rewriter.passes.solvers.bcd.smooth import AbstractSmooth, LeastSquares, Logistic, Quadratic
from rewriter.passes.solvers.bcd.update import PCG, Gradient, Newton, TwoMetric
from rewriter.tolerances import CONVERGED, EQUAL, EXACT

ROWS, SIZE, BLOCK = 30, 20, 4
RTOL, ATOL = EQUAL[torch.float64]
REACHED, ROUNDING = CONVERGED[torch.float64], EXACT[torch.float64]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def least_squares(**options: float) -> LeastSquares:
    return LeastSquares(normal(ROWS, SIZE) * torch.linspace(0.2, 3, SIZE), normal(ROWS, seed=1), **options)


def logistic() -> Logistic:
    return Logistic(normal(ROWS, SIZE), normal(ROWS, seed=1).sign(), ridge=0.1)


def quadratic() -> Quadratic:
    a = normal(ROWS, SIZE)
    return Quadratic(a.T @ a / ROWS + 0.1 * torch.eye(SIZE), normal(SIZE, seed=1))


PROBLEMS: dict[str, Callable[[], AbstractSmooth]] = {"least squares": least_squares, "logistic": logistic, "quadratic": quadratic}
FIXED = partition.in_order(SIZE, BLOCK)
SELECTIONS: dict[str, AbstractSelection[Tensor]] = {
    "cyclic": Cyclic(FIXED),
    "permuted": Permuted(FIXED),
    "random": Random(FIXED),
    "by weight": Random(FIXED, torch.arange(1.0, len(FIXED) + 1)),
    **{f"greedy {score}": Greedy(FIXED, score) for score in ("gs", "gsl", "gsd", "gsq")},
    **{f"top {score}": Top(BLOCK, score) for score in ("gs", "gsl", "gsd", "gsq")},
}
UPDATES: dict[str, AbstractUpdate[Tensor, Tensor]] = {
    "gradient": Gradient(),
    "search": Gradient(search=True),
    "newton": Newton(),
    "matrix": Newton(bound=True),
    "pcg": PCG(2),
    "two metrics": TwoMetric(),
}


def run(
    problem: AbstractSmooth, select: AbstractSelection[Tensor], update: AbstractUpdate[Tensor, Tensor], steps: int, seed: int = 0
) -> Result:
    return minimise(problem, [Stage("only", select, update)], Stop(steps), rng(seed))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_change_is_what_the_value_changes_by(problem: str) -> None:
    f = PROBLEMS[problem]()
    for seed, block in enumerate(FIXED):
        move = normal(BLOCK, seed=seed)
        before, said = f.value(), f.change(block, move)
        f.apply(block, move)
        assert f.value() - before == pytest.approx(said, rel=RTOL, abs=ATOL)
        torch.testing.assert_close(f.slope(block), f.gradient()[block])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradients_and_hessians_are_those_of_autograd(problem: str) -> None:
    f = PROBLEMS[problem]()
    f.apply(torch.arange(SIZE), normal(SIZE))
    at = f.x.clone()

    def value(x: Tensor) -> Tensor:
        if isinstance(f, Quadratic):
            return x @ f.h @ x / 2 - f.c @ x
        assert isinstance(f, LeastSquares | Logistic)
        return f.losses(f.a @ x).sum() + f.ridge / 2 * x.square().sum()

    whole = torch.autograd.functional.hessian(value, at)
    torch.testing.assert_close(torch.autograd.functional.jacobian(value, at), f.gradient())
    torch.testing.assert_close(whole[FIXED[1]][:, FIXED[1]], f.hessian(FIXED[1]))
    gap = f.curvature(FIXED[1]) - f.hessian(FIXED[1])
    assert float(torch.linalg.eigvalsh(gap)[0]) >= -ATOL
    torch.testing.assert_close(f.diagonal[FIXED[1]], f.curvature(FIXED[1]).diagonal())
    torch.testing.assert_close(f.times(torch.eye(SIZE, dtype=torch.float64)[3])[FIXED[0]], f.curvature(FIXED[0])[:, 3])


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("select", SELECTIONS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_rule_descends_on_every_problem(problem: str, select: str, update: str) -> None:
    f = PROBLEMS[problem]()
    found = run(f, SELECTIONS[select], UPDATES[update], 30)
    assert all(b <= a for a, b in itertools.pairwise(found.values))
    assert found.value == pytest.approx(f.value(), rel=RTOL, abs=ATOL)
    whole = PROBLEMS[problem]()
    best = run(whole, Cyclic([torch.arange(SIZE)]), Newton(), 30).value
    assert found.value - best < 0.4 * (found.values[0] - best)
    again = run(PROBLEMS[problem](), SELECTIONS[select], UPDATES[update], 30)
    assert again.values == found.values


@pytest.mark.parametrize("update", ["newton", "pcg", "two metrics"])
def test_logistic_regression_reaches_scipys_optimum(update: str) -> None:
    f = logistic()
    found = run(f, Top(BLOCK), UPDATES[update], 400)

    def value(x: Any) -> float:
        return float(f.losses(f.a @ torch.from_numpy(x)).sum() + f.ridge / 2 * (x @ x))

    oracle = scipy.optimize.minimize(value, torch.zeros(SIZE, dtype=torch.float64).numpy(), tol=ROUNDING)
    assert found.value == pytest.approx(oracle.fun, rel=REACHED)


@pytest.mark.parametrize(("update", "steps"), [("gradient", 3000), ("search", 1000), ("two metrics", 100)])
def test_bounds_are_kept_and_nonnegative_least_squares_is_scipys(update: str, steps: int) -> None:
    f = least_squares(lower=0.0)
    found = run(f, Top(BLOCK), UPDATES[update], steps)
    oracle, _ = scipy.optimize.nnls(f.a.numpy(), f.b.numpy())
    assert bool((f.x >= 0).all())
    assert found.value == pytest.approx(float(f.losses(f.a @ torch.from_numpy(oracle)).sum()), rel=REACHED)
    assert found.ended in ("stuck", "iterations")


def test_an_l1_term_on_nonnegative_numbers_is_the_lasso() -> None:
    f = least_squares(lower=0.0, l1=3.0)
    run(f, Top(BLOCK), TwoMetric(), 300)
    slope = f.gradient()
    assert 0 < int((f.x == 0).sum()) < SIZE
    assert float(slope[f.x > 0].abs().max()) < REACHED and bool((slope[f.x == 0] >= -REACHED).all())  # optimality


class Away(AbstractUpdate[Tensor, Tensor]):
    """A move that makes f larger, or NaN."""

    def __init__(self, by: float) -> None:
        self.by = by

    def propose(self, problem: AbstractProblem[Tensor, Tensor], block: Tensor) -> Tensor:
        assert isinstance(problem, AbstractSmooth)
        return problem.slope(block) * self.by


@pytest.mark.parametrize("by", [1.0, float("nan")])
def test_a_move_that_does_not_descend_is_not_taken(by: float) -> None:
    f = quadratic()
    found = run(f, Cyclic(FIXED), Away(by), 3)
    assert not any(step.taken for step in found.trace) and len(set(found.values)) == 1
    assert not bool(f.x.any())


def test_stages_take_turns_and_the_trace_says_what_each_did() -> None:
    f = quadratic()
    program = [Stage("rough", Cyclic(FIXED), Gradient(), 2), Stage("fine", Top(BLOCK), Newton())]
    found = minimise(f, program, Stop(3), rng())
    assert [step.stage for step in found.trace] == ["rough", "rough", "fine"] * 3
    assert found.values[0] + sum(step.change for step in found.trace if step.taken) == pytest.approx(found.value)
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(found.trace))


def test_how_a_descent_ended_is_said() -> None:
    def ended(stop: Stop, select: AbstractSelection[Tensor] | None = None) -> str:
        return minimise(quadratic(), [Stage("", select or Cyclic(FIXED), Newton())], stop, rng()).ended

    assert ended(Stop(3)) == "iterations"
    assert ended(Stop(1000, rtol=ROUNDING, patience=len(FIXED))) == "settled"
    assert ended(Stop(1000, value=-0.1)) == "reached"
    assert ended(Stop(1000, seconds=0.0)) == "seconds"
    assert ended(Stop(1000), Custom(lambda problem, generator: None)) == "stuck"
    assert ended(Stop(1000), Top(SIZE)) in ("stuck", "iterations")
    with pytest.raises(ValueError, match="at least one stage"):
        minimise(quadratic(), [], Stop(), rng())


def test_patience_waits_for_flat_iterations_in_a_row() -> None:
    flat = minimise(quadratic(), [Stage("", Cyclic(FIXED), Away(1.0))], Stop(100, rtol=ROUNDING, patience=5), rng())
    assert flat.ended == "settled" and len(flat.values) == 6


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_gradient_step_falls_as_its_bound_promises(problem: str) -> None:
    for update in (Gradient(), Gradient(search=True)):
        f = PROBLEMS[problem]()
        g = f.slope(FIXED[2])
        largest = float(torch.linalg.eigvalsh(f.curvature(FIXED[2]))[-1])
        assert f.change(FIXED[2], update.propose(f, FIXED[2])) <= -float(g @ g) / (4 * largest)


@pytest.mark.parametrize("update", [Newton(), PCG(BLOCK)], ids=["newton", "pcg"])
def test_an_exact_update_leaves_a_block_no_slope(update: AbstractUpdate[Tensor, Tensor]) -> None:
    f = least_squares()
    f.apply(FIXED[1], update.propose(f, FIXED[1]))
    torch.testing.assert_close(f.slope(FIXED[1]), torch.zeros(BLOCK, dtype=torch.float64), rtol=RTOL, atol=ATOL)


def test_a_singular_block_still_moves() -> None:
    a = normal(ROWS, SIZE)
    a[:, 1] = a[:, 0]
    f = LeastSquares(a, normal(ROWS, seed=1))
    assert f.change(FIXED[0], Newton().propose(f, FIXED[0])) < 0


@pytest.mark.parametrize("update", [Newton(), PCG(BLOCK)], ids=["newton", "pcg"])
@pytest.mark.parametrize("selection", [name for name in SELECTIONS if name.startswith(("greedy", "top"))])
def test_columns_of_zeros_are_in_nobodys_way(selection: str, update: AbstractUpdate[Tensor, Tensor]) -> None:
    """Every greedy rule comes to the minimum of the other columns."""
    a, b = normal(ROWS, SIZE), normal(ROWS, seed=1)
    a[:, :5] = 0
    left = b - a @ (torch.linalg.pinv(a) @ b)
    least = float(left @ left) / 2
    for f, goal in ((LeastSquares(a, b), least), (Quadratic(a.T @ a, a.T @ b), least - float(b @ b) / 2)):
        found = minimise(f, [Stage("solve", SELECTIONS[selection], update)], Stop(400), rng())
        assert found.values[-1] == pytest.approx(goal, rel=REACHED)
        assert not f.x[:5].any()


def test_a_problem_of_ones_own_needs_three_methods() -> None:
    """Blocks by name, moves of any kind: alternating least squares of a rank 1 matrix."""

    class RankOne(AbstractProblem[str, Tensor]):
        def __init__(self) -> None:
            self.target = normal(6, 5)
            self.parts: dict[str, Tensor] = {"u": normal(6, seed=1), "v": normal(5, seed=2)}

        def loss(self, **other: Tensor) -> float:
            parts = {**self.parts, **other}
            return float((self.target - torch.outer(parts["u"], parts["v"])).square().sum())

        def value(self) -> float:
            return self.loss()

        def change(self, block: str, move: Tensor) -> float:
            return self.loss(**{block: move}) - self.loss()

        def apply(self, block: str, move: Tensor) -> None:
            self.parts[block] = move

    class Alternate(AbstractUpdate[str, Tensor]):
        def propose(self, problem: AbstractProblem[str, Tensor], block: str) -> Tensor:
            assert isinstance(problem, RankOne)
            u, v, m = problem.parts["u"], problem.parts["v"], problem.target
            return m @ v / (v @ v) if block == "u" else m.T @ u / (u @ u)

    problem = RankOne()
    program: list[Stage[str, Any]] = [Stage("als", Cyclic(["u", "v"]), Alternate(), 2)]
    found = minimise(problem, program, Stop(200, rtol=ROUNDING), rng())
    assert found.ended == "settled"
    assert found.value == pytest.approx(float(torch.linalg.svdvals(problem.target)[1:].square().sum()), rel=REACHED)
