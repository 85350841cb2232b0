"""The family armor: settings within the limit, the pattern in the operator, refusals with numbers; N:M weights as they are found."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.algebra import BlockDiagonal, Compose, Sparse
from rewriter.errors import RewriteError
from rewriter.moments import isotropic
from rewriter.operator import AbstractMatrix
from rewriter.passes.solvers import pruning
from rewriter.passes.solvers.armor import Pattern, armor
from rewriter.passes.solvers.armor_adam import armor_adam
from rewriter.passes.structures import armor as family
from rewriter.passes.structures.armor import ArmorStructure, armored
from rewriter.passes.structures.nm_sparse import NmSparseStructure
from rewriter.registry import eager_ops, parse_passes
from rewriter.structure import AbstractStructure, Fitted, NoMatch
from rewriter.tolerances import EQUAL, EXACT

from .inputs import anisotropic, decaying, generator

FP32 = EXACT[torch.float32]
PATTERNS = [Pattern(), Pattern(1, 4), Pattern(4, 8), Pattern(2, 4, shared=3)]
patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@pytest.fixture(autouse=True)
def few_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here holds after any number of them."""
    few = {"exact": functools.partial(armor, sweeps=3), "adam": functools.partial(armor_adam, steps=5)}
    assert few.keys() == family.SOLVERS.keys()
    monkeypatch.setattr(family, "SOLVERS", few)


def fit(structure: AbstractStructure, weight: Tensor, limit: int) -> Fitted:
    found = structure.fit(weight, anisotropic(weight.shape[1]), limit, generator(0))
    assert isinstance(found, Fitted), found
    return found


def core(operator: AbstractMatrix) -> Sparse:
    assert isinstance(operator, Compose)
    first, middle, last = operator.factors
    assert isinstance(first, BlockDiagonal) and isinstance(middle, Sparse) and isinstance(last, BlockDiagonal)
    return middle


@patterns
def test_the_operator_is_the_solvers_product(pattern: Pattern) -> None:
    weight, moments = decaying(48, 72), anisotropic(72)
    found = armor(weight, moments.second.diagonal(), 24, pattern, generator(0), 2)
    operator = armored(found, pattern)
    assert operator.shape == (48, 72)
    torch.testing.assert_close(operator.dense(), found.dense())
    x = torch.randn(2, 3, 72, generator=generator(1))
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(operator.to(torch.float32).product(eager_ops(), x), x @ found.dense().float().T, rtol=rtol, atol=atol)


