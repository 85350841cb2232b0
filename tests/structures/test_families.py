"""What is special to each family: oracles, orderings, layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewriter.algebra import BlockDiagonal, Compose, Permutation
from rewriter.moments import isotropic
from rewriter.passes.solvers.pivoting import BOUND
from rewriter.passes.structures.block_dense import BlockDenseStructure
from rewriter.passes.structures.block_diagonal import BlockDiagonalStructure, UnequalBlocks
from rewriter.passes.structures.block_shuffle import BlockShuffleStructure
from rewriter.passes.structures.householder import HouseholderStructure
from rewriter.passes.structures.low_rank import LowRank, LowRankStructure
from rewriter.passes.structures.monarch import Monarch, MonarchStructure
from rewriter.passes.structures.pivoted_low_rank import PivotedLowRank, PivotedLowRankStructure
from rewriter.registry import eager_ops
from rewriter.structure import AbstractStructure, Fitted, NoMatch
from rewriter.tolerances import EQUAL, EXACT

from .inputs import anisotropic, decaying, generator

FP32 = EXACT[torch.float32]


def fit(structure: AbstractStructure, weight: Tensor, moments: object, limit: int) -> Fitted:
    answer = structure.fit(weight, moments, limit, generator(0))  # type: ignore[arg-type]
    assert isinstance(answer, Fitted), answer
    return answer


def found(structure: AbstractStructure, weight: Tensor) -> Fitted:
    answer = structure.discover(weight)
    assert isinstance(answer, Fitted), answer
    assert torch.linalg.norm(answer.operator.dense() - weight) <= FP32 * torch.linalg.norm(weight)
    assert answer.operator.cost().params < weight.numel()
    return answer


def test_low_rank_is_the_weighted_optimum() -> None:
    """Against the textbook route: SVD of W H^1/2, truncated, times H^-1/2."""
    for shape in ((40, 60), (60, 40)):
        weight, moments = decaying(*shape), anisotropic(shape[1])
        values, vectors = torch.linalg.eigh(moments.second)
        root, inverse = ((vectors * values**p) @ vectors.T for p in (0.5, -0.5))
        u, s, v = torch.linalg.svd(weight.double() @ root)
        best = (u[:, :9] * s[:9]) @ v[:9] @ inverse
        got = fit(LowRankStructure(rank=9), weight, moments, weight.numel())
        assert got.weighted_error == pytest.approx(moments.error(weight, best), rel=FP32)
        plain_u, plain_s, plain_v = torch.linalg.svd(weight)
        assert got.weighted_error < moments.error(weight, (plain_u[:, :9] * plain_s[:9]) @ plain_v[:9])


@pytest.mark.parametrize("kind", [LowRankStructure, PivotedLowRankStructure, HouseholderStructure])
def test_a_setting_beyond_the_limit_is_told_the_largest_within(kind: type[AbstractStructure]) -> None:
    limit = 419
    weight, moments = torch.eye(24) + decaying(24, 24) / 24, isotropic(24)
    refused = kind(20).fit(weight, moments, limit, generator(0))  # type: ignore[call-arg]
    assert isinstance(refused, NoMatch)
    most = int(refused.reason.rpartition("give at most ")[2])
    fit(kind(most), weight, moments, limit)  # type: ignore[call-arg]
    assert isinstance(kind(most + 1).fit(weight, moments, limit, generator(0)), NoMatch)  # type: ignore[call-arg]
    assert "give at most" not in kind(1).fit(weight, moments, 1, generator(0)).reason  # type: ignore[call-arg, union-attr]


def test_pivoting_is_the_same_matrix_in_fewer_numbers() -> None:
    weight, moments = decaying(48, 60), anisotropic(60)
    plain, pivoted = (fit(s, weight, moments, weight.numel()) for s in (LowRankStructure(20), PivotedLowRankStructure(20)))
    assert isinstance(pivoted.operator, PivotedLowRank)
    assert torch.allclose(plain.operator.dense(), pivoted.operator.dense(), *EQUAL[torch.float32])
    assert pivoted.weighted_error == pytest.approx(plain.weighted_error, rel=10 * FP32)
    assert plain.operator.cost().params - pivoted.operator.cost().params == 20 * 20
    equal = fit(PivotedLowRankStructure(), weight, moments, plain.operator.cost().params)
    assert equal.weighted_error < plain.weighted_error
    assert pivoted.operator.rest.abs().max() <= BOUND + FP32


@pytest.mark.parametrize("limit", range(1, 300, 7))
def test_pivoted_rank_is_the_largest_that_fits(limit: int) -> None:
    answer = PivotedLowRankStructure().fit(decaying(13, 17), isotropic(17), limit, generator(0))
    best = max((r for r in range(1, 13) if r * (30 - r) <= limit), default=0)
    assert (answer.operator.down.shape[1] if isinstance(answer, Fitted) else 0) == best  # type: ignore[attr-defined]


@pytest.mark.parametrize(("k", "q", "s", "rank"), [(4, 8, 12, 2), (3, 9, 5, 3), (5, 5, 5, 1)])
def test_monarch_projection_is_the_svd_of_each_block(k: int, q: int, s: int, rank: int) -> None:
    """Theorem 1 of the Monarch paper: with white inputs, the optimum is the truncated SVD of every block."""
    weight = torch.randn(k * s, k * q, generator=generator(k))
    u, sigma, v = torch.linalg.svd(weight.double().reshape(k, s, k, q).transpose(1, 2), full_matrices=False)
    best = ((u[..., :rank] * sigma[..., None, :rank]) @ v[..., :rank, :]).transpose(1, 2).reshape(k * s, k * q)
    got = fit(MonarchStructure(blocks=k, rank=rank), weight, isotropic(k * q), weight.numel())
    assert torch.allclose(got.operator.dense().double(), best, *EQUAL[torch.float32])


def test_monarch_beats_its_plain_projection_on_anisotropic_inputs() -> None:
    weight, moments = decaying(64, 96), anisotropic(96)
    plain = fit(MonarchStructure(4, None, 4), weight, isotropic(96), weight.numel()).operator.dense()
    assert fit(MonarchStructure(4, None, 4), weight, moments, weight.numel()).weighted_error < moments.error(weight, plain)


def test_ordering_of_the_published_table() -> None:
    """Flat spectra: block-dense and Monarch beat low rank, wide inputs most; falling spectra: low rank wins. All at equal numbers."""
    moments = anisotropic(256)

    def error(structure: AbstractStructure, power: float) -> float:
        return fit(structure, decaying(256, 256, power=power), moments, 256 * 128).weighted_error

    low, dense, monarch = LowRankStructure(), BlockDenseStructure(blocks=4), MonarchStructure(blocks=4)
    assert error(monarch, 0.3) < error(low, 0.3)
    assert error(dense, 0.3) < error(low, 0.3)
    assert error(low, 0.8) < error(dense, 0.8) < error(monarch, 0.8)


def test_one_block_is_low_rank() -> None:
    weight, moments = decaying(30, 40), anisotropic(40)
    one = fit(MonarchStructure(blocks=1, rank=7), weight, moments, weight.numel())
    assert isinstance(one.operator, LowRank)
    assert one.weighted_error == pytest.approx(fit(LowRankStructure(7), weight, moments, weight.numel()).weighted_error, rel=1e2 * FP32)


def fly(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The multiply of HazyResearch/fly, from its definition: w1 (k, q, p), w2 (l, s, r), l r = k q, output strided."""
    tokens, (k, _, p), (l, s, r) = len(x), w1.shape, w2.shape  # noqa: E741
    o1 = torch.bmm(x.reshape(tokens, k, p).transpose(0, 1), w1.transpose(1, 2))  # (k, tokens, q)
    middle = o1.transpose(0, 1).reshape(tokens, r, l).permute(2, 0, 1)  # (l, tokens, r)
    o2 = torch.bmm(middle, w2.transpose(1, 2))  # (l, tokens, s)
    return o2.permute(1, 2, 0).reshape(tokens, s * l)


