"""blast: the product against a loop over blocks, the error against low rank's, options and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.moments import isotropic
from rewriter.passes.solvers.blast import Shared
from rewriter.passes.structures.blast import Blast, BlastStructure, blast
from rewriter.passes.structures.low_rank import LowRankStructure
from rewriter.registry import eager_ops, parse_passes
from rewriter.structure import Fitted, NoMatch
from rewriter.tolerances import EQUAL, EXACT

from .inputs import anisotropic, decaying, generator

many = settings(max_examples=40, deadline=None, derandomize=True)


@many
@given(m=st.integers(1, 30), n=st.integers(1, 30), b=st.integers(1, 6), r=st.integers(1, 5))
def test_product_is_the_loop_over_blocks(m: int, n: int, b: int, r: int) -> None:
    b, rng = min(b, m, n), generator(m + n)
    p, q = -(-m // b), -(-n // b)
    u, s, v = (torch.randn(*shape, r, generator=rng) for shape in ((b, p), (b, b), (b, q)))
    operator = blast(Shared(u, s, v), torch.Size((m, n)))
    x = torch.randn(2, n, generator=rng)
    parts = torch.nn.functional.pad(x, (0, b * q - n)).split(q, -1)
    rows = [sum((parts[j] @ v[j] * s[i, j] for j in range(b)), torch.zeros(2, r)) @ u[i].T for i in range(b)]
    assert torch.allclose(operator.product(eager_ops(), x), torch.cat(rows, -1)[:, :m], *EQUAL[torch.float32])
    assert torch.allclose(operator.dense(), Shared(u, s, v).dense()[:m, :n], *EQUAL[torch.float32])
    assert operator.cost().params == r * b * (p + q + b)
    assert operator.cost(tokens=3).flops == 2 * 3 * operator.cost().params


@pytest.mark.parametrize("blocks", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 5, 14])
@pytest.mark.parametrize("shape", [(48, 64), (37, 53), (96, 30)], ids=str)
def test_error_is_never_above_low_rank_of_the_same_rank(shape: tuple[int, int], rank: int, blocks: int) -> None:
    weight, moments = decaying(*shape), anisotropic(shape[1])
    mine = BlastStructure(blocks, rank).fit(weight, moments, 4 * weight.numel(), generator(0))
    low = LowRankStructure(rank).fit(weight, moments, 4 * weight.numel(), generator(0))
    assert isinstance(mine, Fitted) and isinstance(low, Fitted)
    assert mine.spelling == f"blast:blocks={blocks}:rank={rank}"
    assert mine.weighted_error <= low.weighted_error + EXACT[torch.float32]
    assert parse_passes(mine.spelling)[0].spelling() == mine.spelling


def test_best_of_several_block_counts_is_taken() -> None:
    weight, moments = decaying(64, 64), anisotropic(64)
    limit = weight.numel() // 2
    best = BlastStructure().fit(weight, moments, limit, generator(0))
    each = [BlastStructure(b).fit(weight, moments, limit, generator(0)) for b in (2, 4, 8)]
    assert isinstance(best, Fitted)
    assert best.weighted_error in [fit.weighted_error for fit in each if isinstance(fit, Fitted)]
    assert best.operator.cost().params <= limit


def test_promising_asks_the_start() -> None:
    weight, moments = decaying(48, 64), anisotropic(64)
    structure, limit = BlastStructure(), weight.numel() // 2
    fit = structure.fit(weight, moments, limit, generator(0))
    assert isinstance(fit, Fitted)
    assert structure.promising(weight, moments, limit, fit.weighted_error)
    assert not structure.promising(weight, moments, limit, fit.weighted_error / 4)
    assert not structure.promising(weight, moments, 10, 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_without_answer_are_refused(value: float) -> None:
    weight = torch.ones(8, 12)
    weight[3, 4] = value
    answer = BlastStructure().fit(weight, isotropic(12), 48, generator(0))
    assert isinstance(answer, NoMatch) and "NaN" in answer.reason
    with pytest.raises(ValueError, match="moments of 12 features"):
        BlastStructure().fit(torch.ones(8, 11), isotropic(12), 48, generator(0))


def test_refusals_have_numbers() -> None:
    weight, moments = decaying(6, 8), isotropic(8)
    for structure in (BlastStructure(blocks=7), BlastStructure(rank=7)):
        refused = structure.fit(weight, moments, 10**6, generator(0))
        assert isinstance(refused, NoMatch) and "a 6 x 8 weight has no such shared blocks" in refused.reason
    refused = BlastStructure(2, 3).fit(weight, moments, 40, generator(0))
    assert isinstance(refused, NoMatch)
    assert refused.reason == "blast:blocks=2:rank=3 stores 54 numbers, the limit is 40; give at most 2"
    assert isinstance(BlastStructure().discover(weight), NoMatch)


def test_random_member_is_padded() -> None:
    operator = Blast.random(generator(0))
    assert operator.shape == (5, 7)
    assert operator.dense().shape == (5, 7)
