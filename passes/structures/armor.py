"""W = A S B, A and B block diagonal, S with n of every m neighbouring inputs kept: y = x B^T S^T A^T, each factor a product of its own.

The wrappers turn the weight to where pruning loses less; they are the dense numbers' (m + n) b beside m n / 2 at 2:4 and blocks of b.
Fit: the proxy loss of ARMOR (arXiv:2510.05528), which sees the inputs' variances alone, by exact block descent or by Adam; then the kept
values once more under all second moments.
A member with other than identity wrappers is approached, not recovered: the loss is not convex.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.algebra import BlockDiagonal, Compose, Sparse
from rewriter.errors import RewriteError
from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.passes.solvers.armor import Pattern, Wrapped, armor
from rewriter.passes.solvers.armor_adam import armor_adam
from rewriter.passes.solvers.armor_refit import refitted
from rewriter.passes.solvers.bcd.supports import supports
from rewriter.passes.solvers.rank_search import divisors
from rewriter.passes.structures._common import fitted, too_dear, unusable
from rewriter.passes.structures.nm_sparse import GROUP, NmSparseStructure, unkept
from rewriter.structure import AbstractStructure, Fitted, NoMatch

SOLVERS = {"exact": armor, "adam": armor_adam}
WRAPPERS = 1 / 16  # of the dense numbers: the share of the paper's blocks of 128 in a weight of 4096 x 4096
FURTHER = 0.3  # what the fit may make of its start's error; the largest gain seen on trained and synthetic weights was 0.39


def armored(found: Wrapped, pattern: Pattern) -> Compose:
    """The operator of these factors."""
    core = Sparse.of(found.core.T, pattern.n, pattern.m, pattern.shared)
    return Compose((BlockDiagonal(found.right.mT.contiguous()), core, BlockDiagonal(found.left.mT.contiguous())))


@dataclass(frozen=True)
class ArmorStructure(AbstractStructure):
    """block: of the wrappers, by default the largest that the limit admits; n:m: the pattern, 2:4; shared: rows that share it, 1; solver:
    exact (block descent) or adam."""

    name: ClassVar[str] = "armor"
    iterative: ClassVar[bool] = True
    block: int | None = None
    n: int | None = None
    m: int | None = None
    shared: int = 1
    solver: str = "exact"

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise RewriteError(f"armor:solver={self.solver} is unknown; give {' or '.join(SOLVERS)}")

    @property
    def share(self) -> float:
        """What the pattern keeps, and a sixteenth for the wrappers."""
        pattern = self._pattern()
        return 1.0 if self.block else min(pattern.n / pattern.m + WRAPPERS, 1.0)

    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """From NoWag-P's pruning down the proxy loss; then the kept values under all second moments, which the reported error is under."""
        block, pattern = self._block(weight, moments, cost_limit), self._pattern()
        if isinstance(block, NoMatch):
            return block
        found = SOLVERS[self.solver](weight, moments.second.diagonal(), block, pattern, rng)
        found = refitted(found, weight, moments.second)
        return fitted(armored(found, pattern), self._spelled(block), weight, moments)

    def start(self, weight: Tensor, moments: Moments, cost_limit: int) -> AbstractMatrix | NoMatch:
        """NoWag-P's pruning between identity wrappers."""
        block, pattern = self._block(weight, moments, cost_limit), self._pattern()
        if isinstance(block, NoMatch):
            return block
        return armored(armor(weight, moments.second.diagonal(), block, pattern, torch.Generator(), sweeps=0), pattern)

    def promising(self, weight: Tensor, moments: Moments, cost_limit: int, rival: float) -> bool:
        """By the error that the descent starts from."""
        start = self.start(weight, moments, cost_limit)
        return not isinstance(start, NoMatch) and FURTHER * moments.error(weight, start.dense()) < rival

    def discover(self, weight: Tensor) -> Fitted | NoMatch:
        """With identity wrappers, which are left out: a weight that is sparse as it stands."""
        return NmSparseStructure(self.n, self.m).discover(weight)

    def _pattern(self) -> Pattern:
        m = self.m or GROUP
        return Pattern(self.n or max(1, m // 2), m, self.shared)

    def _spelled(self, block: int) -> str:
        pattern = self._pattern()
        return replace(self, block=block, n=pattern.n, m=pattern.m).spelling()

    def _block(self, weight: Tensor, moments: Moments, cost_limit: int) -> int | NoMatch:
        """The given block, or the largest within the limit."""
        pattern = self._pattern()
        for refused in (unusable(weight, moments), unkept(pattern.n, pattern.m)):
            if refused is not None:
                return refused
        try:
            supports(pattern.n, pattern.m)
        except ValueError as problem:
            return NoMatch(str(problem))
        rows, columns = weight.shape
        unit, side = math.lcm(pattern.m, self.shared), math.gcd(rows, columns)
        blocks = [b for b in divisors(side, side) if b % unit == 0 and self.block in (None, b)]
        if not blocks:
            asked = f"no block of {self.block}" if self.block else "no block"
            return NoMatch(f"a {rows} x {columns} weight has {asked} that divides both sides and is a multiple of {unit}")
        costs = {b: rows * columns * pattern.n // pattern.m + (rows + columns) * b for b in blocks}
        within = [b for b in blocks if costs[b] <= cost_limit]
        return max(within) if within else too_dear(self._spelled(min(blocks)), min(costs.values()), cost_limit)
