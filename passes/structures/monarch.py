"""W[(λ,σ),(c,i)] = Σ_ρ left[λ][(c,ρ),σ] right[c][i,(ρ,λ)]: an g x k grid of blocks of rank r, as two block-diagonal factors and a shuffle.

Monarch (arXiv:2204.00595) is r = 1 on square grids; this is its rectangular form of any rank. Row groups are contiguous where we fit, so
that nothing permutes the output; members in the strided layout of HazyResearch/fly are discovered with the shuffle that they need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.ops import AnyOps
from rewriter.passes.solvers.block_descent import Blocks
from rewriter.passes.solvers.gauge import balanced
from rewriter.passes.solvers.rank_search import Grid, block_counts, divisors
from rewriter.passes.structures._blocks import choices, discovered, fit_best, may_beat
from rewriter.passes.structures._common import unusable
from rewriter.passes.structures.block_dense import block_dense
from rewriter.passes.structures.low_rank import LowRank
from rewriter.structure import AbstractStructure, Fitted, NoMatch


@dataclass(frozen=True)
class Monarch(AbstractMatrix):
    """k g r (q + s) numbers; inputs are padded with zeros to k q, outputs beyond m are left off. Strides need exact division."""

    right: Tensor  # (k, q, r*g)
    left: Tensor  # (g, k*r, s)
    inputs: int  # n <= k q
    outputs: int  # m <= g s
    stride_in: bool = False  # column block c holds columns i*k + c
    stride_out: bool = False  # row group λ holds rows σ*g + λ

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    def product(self, ops: AnyOps, x: Any) -> Any:
        (k, q, _), (g, middle, s) = self.right.shape, self.left.shape
        x = x if self.inputs == k * q else ops.pad(x, k * q)
        x = ops.shuffle(x, q) if self.stride_in else x
        z = ops.block_matmul(x, ops.const(self.right))
        z = ops.shuffle(z, middle) if g > 1 else z  # (c, ρ, λ) -> (λ, c, ρ)
        y = ops.block_matmul(z, ops.const(self.left))
        y = ops.shuffle(y, g) if self.stride_out else y
        return y if self.outputs == g * s else ops.split(y, [self.outputs, g * s - self.outputs])[0]

    def balanced(self) -> Monarch:
        k, g = len(self.right), len(self.left)
        right = self.right.unflatten(2, (-1, g)).permute(0, 3, 1, 2)  # (k, g, q, r)
        left = self.left.unflatten(1, (k, -1)).transpose(0, 1)  # (k, g, r, s)
        right, left = balanced(right, left)
        return replace(self, right=right.permute(0, 2, 3, 1).flatten(2), left=left.transpose(0, 1).flatten(1, 2))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(3, 3, 4, generator=rng), torch.randn(2, 6, 3, generator=rng), 7, 5)


def monarch(grid: Grid, blocks: Blocks, shape: torch.Size) -> AbstractMatrix:
    """The operator of these factors; one block is LowRank, one row group BlockDense."""
    m, n = shape
    if grid.g == 1 and not grid.stride_in:
        return block_dense(blocks, n) if grid.k > 1 else LowRank(blocks.right[0, 0].T.contiguous(), blocks.left[0, 0].T.contiguous())
    right = blocks.right.permute(0, 3, 2, 1).flatten(2)
    left = blocks.left.permute(1, 0, 3, 2).flatten(1, 2)
    return Monarch(right.contiguous(), left.contiguous(), n, m, grid.stride_in, grid.stride_out)


@dataclass(frozen=True)
class MonarchStructure(AbstractStructure):
    """blocks: column blocks, by default the best of 2, 4, 8; rows: row groups, by default as many; rank: of each block, what fits."""

    iterative: ClassVar[bool] = True
    name: ClassVar[str] = "monarch"
    blocks: int | None = None
    rows: int | None = None
    rank: int | None = None

    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """The least weighted error over the block counts tried, by block coordinate descent."""
        settings = self._settings(weight, moments, cost_limit)
        return settings if isinstance(settings, NoMatch) else fit_best(self, settings, weight, moments, monarch)

    def promising(self, weight: Tensor, moments: Moments, cost_limit: int, rival: float) -> bool:
        """By the error that the descent starts from."""
        return may_beat(self._settings(weight, moments, cost_limit), weight, moments, rival)

    def _settings(self, weight: Tensor, moments: Moments, cost_limit: int) -> list[tuple[Grid, int]] | NoMatch:
        grids = [Grid(k, self.rows or min(k, len(weight))) for k in ((self.blocks,) if self.blocks else (2, 4, 8))]
        return choices(self.name, weight, moments, grids, self.rank, cost_limit)

    def discover(self, weight: Tensor) -> Fitted | NoMatch:
        """Contiguous grids, and strided ones where the counts divide."""
        if (refused := unusable(weight)) is not None:
            return refused
        return discovered(self, self._grids(*weight.shape), weight, monarch)

    def _grids(self, m: int, n: int) -> Iterator[Grid]:
        for k in [self.blocks] if self.blocks else block_counts(n, 256):
            for g in [self.rows] if self.rows else block_counts(m, 256):
                if k * g > 1:
                    yield Grid(k, g, most=self.rank)
        for k in [self.blocks] if self.blocks else divisors(n, 64):
            for g in [self.rows] if self.rows else divisors(m, 64):
                if n % k == 0 and m % g == 0:
                    strides = [(i, o) for i in {False, k > 1} for o in {False, g > 1} if i or o]  # over one part there is none
                    yield from (Grid(k, g, stride_in, stride_out, self.rank) for stride_in, stride_out in strides)
