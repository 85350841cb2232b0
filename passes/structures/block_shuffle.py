"""Monarch with one block count b and full middle width: r = min(q, s) // b, min(m, n) (m + n) / b numbers.

The layer of HazyResearch/fly (MonarchLinear) and of StructuredFFN (BlockShuffle, arXiv:2406.16450); our row groups are contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.moments import Moments
from rewriter.passes.solvers.rank_search import Grid, block_counts
from rewriter.passes.structures._blocks import choices, discovered, fit_best
from rewriter.passes.structures._common import too_dear, unusable
from rewriter.passes.structures.monarch import monarch
from rewriter.structure import AbstractStructure, Fitted, NoMatch


@dataclass(frozen=True)
class BlockShuffleStructure(AbstractStructure):
    """blocks: of both factors; by default the fewest that the limit admits."""

    name: ClassVar[str] = "block-shuffle"
    named_only: ClassVar[bool] = True
    blocks: int | None = None

    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """Monarch's fit at the preset's rank."""
        if (refused := unusable(weight, moments)) is not None:
            return refused
        counts = [b for b in ([self.blocks] if self.blocks else range(2, 65)) if self._rank(weight, b)]
        if not counts:
            return NoMatch(f"a {' x '.join(map(str, weight.shape))} weight is too small for {self.blocks or 2} blocks of full middle width")
        costs = {b: Grid(b, b).numbers(weight.shape, self._rank(weight, b)) for b in counts}
        blocks = next((b for b in counts if costs[b] <= cost_limit), None)
        if blocks is None:
            least = min(counts, key=lambda b: costs[b])
            return too_dear(replace(self, blocks=least).spelling(), costs[least], cost_limit)
        settings = choices(self.name, weight, moments, [Grid(blocks, blocks)], self._rank(weight, blocks), cost_limit)
        return settings if isinstance(settings, NoMatch) else fit_best(self, settings, weight, moments, monarch)

    def discover(self, weight: Tensor) -> Fitted | NoMatch:
        """One block count for both sides, rows contiguous or strided as fly has them."""
        if (refused := unusable(weight)) is not None:
            return refused
        m, n = weight.shape
        common = [b for b in block_counts(m, 256) if b in block_counts(n, 256) and b > 1 and self.blocks in (None, b)]
        strides = [(b, stride) for b in common for stride in (False, True) if not stride or m % b == 0]
        grids = [Grid(b, b, False, stride, self._rank(weight, b)) for b, stride in strides]
        return discovered(self, grids, weight, monarch)

    def _rank(self, weight: Tensor, blocks: int) -> int:
        return min(Grid(blocks, blocks).sizes(weight.shape)) // blocks
