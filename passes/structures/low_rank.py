"""W = U V with thin factors: y = (x @ down) @ up.

Fit: the weighted optimum U_r U_r^T W, U_r the leading eigenvectors of W H W^T (Swift-SVD, arXiv:2604.01609). One decomposition, every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rewriter.algebra import Dense
from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.ops import AnyOps
from rewriter.passes.solvers.gauge import balanced
from rewriter.passes.solvers.rank_search import find_rank
from rewriter.passes.solvers.spectral import spectrum
from rewriter.passes.structures._common import exact, fitted, too_dear, unusable
from rewriter.structure import AbstractStructure, Fitted, NoMatch


@dataclass(frozen=True)
class LowRank(AbstractMatrix):
    """Rank r, r (m + n) numbers."""

    down: Tensor  # (n, r)
    up: Tensor  # (r, m)

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[1], self.down.shape[0]

    def product(self, ops: AnyOps, x: Any) -> Any:
        return ops.matmul(ops.matmul(x, ops.const(self.down)), ops.const(self.up))

    def as_product(self) -> tuple[AbstractMatrix, ...]:
        return Dense(self.down), Dense(self.up)

    def balanced(self) -> LowRank:
        return LowRank(*balanced(self.down, self.up))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(7, 2, generator=rng), torch.randn(2, 5, generator=rng))


@dataclass(frozen=True)
class LowRankStructure(AbstractStructure):
    """rank: the width of the bottleneck; by default the largest that the limit admits."""

    name: ClassVar[str] = "low-rank"
    rank: int | None = None

    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """The global optimum of the weighted error at its rank; up has orthonormal rows."""
        if (refused := unusable(weight, moments)) is not None:
            return refused
        m, n = weight.shape
        rank = self.rank or max(1, min(cost_limit // (m + n), m, n))
        spelling = replace(self, rank=rank).spelling()
        if rank * (m + n) > cost_limit:
            return too_dear(spelling, rank * (m + n), cost_limit, cost_limit // (m + n))
        if rank > min(m, n):
            return NoMatch(f"{spelling} of a {m} x {n} weight; its rank is at most {min(m, n)}")
        return fitted(LowRank(*spectrum(weight, moments.second).truncate(rank)), spelling, weight, moments)

    def discover(self, weight: Tensor) -> Fitted | NoMatch:
        """The rank at which the singular values fall to rounding level, where it pays."""
        if (refused := unusable(weight)) is not None:
            return refused
        m, n = weight.shape
        most = min((m * n - 1) // (m + n), self.rank or m)
        found = find_rank(weight, most) if most else None
        if found is None:
            return NoMatch(f"rank exceeds {most}, the largest that stores fewer than {m * n} numbers")
        operator = LowRank(found.blocks.right[0, 0].T.contiguous(), found.blocks.left[0, 0].T.contiguous())
        return exact(operator, replace(self, rank=found.rank).spelling(), weight)
