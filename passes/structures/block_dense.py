"""W = [U_1 V_1, …, U_k V_k]: column blocks of rank r each, y = block_matmul(x, down) @ up (StructuredFFN, arXiv:2406.16450, BlockDense).

Fit: block coordinate descent, each step an exact reduced-rank regression. No permutation anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rewriter.algebra import BlockDiagonal, Dense
from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.ops import AnyOps
from rewriter.passes.solvers.block_descent import Blocks
from rewriter.passes.solvers.gauge import balanced
from rewriter.passes.solvers.rank_search import Grid, block_counts
from rewriter.passes.structures._blocks import choices, discovered, fit_best, may_beat
from rewriter.passes.structures._common import unusable
from rewriter.structure import AbstractStructure, Fitted, NoMatch


@dataclass(frozen=True)
class BlockDense(AbstractMatrix):
    """k r (q + m) numbers; inputs are padded with zeros to k q."""

    down: Tensor  # (k, q, r)
    up: Tensor  # (k*r, m)
    inputs: int  # n <= k q

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[1], self.inputs

    def product(self, ops: AnyOps, x: Any) -> Any:
        k, q, _ = self.down.shape
        x = x if self.inputs == k * q else ops.pad(x, k * q)
        return ops.matmul(ops.block_matmul(x, ops.const(self.down)), ops.const(self.up))

    def as_product(self) -> tuple[AbstractMatrix, ...]:
        k, q, _ = self.down.shape
        return (BlockDiagonal(self.down), Dense(self.up)) if self.inputs == k * q else (self,)

    def balanced(self) -> BlockDense:
        down, up = balanced(self.down, self.up.unflatten(0, (len(self.down), -1)))
        return BlockDense(down, up.flatten(0, 1), self.inputs)

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(3, 3, 2, generator=rng), torch.randn(6, 5, generator=rng), 7)


def block_dense(blocks: Blocks, inputs: int) -> BlockDense:
    """From factors with one row group."""
    return BlockDense(blocks.right[:, 0].mT.contiguous(), blocks.left[:, 0].mT.flatten(0, 1).contiguous(), inputs)


@dataclass(frozen=True)
class BlockDenseStructure(AbstractStructure):
    """blocks: of columns, by default the best of 2, 4, 8; rank: of each block (StructuredFFN's R is blocks * rank), as fits."""

    iterative: ClassVar[bool] = True
    name: ClassVar[str] = "block-dense"
    blocks: int | None = None
    rank: int | None = None

    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """The least weighted error over the block counts tried; one block is low rank."""
        settings = self._settings(weight, moments, cost_limit)
        return settings if isinstance(settings, NoMatch) else fit_best(self, settings, weight, moments, self._operator)

    def promising(self, weight: Tensor, moments: Moments, cost_limit: int, rival: float) -> bool:
        """By the error that the descent starts from."""
        return may_beat(self._settings(weight, moments, cost_limit), weight, moments, rival)

    def _settings(self, weight: Tensor, moments: Moments, cost_limit: int) -> list[tuple[Grid, int]] | NoMatch:
        grids = [Grid(k, 1) for k in ((self.blocks,) if self.blocks else (2, 4, 8))]
        return choices(self.name, weight, moments, grids, self.rank, cost_limit)

    def discover(self, weight: Tensor) -> Fitted | NoMatch:
        """Any block count that divides, small ones that do not."""
        if (refused := unusable(weight)) is not None:
            return refused
        counts = [self.blocks] if self.blocks else block_counts(weight.shape[1], 256)[1:]
        return discovered(self, [Grid(k, 1, most=self.rank) for k in counts], weight, self._operator)

    def _operator(self, grid: Grid, blocks: Blocks, shape: torch.Size) -> AbstractMatrix:
        return block_dense(blocks, shape[1])
