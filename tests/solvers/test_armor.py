"""ARMOR never loses to its start, counts its loss truly and keeps its pattern; pruning rules against their formulas."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.passes.solvers import armor as solver
from rewriter.passes.solvers import pruning
from rewriter.passes.solvers.armor import ArmorProblem, Pattern, Wrapped, _Moves, armor, draw, wrapped
from rewriter.passes.solvers.armor_adam import armor_adam
from rewriter.passes.solvers.pruning import Normalised
from rewriter.tolerances import EQUAL

ROWS, COLUMNS, BLOCK = 24, 16, 8
RTOL, ATOL = EQUAL[torch.float64]
DRAWS = 0.05  # of the loss: what other masks make of it, drawn after other rounding
PATTERNS = [Pattern(), Pattern(1, 4), Pattern(4, 8), Pattern(2, 4, shared=4)]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight with rows and columns of many scales, and second moments (columns, columns)."""
    weight = torch.randn(ROWS, COLUMNS, generator=rng(seed), dtype=torch.float64)
    weight = weight * torch.linspace(0.1, 2, ROWS)[:, None] * torch.linspace(3, 0.2, COLUMNS)
    x = torch.randn(200, COLUMNS, generator=rng(seed + 1), dtype=torch.float64) * torch.linspace(0.5, 4, COLUMNS)
    x = x + 0.7 * x.roll(1, 1)
    return weight, x.T @ x / 200


def loss(weight: Tensor, approximation: Tensor, diagonal: Tensor) -> float:
    """The proxy: relative to rows and columns of norm 1."""
    scales = Normalised.of(weight)
    gap = (weight - approximation) / torch.outer(scales.rows, scales.columns)
    return float((gap.square() * diagonal).sum())


