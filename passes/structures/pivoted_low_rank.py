"""A rank-r matrix has r independent rows P, the others are combinations of them: y_P = W_P x, y_rest = C y_P.

r n + (m - r) r = r (m + n - r) numbers instead of r (m + n) for the same matrix: at equal numbers, a higher rank (PIFA, Zhao et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rewriter.algebra import Compose, Permutation
from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.ops import AnyOps
from rewriter.passes.solvers.pivoting import row_basis, row_window
from rewriter.passes.solvers.rank_search import find_rank
from rewriter.passes.solvers.spectral import spectrum
from rewriter.passes.structures._common import exact, fitted, too_dear, unusable
from rewriter.passes.structures.low_rank import LowRank
from rewriter.structure import AbstractStructure, Fitted, NoMatch

LARGEST = 100.0  # coefficients of the dependent rows; above it float32 would lose two more digits
LARGEST_WINDOW = 50.0  # of neighbouring rows, which save the permutation


@dataclass(frozen=True)
class PivotedLowRank(AbstractMatrix):
    """z = x @ down are outputs start, start + 1, ...; z @ rest are those before and those behind them."""

    down: Tensor  # (n, r)
    rest: Tensor  # (r, m - r)
    start: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rest.shape[0] + self.rest.shape[1], self.down.shape[0]

    def product(self, ops: AnyOps, x: Any) -> Any:
        z = ops.matmul(x, ops.const(self.down))
        others, behind = ops.matmul(z, ops.const(self.rest)), self.rest.shape[1] - self.start
        if self.start == 0 or behind == 0:
            return ops.concat([z, others] if self.start == 0 else [others, z])
        before, after = ops.split(others, [self.start, behind])
        return ops.concat([before, z, after])

    def balanced(self) -> LowRank:
        """Without the pivots, which would tie some outputs' factors to the identity."""
        before, behind = self.rest.split([self.start, self.rest.shape[1] - self.start], 1)
        return LowRank(self.down, torch.cat([before, torch.eye(len(self.rest), dtype=self.rest.dtype), behind], 1)).balanced()

    def unbalanced(self, trained: AbstractMatrix) -> AbstractMatrix:
        """On the same rows; what they cannot make comes out as nonsense, which whoever trained has to judge anyway."""
        assert isinstance(trained, LowRank)
        inside = torch.arange(self.start, self.start + len(self.rest))
        rows = trained.up[:, inside].double()
        rest = torch.linalg.solve_ex(rows, _without(trained.up.T.double(), inside)).result
        return PivotedLowRank((trained.down.double() @ rows).to(self.down.dtype), rest.to(self.rest.dtype), self.start)

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(7, 2, generator=rng), torch.randn(2, 3, generator=rng), 1)


def pivoted(down: Tensor, up: Tensor, exactly: bool = False) -> AbstractMatrix | NoMatch:
    """The same matrix as down (n, r) @ up (r, m), r < m, on r of its own rows: neighbours where their coefficients are small.

    `exactly`: to rounding level, which only the best rows give.
    """
    rank, m = up.shape
    start, coefficients, largest = (0, up, float("inf")) if exactly else row_window(up.T)
    if largest <= LARGEST_WINDOW:
        inside = torch.arange(start, start + rank)
        return PivotedLowRank(down @ up[:, inside], _without(coefficients, inside), start)
    pivots, coefficients, largest = row_basis(up.T)
    if not largest <= LARGEST:
        return NoMatch(f"no well-conditioned choice of {rank} rows: coefficients reach {largest:.1e}, the bound is {LARGEST:.0f}")
    others = torch.ones(m, dtype=torch.bool).index_fill(0, pivots, False).nonzero().flatten()
    order = torch.argsort(torch.cat([pivots, others]))
    return Compose((PivotedLowRank(down @ up[:, pivots], _without(coefficients, pivots), 0), Permutation(order, m)))


def _without(coefficients: Tensor, rows: Tensor) -> Tensor:
    """(m, r) coefficients of the other rows, as (r, m - r)."""
    others = torch.ones(len(coefficients), dtype=torch.bool).index_fill(0, rows, False)
    return coefficients[others].T.contiguous()


@dataclass(frozen=True)
class PivotedLowRankStructure(AbstractStructure):
    """rank: the number of independent outputs; by default the largest that the limit admits."""

    name: ClassVar[str] = "pivoted-low-rank"
    rank: int | None = None

    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """The weighted optimum at its rank, as `low-rank` has it; rank < rows."""
        if (refused := unusable(weight, moments)) is not None:
            return refused
        m, n = weight.shape
        rank = self.rank or max(1, _affordable(m, n, cost_limit))
        spelling = replace(self, rank=rank).spelling()
        if rank * (m + n - rank) > cost_limit:
            return too_dear(spelling, rank * (m + n - rank), cost_limit, _affordable(m, n, cost_limit))
        if rank >= m or rank > n:
            return NoMatch(f"{spelling} of a {m} x {n} weight; {min(m, n)} independent rows are all of it")
        operator = pivoted(*spectrum(weight, moments.second).truncate(rank))
        return operator if isinstance(operator, NoMatch) else fitted(operator, spelling, weight, moments)

    def discover(self, weight: Tensor) -> Fitted | NoMatch:
        """Any rank below min(m, n) pays."""
        if (refused := unusable(weight)) is not None:
            return refused
        most = min(min(weight.shape) - 1, self.rank or weight.shape[0])
        found = find_rank(weight, most) if most else None
        if found is None:
            return NoMatch(f"rank exceeds {most}, the largest that stores fewer than {weight.numel()} numbers")
        operator = pivoted(found.blocks.right[0, 0].T, found.blocks.left[0, 0].T, exactly=True)
        return operator if isinstance(operator, NoMatch) else exact(operator, replace(self, rank=found.rank).spelling(), weight)


def _affordable(m: int, n: int, limit: int) -> int:
    """The largest rank r < m, r <= n, with r (m + n - r) <= limit."""
    total = m + n
    largest = min(m - 1, n)
    inside = total * total - 4 * limit
    if inside < 0:
        return largest
    root = isqrt(inside)
    return min((total - root - (root * root < inside)) // 2, largest)