FLY = [(4, 16, 16, 4, 16), (4, 16, 16, 4, 48), (2, 24, 18, 6, 8), (8, 8, 16, 4, 32), (3, 10, 6, 3, 7)]


@pytest.mark.parametrize(("k", "p", "q", "l", "s"), FLY)
def test_members_in_fly_layout_are_discovered(k: int, p: int, q: int, l: int, s: int) -> None:  # noqa: E741
    rng = generator(k)
    w1, w2 = torch.randn(k, q, p, generator=rng), torch.randn(l, s, k * q // l, generator=rng)
    weight = fly(torch.eye(k * p), w1, w2).T.contiguous()
    if w1.numel() + w2.numel() >= weight.numel():
        return
    answer = found(MonarchStructure(), weight)
    assert answer.operator.cost().params <= w1.numel() + w2.numel()
    x = torch.randn(5, k * p, generator=rng)
    scale = weight.abs().max()
    assert torch.allclose(answer.operator.product(eager_ops(), x) / scale, fly(x, w1, w2) / scale, *EQUAL[torch.float32])
    if k == l:
        assert found(BlockShuffleStructure(), weight).spelling == f"block-shuffle:blocks={k}"


@pytest.mark.parametrize("strides", [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize(("k", "l", "q", "s"), [(3, 5, 12, 8), (4, 2, 9, 20), (7, 7, 6, 6)])
def test_strided_rows_and_columns(strides: tuple[bool, bool], k: int, l: int, q: int, s: int) -> None:  # noqa: E741
    rng = generator(k)
    operator = Monarch(torch.randn(k, q, 2 * l, generator=rng), torch.randn(l, 2 * k, s, generator=rng), k * q, l * s, *strides)
    answer = found(MonarchStructure(), operator.dense())
    assert answer.operator.cost().params <= operator.cost().params


def shuffled_blocks(sizes: list[tuple[int, int]], seed: int = 0, shuffle: bool = True) -> Tensor:
    weight = torch.block_diag(*(torch.randn(p, q, generator=generator(seed + i)) for i, (p, q) in enumerate(sizes)))
    if not shuffle:
        return weight
    rows, columns = (torch.randperm(d, generator=generator(seed)) for d in weight.shape)
    return weight[rows][:, columns]


def test_block_diagonal_up_to_permutation() -> None:
    straight = found(BlockDiagonalStructure(), shuffled_blocks([(4, 6)] * 5, shuffle=False))
    assert isinstance(straight.operator, BlockDiagonal)
    mixed = found(BlockDiagonalStructure(), shuffled_blocks([(4, 6)] * 5)).operator
    assert isinstance(mixed, Compose)
    assert [type(f) for f in mixed.factors] == [Permutation, BlockDiagonal, Permutation]
    assert mixed.cost().params == 5 * 24


def test_unequal_blocks_keep_their_sizes() -> None:
    operator = found(BlockDiagonalStructure(), shuffled_blocks([(4, 6), (20, 30), (4, 6), (7, 3)])).operator
    assert operator.cost().params == 24 + 600 + 24 + 21
    assert isinstance(operator, Compose)
    assert any(isinstance(f, UnequalBlocks) for f in operator.factors)


def test_many_shapes_are_padded_or_refused() -> None:
    assert found(BlockDiagonalStructure(), shuffled_blocks([(i, 14 - i) for i in range(2, 13)]))
    uneven = [(40, 40)] + [(i, 11 - i) for i in range(1, 11)]
    answer = BlockDiagonalStructure().discover(shuffled_blocks(uneven))
    assert not isinstance(answer, Fitted) or answer.operator.cost().params < 95 * 95


@pytest.mark.parametrize("dead", [([3], []), ([], [5]), ([0, 3, 19], [5, 29]), (list(range(10)), list(range(15)))])
def test_zero_rows_and_columns_within_blocks(dead: tuple[list[int], list[int]]) -> None:
    weight = shuffled_blocks([(4, 6)] * 5)
    weight[dead[0]], weight[:, dead[1]] = 0, 0
    assert found(BlockDiagonalStructure(), weight).operator.cost().params <= 5 * 24


def test_pruned_rows_and_columns_are_not_stored() -> None:
    weight = torch.randn(40, 60, generator=generator(0))
    weight[::2], weight[:, ::3] = 0, 0
    assert found(BlockDiagonalStructure(), weight).operator.cost().params == 21 * 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_smooth_tail_is_no_structure(dtype: torch.dtype) -> None:
    rng = generator(0)
    frames = [torch.linalg.qr(torch.randn(90, 90, generator=rng)).Q for _ in range(2)]
    weight = ((frames[0] * torch.logspace(0, -12, 90)) @ frames[1]).to(dtype)
    for structure in (LowRankStructure(), PivotedLowRankStructure(), BlockDenseStructure(), MonarchStructure()):
        answer = structure.discover(weight)
        assert not isinstance(answer, Fitted) or answer.operator.cost().params < 0


def test_a_set_rank_bounds_the_search() -> None:
    weight = torch.randn(60, 5, generator=generator(0)) @ torch.randn(5, 80, generator=generator(1))
    for structure in (LowRankStructure, PivotedLowRankStructure, BlockDenseStructure, MonarchStructure):
        assert not structure(rank=4).discover(weight)  # type: ignore[operator]
        assert found(structure(rank=6), weight).spelling.endswith("rank=5")  # type: ignore[operator]


def test_a_diagonal_and_a_permutation_are_block_diagonal() -> None:
    assert found(BlockDiagonalStructure(), torch.diag(torch.arange(1.0, 9))).operator.cost().params == 8
    assert found(BlockDiagonalStructure(), torch.eye(9)[torch.randperm(9, generator=generator(0))]).operator.cost().params == 9


def test_block_diagonal_fit_is_least_squares_on_its_pattern() -> None:
    weight, moments = decaying(24, 36), anisotropic(36)
    got = fit(BlockDiagonalStructure(blocks=3), weight, moments, weight.numel())
    kept = weight * torch.block_diag(*[torch.ones(8, 12)] * 3)
    assert got.weighted_error < moments.error(weight, kept)
    gradient = ((weight - got.operator.dense()).double() @ moments.second) * torch.block_diag(*[torch.ones(8, 12)] * 3)
    assert gradient.norm() < 1e2 * FP32 * (weight.double() @ moments.second).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_discovery_in_other_dtypes(dtype: torch.dtype) -> None:
    rng = generator(0)
    weight = (torch.randn(60, 4, generator=rng, dtype=torch.float64) @ torch.randn(4, 80, generator=rng, dtype=torch.float64)).to(dtype)
    answer = LowRankStructure().discover(weight)
    assert isinstance(answer, Fitted), answer
    assert answer.weighted_error <= EXACT[dtype]
    assert answer.spelling == "low-rank:rank=4"