def fitted(pattern: Pattern, sweeps: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Wrapped]:
    weight, second = case()
    return weight, second.diagonal(), armor(weight, second.diagonal(), BLOCK, pattern, rng(seed), sweeps, gain=0.0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_loss_falls_and_is_true(pattern: Pattern) -> None:
    weight, diagonal, found = fitted(pattern)
    assert all(b <= a for a, b in itertools.pairwise(found.losses))
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert loss(weight, found.dense(), diagonal) == pytest.approx(found.losses[-1], rel=EQUAL[torch.float64][0])


def test_single_precision_costs_nothing_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, diagonal, exact = fitted(Pattern())
    monkeypatch.setattr(solver, "FP64_WORK", 0)
    _, _, single = fitted(Pattern())
    assert single.core.dtype == torch.float32 and all(b <= a for a, b in itertools.pairwise(single.losses))
    rounding = EQUAL[torch.float32][0] * single.losses[0]
    assert loss(weight, single.dense().double(), diagonal) == pytest.approx(single.losses[-1], abs=rounding)
    assert single.losses[-1] == pytest.approx(exact.losses[-1], rel=DRAWS)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_pattern_is_kept(pattern: Pattern) -> None:
    _, _, found = fitted(pattern)
    groups = (found.core != 0).reshape(ROWS // pattern.shared, pattern.shared, COLUMNS // pattern.m, pattern.m)
    assert int(groups.any(1).sum(-1).max()) == pattern.n  # the rows of a group share their columns


@pytest.mark.parametrize("seed", range(3))
def test_without_an_iteration_it_is_nowag(seed: int) -> None:
    weight, second = case(seed)
    found = armor(weight, second.diagonal(), BLOCK, Pattern(), rng(), sweeps=0)
    pruned = pruning.nowag(weight, second.diagonal(), 2, 4)
    torch.testing.assert_close(found.dense(), pruned)
    assert found.losses == (pytest.approx(loss(weight, pruned, second.diagonal())),)
    further = armor(weight, second.diagonal(), BLOCK, Pattern(), rng(), sweeps=3)
    assert further.losses[-1] <= found.losses[0]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_kind_of_move_changes_the_loss_by_what_it_says(pattern: Pattern) -> None:
    weight, second = case()
    fit, generator = ArmorProblem(Normalised.of(weight), second.diagonal(), BLOCK, pattern), rng()
    for block in ["left", "groups", "values", "right", "groups", "groups", "values", "left", "groups"]:
        chosen = draw(fit, generator) if block == "groups" else block
        move, before = _Moves().propose(fit, chosen), fit.value()
        fit.apply(chosen, move)
        assert fit.value() - before == pytest.approx(move.change, rel=RTOL, abs=ATOL) and move.change <= 0
        assert bool((fit.core[~fit.mask] == 0).all())
        torch.testing.assert_close(fit.gradient, wrapped(fit.left.mT, fit.residual() * fit.weights, fit.right.mT))


def test_masks_move() -> None:
    """With identity wrappers the start's mask is the best one; behind others it is not, and groups change."""
    weight, second = case()
    start = armor(weight, second.diagonal(), BLOCK, Pattern(), rng(), sweeps=0)
    end = armor(weight, second.diagonal(), BLOCK, Pattern(), rng(), sweeps=30, gain=0.0)
    assert bool(((start.core != 0) != (end.core != 0)).any())


def test_a_drawn_group_follows_the_gradient() -> None:
    weight, second = case()
    fit = ArmorProblem(Normalised.of(weight), second.diagonal(), BLOCK, Pattern())
    fit.gradient = torch.zeros_like(fit.gradient)
    fit.gradient[BLOCK + 3, BLOCK + 5] = 1.0  # in the tile of row 1 and column 1: row 3, second group of its row
    drawn = draw(fit, rng())
    assert int(drawn[COLUMNS // BLOCK + 1]) == 3 * (BLOCK // 4) + 1


def test_wrapping_is_a_product_with_block_diagonal_matrices() -> None:
    left, core, right = (torch.randn(*shape, generator=rng(i)) for i, shape in enumerate(((3, 4, 4), (12, 8), (2, 4, 4))))
    torch.testing.assert_close(wrapped(left, core, right), torch.block_diag(*left) @ core @ torch.block_diag(*right))


def test_wrappers_that_were_planted_are_approached() -> None:
    """A weight that is such a product: most of the start's loss goes."""
    _, second = case()
    core = torch.randn(ROWS, COLUMNS, generator=rng(3), dtype=torch.float64)
    core = core * pruning.kept(core.abs(), 2, 4)
    left, right = (
        torch.eye(BLOCK) + 0.3 * torch.randn(k, BLOCK, BLOCK, generator=rng(4), dtype=torch.float64)
        for k in (ROWS // BLOCK, COLUMNS // BLOCK)
    )
    weight = replace(fitted(Pattern(), 0)[2], left=left, core=core, right=right).dense()
    found = armor(weight, second.diagonal(), BLOCK, Pattern(), rng(), sweeps=300, gain=0.0)
    assert found.losses[-1] < 0.02 * found.losses[0]


def test_the_same_seed_gives_the_same_factors_and_another_does_not() -> None:
    (_, _, a), (_, _, b), (_, _, c) = fitted(Pattern(), seed=0), fitted(Pattern(), seed=0), fitted(Pattern(), seed=1)
    assert torch.equal(a.core, b.core) and torch.equal(a.left, b.left) and not torch.equal(a.core, c.core)


def test_dead_rows_columns_and_inputs_stay_finite() -> None:
    weight, second = case()
    weight[3], weight[:, 5] = 0, 0
    diagonal = second.diagonal().clone()
    diagonal[8:] = 0
    found = armor(weight, diagonal, BLOCK, Pattern(), rng(), sweeps=5)
    assert bool(found.dense().isfinite().all()) and not bool(found.dense()[3].any())
    assert found.losses[-1] <= found.losses[0]


@pytest.mark.parametrize(("block", "pattern"), [(7, Pattern()), (8, Pattern(2, 3)), (8, Pattern(2, 4, shared=3))])
def test_blocks_that_do_not_divide_are_refused(block: int, pattern: Pattern) -> None:
    with pytest.raises(ValueError, match="has to divide both sides"):
        armor(*map(torch.Tensor.clone, (case()[0], case()[1].diagonal())), block, pattern, rng())


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 8)])
def test_pruning_keeps_the_largest_of_every_group(n: int, m: int) -> None:
    weight, second = case()
    scores = {
        "magnitude": (weight.abs(), pruning.magnitude(weight, n, m)),
        "wanda": (weight.abs() * second.diagonal().sqrt(), pruning.wanda(weight, second.diagonal(), n, m)),
    }
    for score, pruned in scores.values():
        for row in range(ROWS):
            for begin in range(0, COLUMNS, m):
                best = sorted(range(m), key=lambda k: -float(score[row, begin + k]))[:n]
                left_in = pruned[row, begin : begin + m].nonzero().flatten().tolist()
                assert left_in == sorted(best)
        assert bool(((pruned == 0) | (pruned == weight)).all())


def test_normalising_gives_the_weight_back() -> None:
    weight, _ = case()
    parts = Normalised.of(weight)
    torch.testing.assert_close(parts.rows[:, None] * parts.core * parts.columns, weight)
    torch.testing.assert_close(parts.core.norm(dim=1), torch.ones(ROWS, dtype=torch.float64))


def weighted(weight: Tensor, pruned: Tensor, second: Tensor) -> float:
    gap = weight - pruned
    return float(((gap @ second) * gap).sum())


def test_sparsegpt_is_wanda_where_inputs_are_uncorrelated() -> None:
    weight, second = case()
    second = second.diagonal().diag()
    damped = second.diagonal() + pruning.DAMPING * second.diagonal().mean()
    torch.testing.assert_close(pruning.sparsegpt(weight, second, 2, 4), pruning.wanda(weight, damped, 2, 4))


@pytest.mark.parametrize("seed", range(4))
def test_what_makes_up_for_the_lost_is_nearer(seed: int) -> None:
    weight, second = case(seed)
    errors = {
        "magnitude": weighted(weight, pruning.magnitude(weight, 2, 4), second),
        "wanda": weighted(weight, pruning.wanda(weight, second.diagonal(), 2, 4), second),
        "sparsegpt": weighted(weight, pruning.sparsegpt(weight, second, 2, 4), second),
    }
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_sparsegpt_is_exact_for_its_last_group() -> None:
    """Given the mask, columns to the right of a group are the best that there are: with one column pruned, all of them."""
    weight, second = case()
    wide = torch.cat([weight[:, :1] / 1000, weight[:, 1:]], 1)[:, :4]
    second = second[:4, :4]
    pruned = pruning.sparsegpt(wide, second, 3, 4)
    first = pruned[:, 0] == 0  # rows that lost their first column
    assert int(first.sum()) > ROWS // 2
    damped = second + pruning.DAMPING * second.diagonal().mean() * torch.eye(4)
    best = wide[:, 1:] + wide[:, :1] @ damped[:1, 1:] @ torch.linalg.inv(damped[1:, 1:])
    torch.testing.assert_close(pruned[first, 1:], best[first], rtol=RTOL, atol=ATOL)


def test_columns_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="2:5 of 16 columns"):
        pruning.magnitude(case()[0], 2, 5)


SOLVERS = {"exact": functools.partial(armor, sweeps=4), "adam": functools.partial(armor_adam, steps=6, rate=0.02)}
every_solver = pytest.mark.parametrize("solver", SOLVERS)


@every_solver
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)), pattern=st.sampled_from([*PATTERNS, Pattern(1, 2), Pattern(3, 4, shared=2)]),
    wide=st.integers(1, 2), seed=st.integers(0, 9),
)  # fmt: skip
def test_no_solver_exceeds_nowag(solver: str, shape: tuple[int, int], pattern: Pattern, wide: int, seed: int) -> None:
    """The law of the paper's Theorem 3.1, for every shape, block and pattern; the last loss is that of the factors given back."""
    block = math.lcm(pattern.m, pattern.shared) * wide
    weight = torch.randn(shape[0] * block, shape[1] * block, generator=rng(seed), dtype=torch.float64)
    diagonal = torch.rand(weight.shape[1], generator=rng(seed + 1), dtype=torch.float64)
    found = SOLVERS[solver](weight, diagonal, block, pattern, rng(seed))
    start = armor(weight, diagonal, block, pattern, rng(seed), sweeps=0)
    assert found.losses[0] == pytest.approx(start.losses[0], rel=RTOL)
    if pattern.shared == 1:
        pruned = pruning.nowag(weight, diagonal, pattern.n, pattern.m)
        assert loss(weight, found.dense(), diagonal) <= loss(weight, pruned, diagonal) * (1 + RTOL) + ATOL
    assert all(b <= a for a, b in itertools.pairwise(found.losses))
    assert loss(weight, found.dense(), diagonal) == pytest.approx(found.losses[-1], rel=RTOL, abs=ATOL)
    groups = (found.core != 0).unflatten(0, (-1, pattern.shared)).unflatten(2, (-1, pattern.m))
    assert int(groups.any(1).sum(-1).max()) <= pattern.n


def test_adam_descends_and_moves_masks() -> None:
    weight, second = case()
    found = armor_adam(weight, second.diagonal(), BLOCK, Pattern(), rng(), steps=200, rate=5e-3)
    start = armor(weight, second.diagonal(), BLOCK, Pattern(), rng(), sweeps=0)
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert bool(((start.core != 0) != (found.core != 0)).any())


def test_adam_that_only_rises_gives_its_start_back() -> None:
    weight, second = case()
    found = armor_adam(weight, second.diagonal(), BLOCK, Pattern(), rng(), steps=3, rate=100.0)
    torch.testing.assert_close(found.dense(), pruning.nowag(weight, second.diagonal(), 2, 4))
    assert found.losses == (found.losses[0],) * 4


def test_adam_of_nothing_stays_finite() -> None:
    found = armor_adam(torch.zeros(ROWS, COLUMNS), torch.zeros(COLUMNS), BLOCK, Pattern(), rng(), steps=2)
    assert not bool(found.dense().any())
