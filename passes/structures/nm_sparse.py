"""W with n of every m neighbouring inputs kept, y = x @ w: N:M sparsity, 2:4 where hardware multiplies it.

Fit: SparseGPT (arXiv:2301.00774) under the input's second moments, then all kept numbers refitted at once. Discovery: counting zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.algebra import Sparse
from rewriter.moments import Moments
from rewriter.packing import bits
from rewriter.passes.solvers.armor_refit import repruned
from rewriter.passes.solvers.pruning import sparsegpt
from rewriter.passes.structures._common import exact, fitted, too_dear, unusable
from rewriter.structure import HALF, AbstractStructure, Fitted, NoMatch

GROUP = 4
FOUND = (4, 8, 16)  # group sizes that discovery looks for


def unkept(n: int, m: int) -> NoMatch | None:
    """Why no weight can be stored in this pattern."""
    if not 0 < n < m:
        return NoMatch(f"{n}:{m} keeps no part of a group; give 0 < n < m")
    try:
        bits(m)
    except ValueError as problem:
        return NoMatch(str(problem))
    return None


@dataclass(frozen=True)
class NmSparseStructure(AbstractStructure):
    """n: how many of m neighbouring inputs are kept, by default as many as the limit admits; m: 4."""

    name: ClassVar[str] = "nm-sparse"
    named_only: ClassVar[bool] = True  # ARMOR with identity wrappers
    n: int | None = None
    m: int | None = None

    @property
    def share(self) -> float:
        return 1.0 if self.n else HALF

    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """By SparseGPT and least squares on its support; a last group that is not full is filled up with zeros."""
        if (refused := unusable(weight, moments)) is not None:
            return refused
        m = self.m or GROUP
        more = -weight.shape[1] % m
        each = len(weight) * (weight.shape[1] + more) // m  # numbers for every n
        n = self.n or max(1, min(m - 1, cost_limit // each))
        if (refused := unkept(n, m)) is not None:
            return refused
        spelling = replace(self, n=n, m=m).spelling()
        if n * each > cost_limit:
            return too_dear(spelling, n * each, cost_limit, cost_limit // each)
        pad = torch.nn.functional.pad
        pruned = sparsegpt(pad(weight, (0, more)), pad(moments.second, (0, more, 0, more)), n, m)[:, : weight.shape[1]]
        return fitted(Sparse.of(repruned(pruned.double(), weight, moments.second).T, n, m), spelling, weight, moments)

    def discover(self, weight: Tensor) -> Fitted | NoMatch:
        """The pattern with the fewest numbers that keeps at most half of every group and all that is not zero."""
        if (refused := unusable(weight)) is not None:
            return refused
        choices = [(n, m) for m in ([self.m] if self.m else FOUND) if (n := self._needed(weight, m)) and unkept(n, m) is None]
        if not choices:
            return NoMatch("no pattern of n:m keeps half of every group, or less, and all that is not zero")
        n, m = min(choices, key=lambda c: c[0] * -(-weight.shape[1] // c[1]))
        return exact(Sparse.of(weight.T, n, m), replace(self, n=n, m=m).spelling(), weight)

    def _needed(self, weight: Tensor, m: int) -> int:
        """The n that holds the weight; 0 where it exceeds the asked one, or half."""
        groups = torch.nn.functional.pad(weight, (0, -weight.shape[1] % m)).unflatten(1, (-1, m))
        most = int((groups != 0).sum(2).max())
        return self.n or max(most, 1) if most <= (self.n or m // 2) else 0