@pytest.mark.parametrize("solver", ["exact", "adam"])
@patterns
def test_the_pattern_holds_in_what_is_emitted(pattern: Pattern, solver: str) -> None:
    found = fit(ArmorStructure(24, pattern.n, pattern.m, pattern.shared, solver), decaying(48, 72), 2 * 48 * 72)
    kept = core(found.operator).dense() != 0
    groups = kept.reshape(48 // pattern.shared, pattern.shared, 72 // pattern.m, pattern.m)
    assert int(groups.sum(-1).max()) == pattern.n
    assert torch.equal(groups.any(1, keepdim=True).expand(groups.shape), groups)  # neighbouring rows share their positions
    assert core(found.operator).positions.shape[1] == 48 // pattern.shared


@settings(max_examples=40, deadline=None, derandomize=True)
@given(high=st.integers(1, 6), wide=st.integers(1, 6), unit=st.integers(1, 3), percent=st.integers(40, 100))
def test_settings_that_are_left_open_are_the_largest_within_the_limit(high: int, wide: int, unit: int, percent: int) -> None:
    m, n = high * 4 * unit, wide * 4 * unit
    limit = m * n * percent // 100
    answer = ArmorStructure().fit(decaying(m, n), isotropic(n), limit, generator(0))
    blocks = [b for b in range(4, min(m, n) + 1, 4) if m % b == 0 and n % b == 0]
    costs = {b: m * n // 2 + (m + n) * b for b in blocks}
    within = [b for b in blocks if costs[b] <= limit]
    if not within:
        assert isinstance(answer, NoMatch)
        assert re.search(rf"\b{costs[4]} numbers, the limit is {limit}\b", answer.reason)
        return
    assert isinstance(answer, Fitted)
    assert answer.spelling == f"armor:block={max(within)}:n=2:m=4"
    assert answer.operator.cost().params == costs[max(within)]
    (again,) = parse_passes(answer.spelling)
    assert again.spelling() == answer.spelling


@pytest.mark.parametrize("solver", ["exact", "adam"])
def test_the_error_is_that_of_all_moments_and_below_its_start(solver: str) -> None:
    weight, moments = decaying(48, 72), isotropic(72)
    found = ArmorStructure(24, solver=solver).fit(weight, moments, 2 * weight.numel(), generator(0))
    assert isinstance(found, Fitted)
    assert found.weighted_error == pytest.approx(moments.error(weight, found.operator.dense()), rel=FP32)
    start = pruning.nowag(weight, moments.second.diagonal(), 2, 4)
    assert found.weighted_error < moments.error(weight, start)


def test_the_same_seed_gives_the_same_bytes() -> None:
    weight = decaying(48, 72)
    first, second = (fit(ArmorStructure(), weight, weight.numel()).operator.dense() for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("structure", "shape", "limit", "reason"),
    [
        (ArmorStructure(), (48, 70), 3000, "a 48 x 70 weight has no block that divides both sides and is a multiple of 4"),
        (ArmorStructure(shared=3), (48, 64), 3000, "a 48 x 64 weight has no block that divides both sides and is a multiple of 12"),
        (ArmorStructure(16), (48, 72), 3000, "a 48 x 72 weight has no block of 16 that divides both sides and is a multiple of 4"),
        (ArmorStructure(24), (48, 72), 3000, "armor:block=24:n=2:m=4 stores 4608 numbers, the limit is 3000"),
        (ArmorStructure(n=4), (48, 72), 3000, "4:4 keeps no part of a group; give 0 < n < m"),
        (ArmorStructure(m=512), (512, 512), 200_000, "groups of 512: positions in 2 to 256 can be packed; take smaller groups"),
        (ArmorStructure(m=16), (48, 64), 3000, "8:16 has 12,870 supports, 1,000 can be tried; take smaller groups"),
        (NmSparseStructure(3), (48, 64), 2000, "nm-sparse:n=3:m=4 stores 2304 numbers, the limit is 2000; give at most 2"),
        (NmSparseStructure(8, 8), (48, 64), 3000, "8:8 keeps no part of a group; give 0 < n < m"),
        (NmSparseStructure(8, 512), (48, 64), 3000, "groups of 512: positions in 2 to 256 can be packed; take smaller groups"),
    ],
)  # fmt: skip
def test_refusals(structure: AbstractStructure, shape: tuple[int, int], limit: int, reason: str) -> None:
    answer = structure.fit(decaying(*shape), isotropic(shape[1]), limit, generator(0))
    assert isinstance(answer, NoMatch)
    assert answer.reason == reason
    if isinstance(structure, ArmorStructure):  # nor is a fit begun
        assert not structure.promising(decaying(*shape), isotropic(shape[1]), limit, 10.0)


@pytest.mark.parametrize("structure", [ArmorStructure(), NmSparseStructure()])
def test_weights_without_answer_are_refused_in_words(structure: AbstractStructure) -> None:
    weight = torch.ones(8, 12)
    weight[3, 4] = float("nan")
    for answer in (structure.discover(weight), structure.fit(weight, isotropic(12), 96, generator(0))):
        assert isinstance(answer, NoMatch) and "NaN" in answer.reason


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(RewriteError, match="armor:solver=newton is unknown; give exact or adam"):
        parse_passes("armor:solver=newton")


def test_what_is_stored_where_no_limit_is_given() -> None:
    assert ArmorStructure().share == ArmorStructure(solver="adam").share == 0.5625
    assert ArmorStructure(n=1, m=4).share == 0.3125
    assert ArmorStructure(16).share == NmSparseStructure(n=1).share == 1.0
    assert NmSparseStructure().share == NmSparseStructure(m=8).share == 0.5
    kinds = AbstractStructure.kinds
    assert kinds["low-rank"]().share == 0.5
    assert kinds["low-rank"](rank=3).share == 1.0  # type: ignore[call-arg]


def test_a_fit_is_promised_where_it_may_win() -> None:
    """True where it does win, False where the start is hopeless or nothing fits."""
    weight, moments = decaying(48, 72), isotropic(72)
    reached = ArmorStructure().fit(weight, moments, weight.numel(), generator(0))
    assert isinstance(reached, Fitted)
    assert ArmorStructure().promising(weight, moments, weight.numel(), 1.001 * reached.weighted_error)
    assert not ArmorStructure().promising(weight, moments, weight.numel(), reached.weighted_error / 100)
    assert not ArmorStructure().promising(weight, moments, weight.numel() // 2, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 8), (1, 16)])
def test_sparse_weights_are_found(n: int, m: int, dtype: torch.dtype) -> None:
    weight = torch.randn(30, 64, generator=generator(0))
    weight = pruning.magnitude(weight, n, m).to(dtype)
    for structure in (NmSparseStructure(), ArmorStructure()):
        found = structure.discover(weight)
        assert isinstance(found, Fitted)
        assert found.spelling == f"nm-sparse:n={n}:m={m}"  # the identities that would wrap it are left out
        assert torch.equal(found.operator.to(dtype).dense(), weight)
        assert found.operator.cost().params == 30 * 64 * n // m
    assert isinstance(replace(NmSparseStructure(), n=n, m=m).discover(weight), Fitted)
    assert isinstance(NmSparseStructure(n=n, m=2 * m).discover(weight), NoMatch)


@pytest.mark.parametrize("solver", ["exact", "adam"])
def test_what_inputs_tell_of_one_another_is_won_back(solver: str) -> None:
    """The solver sees variances alone; the fit is nearer under all moments."""
    weight, moments = decaying(48, 72), anisotropic(72)
    found = ArmorStructure(24, solver=solver).fit(weight, moments, 2 * weight.numel(), generator(0))
    alone = family.SOLVERS[solver](weight, moments.second.diagonal(), 24, Pattern(), generator(0))
    assert isinstance(found, Fitted)
    assert found.weighted_error < moments.error(weight, alone.dense())


def test_pruning_fits_by_sparsegpt() -> None:
    weight, moments = decaying(48, 64), anisotropic(64)
    found = NmSparseStructure().fit(weight, moments, 48 * 32, generator(0))
    assert isinstance(found, Fitted)
    pruned = pruning.sparsegpt(weight, moments.second, 2, 4)
    assert torch.equal(found.operator.dense() != 0, pruned != 0)
    assert (
        found.weighted_error < moments.error(weight, pruned) < moments.error(weight, pruning.wanda(weight, moments.second.diagonal(), 2, 4))
    )
