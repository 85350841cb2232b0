"""y_b = x_b W_bb: blocks on the diagonal, up to a permutation of the inputs and one of the outputs.

Found exactly from the connected components of the weight's nonzero pattern. A fit keeps the blocks only, each refitted to what its inputs
tell of the rest: W'_bb = (W H)_bb H_bb^-1, the least-squares optimum for that pattern."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rewriter.algebra import BlockDiagonal, Compose, Permutation
from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.ops import AnyOps
from rewriter.passes.solvers.block_descent import PROXIMAL
from rewriter.passes.solvers.components import Component, adopt_zeros, components
from rewriter.passes.solvers.spectral import cholesky, ridged
from rewriter.passes.structures._common import exact, fitted, too_dear, unusable
from rewriter.structure import AbstractStructure, Fitted, NoMatch

SHAPES = 8  # different block shapes kept apart; more are padded to the largest


@dataclass(frozen=True)
class UnequalBlocks(AbstractMatrix):
    """A diagonal of blocks in runs of one shape."""

    runs: tuple[Tensor, ...]  # each (k, q, p)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(k * p for k, _, p in map(tuple, self._sizes())), sum(k * q for k, q, _ in self._sizes())

    def _sizes(self) -> list[torch.Size]:
        return [run.shape for run in self.runs]

    def product(self, ops: AnyOps, x: Any) -> Any:
        pieces = ops.split(x, [k * q for k, q, _ in self._sizes()])
        return ops.concat([ops.block_matmul(piece, ops.const(run)) for piece, run in zip(pieces, self.runs, strict=True)])

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls((torch.randn(2, 3, 2, generator=rng), torch.randn(1, 1, 3, generator=rng)))


@dataclass(frozen=True)
class BlockDiagonalStructure(AbstractStructure):
    """blocks: how many; by default the fewest that the limit admits, or what the weight shows."""

    name: ClassVar[str] = "block-diagonal"
    blocks: int | None = None

    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """Consecutive blocks, rows and columns in their order; what lies outside them is dropped."""
        if (refused := unusable(weight, moments)) is not None:
            return refused
        m, n = weight.shape
        counts = [self.blocks] if self.blocks else range(2, min(m, n) + 1)
        costs = {k: k * -(-m // k) * -(-n // k) for k in counts if k <= min(m, n)}
        if not costs:
            return NoMatch(f"a {m} x {n} weight has no {self.blocks or 2} diagonal blocks")
        blocks = next((k for k, cost in costs.items() if cost <= cost_limit), None)
        if blocks is None:
            least = min(costs, key=lambda k: costs[k])
            return too_dear(replace(self, blocks=least).spelling(), costs[least], cost_limit)
        return fitted(_keep(weight, moments, blocks), replace(self, blocks=blocks).spelling(), weight, moments)

    def discover(self, weight: Tensor) -> Fitted | NoMatch:
        """Blocks up to permutations, from the pattern of exact zeros; unequal blocks stay apart, few shapes, or are padded."""
        if (refused := unusable(weight)) is not None:
            return refused
        parts = components(weight)
        if not parts:
            return NoMatch("the weight is zero")
        if len(parts) == 1 and weight.numel() == len(parts[0].rows) * len(parts[0].columns):
            return NoMatch("its nonzero entries connect all rows and columns")
        if self.blocks and len(parts) != self.blocks:
            return NoMatch(f"the weight falls into {len(parts)} blocks, {self.blocks} were asked for")
        spread = [adopt_zeros(parts, (weight.shape[0], weight.shape[1])), _adopt_one(parts, weight)]
        forms = [_operator(weight, choice) for choice in spread]
        best = min(forms, key=lambda form: (form.cost().params, form.cost().nbytes))
        return exact(best, replace(self, blocks=len(parts)).spelling(), weight)


def _keep(weight: Tensor, moments: Moments, k: int) -> AbstractMatrix:
    m, n = weight.shape
    p, q = -(-m // k), -(-n // k)
    h, blocks = ridged(moments.second), torch.zeros(k, q, p, dtype=torch.float64)
    for b in range(k):
        rows, columns = slice(b * p, (b + 1) * p), slice(b * q, (b + 1) * q)
        own = weight[rows, columns].double()
        if 0 in own.shape:
            continue
        others = weight[rows].double()
        others[:, columns] = 0
        factor = cholesky(h[columns, columns], PROXIMAL)
        own = own + torch.cholesky_solve((others @ h[:, columns]).T, factor).T
        blocks[b, : own.shape[1], : own.shape[0]] = own.T
    return _permuted(BlockDiagonal(blocks), _behind(n, k * q), torch.arange(m), n)


def _behind(n: int, width: int) -> Tensor:
    """0 … n-1 and then any feature again, where the blocks' weights are zero."""
    return torch.arange(width).clamp_max(n - 1)


def _adopt_one(parts: list[Component], weight: Tensor) -> list[Component]:
    """One zero row, for all of them to read, to the component with the fewest rows; zero columns are left unread."""
    dead = (weight == 0).all(1).nonzero().flatten()[:1]
    i = min(range(len(parts)), key=lambda j: len(parts[j].rows))
    return [Component(torch.cat([c.rows, dead]), c.columns) if j == i else c for j, c in enumerate(parts)]


def _operator(weight: Tensor, parts: Sequence[Component]) -> AbstractMatrix:
    """Blocks of one shape together; padded to the largest where there are too many shapes, or where padding costs nothing."""
    shapes = Counter((len(c.columns), len(c.rows)) for c in parts)
    q, p = max(s[0] for s in shapes), max(s[1] for s in shapes)
    if len(shapes) > SHAPES:
        shapes = Counter({(q, p): len(parts)})
    runs, columns, rows = [], [], []
    for width, height in shapes:
        run = [c for c in parts if len(shapes) == 1 or (len(c.columns), len(c.rows)) == (width, height)]
        blocks = torch.zeros(len(run), width, height, dtype=weight.dtype)
        for block, c in zip(blocks, run, strict=True):
            block[: len(c.columns), : len(c.rows)] = weight[c.rows[:, None], c.columns].T
        runs.append(blocks)
        columns += [c.columns[torch.arange(width).clamp_max(len(c.columns) - 1)] for c in run]
        rows += [torch.nn.functional.pad(c.rows, (0, height - len(c.rows)), value=-1) for c in run]
    order = torch.cat(rows)
    places = torch.full((weight.shape[0],), -1)
    places[order[order >= 0]] = (order >= 0).nonzero().flatten()
    dead = (weight == 0).all(1)
    places[dead & (places < 0)] = places[dead].max() if dead.any() else -1  # all zero rows read one
    inner = BlockDiagonal(runs[0]) if len(runs) == 1 else UnequalBlocks(tuple(runs))
    return _permuted(inner, torch.cat(columns), places, weight.shape[1])


def _permuted(inner: AbstractMatrix, columns: Tensor, rows: Tensor, features: int) -> AbstractMatrix:
    """inner between two gathers, identities left out."""
    factors: list[AbstractMatrix] = [inner]
    if not torch.equal(columns, torch.arange(features)):
        factors.insert(0, Permutation(columns, features))
    if not torch.equal(rows, torch.arange(inner.shape[0])):
        factors.append(Permutation(rows, inner.shape[0]))
    return inner if len(factors) == 1 else Compose(tuple(factors))
