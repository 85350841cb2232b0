"""W_ij = U_i diag(s_ij) V_j^T, a b x b grid of blocks that share their sides: two block-diagonal factors, r products of b x b between.

Low rank is s = 1; a Monarch grid of blocks of rank r / b has own columns of U_i and V_j for each block. A member is approached, not
recovered: the loss is not convex.
Source: BLAST, Lee et al., NeurIPS 2024 (arXiv:2410.21262).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.ops import AnyOps
from rewriter.passes.solvers.blast import Shared, SharedFit
from rewriter.passes.structures._common import fitted, too_dear, unusable
from rewriter.structure import AbstractStructure, Fitted, NoMatch

TRIAL_SWEEPS, SWEEPS = 4, 20
FURTHER = 0.6  # what descent may make of its start's error; the largest gain seen on trained weights was 0.69


@dataclass(frozen=True)
class Blast(AbstractMatrix):
    """r (b q + b p + b^2) numbers; inputs are padded with zeros to b q, outputs beyond m are left off."""

    right: Tensor  # (b, q, r)
    coupling: Tensor  # (r, b, b), [rho, j, i]
    left: Tensor  # (b, r, p)
    inputs: int  # n <= b q
    outputs: int  # m <= b p

    @property
    def shape(self) -> tuple[int, int]:
        return self.outputs, self.inputs

    def product(self, ops: AnyOps, x: Any) -> Any:
        (b, q, r), p = self.right.shape, self.left.shape[2]
        x = x if self.inputs == b * q else ops.pad(x, b * q)
        z = ops.block_matmul(x, ops.const(self.right))
        z = ops.block_matmul(ops.shuffle(z, b), ops.const(self.coupling))  # (j, rho) -> (rho, j) -> (rho, i)
        y = ops.block_matmul(ops.shuffle(z, r), ops.const(self.left))  # (rho, i) -> (i, rho)
        return y if self.outputs == b * p else ops.split(y, [self.outputs, b * p - self.outputs])[0]

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(3, 3, 2, generator=rng), torch.randn(2, 3, 3, generator=rng), torch.randn(3, 2, 2, generator=rng), 7, 5)


def blast(factors: Shared, shape: torch.Size) -> Blast:
    """The operator of these factors, for an (m, n) weight."""
    m, n = shape
    coupling = factors.coupling.permute(2, 1, 0).contiguous()
    return Blast(factors.right.contiguous(), coupling, factors.left.mT.contiguous(), n, m)


@dataclass(frozen=True)
class BlastStructure(AbstractStructure):
    """blocks: b, of rows and of columns, by default the best of 2, 4, 8; rank: columns that a row or column of blocks shares, as fits."""

    iterative: ClassVar[bool] = True
    named_only: ClassVar[bool] = True  # its mixing of small blocks runs slower than the dense weight on ONNX Runtime
    name: ClassVar[str] = "blast"
    blocks: int | None = None
    rank: int | None = None

    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """The least weighted error over the block counts tried, never above low rank's of the same rank; by block coordinate descent."""
        settings = self._settings(weight, moments, cost_limit)
        if isinstance(settings, NoMatch):
            return settings
        trials = [(SharedFit(weight, moments.second, b, rank), b, rank) for b, rank in settings]
        for trial, _, _ in trials:
            trial.descend(TRIAL_SWEEPS)
        best, b, rank = min(trials, key=lambda trial: trial[0].losses[-1])
        best.descend(SWEEPS - TRIAL_SWEEPS)
        return fitted(blast(best.factors, weight.shape), replace(self, blocks=b, rank=rank).spelling(), weight, moments)

    def promising(self, weight: Tensor, moments: Moments, cost_limit: int, rival: float) -> bool:
        """By the error that the descent starts from."""
        settings = self._settings(weight, moments, cost_limit)
        if isinstance(settings, NoMatch):
            return False
        starts = (SharedFit(weight, moments.second, b, rank).losses[0] for b, rank in settings)
        return any(FURTHER**2 * max(loss, 0.0) < rival**2 * moments.energy(weight) for loss in starts)

    def _settings(self, weight: Tensor, moments: Moments, cost_limit: int) -> list[tuple[int, int]] | NoMatch:
        """The block counts that can be had within the limit, each with its rank (the given or the largest); else the cheapest's numbers."""
        if (refused := unusable(weight, moments)) is not None:
            return refused
        (m, n), asked = weight.shape, (self.blocks,) if self.blocks else (2, 4, 8)
        each = {b: b * (-(-m // b) - (-n // b) + b) for b in asked if b <= min(m, n)}  # numbers of rank 1
        if not each or (self.rank or 1) > min(m, n):
            return NoMatch(f"a {m} x {n} weight has no such shared blocks: {', '.join(map(str, asked))} a side, rank {self.rank or 1}")
        affordable = [(b, self.rank or min(cost_limit // one, m, n)) for b, one in each.items() if (self.rank or 1) * one <= cost_limit]
        if not affordable:
            b, one = min(each.items(), key=lambda item: item[1])
            spelling = replace(self, blocks=b, rank=self.rank or 1).spelling()
            return too_dear(spelling, (self.rank or 1) * one, cost_limit, cost_limit // one)
        return affordable
