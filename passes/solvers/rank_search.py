"""Which block grid (k, g) makes every block W[λ, c] of rank r with  k g r (q + s) < m n  numbers?  Found from the weight alone.

A cheap test first: a t x t piece of one block, t just above the largest rank that would pay, has a full set of pivots unless the block's
rank is lower; a full one proves the block's. Only grids that survive are decomposed, all blocks at once, by a randomised range finder
(Halko, Martinsson, Tropp 2011, section 4.3: exact for exact rank) whose residual is then measured. Rows and columns may be strided: with
stride, row group λ holds rows {σ g + λ} and column block c holds columns {i k + c} (the layout of HazyResearch/fly)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.passes.solvers.block_descent import Blocks
from rewriter.tolerances import EXACT

PIVOT = 1e-4  # pivots below this fraction of the root mean square pivot count as none
MARGIN = 8  # spare rows, columns and sketch vectors
GAP = 4.0  # between the last singular value of a block and the first of rounding
TRIALS = 8  # grids decomposed before the search gives up


@dataclass(frozen=True)
class Grid:
    """k column blocks of width q, g row groups of height s, of an (m, n) weight padded with zeros to (g s, k q)."""

    k: int
    g: int
    stride_in: bool = False
    stride_out: bool = False
    most: int | None = None  # bound on the rank

    def sizes(self, shape: torch.Size) -> tuple[int, int]:
        """(s, q)"""
        return -(-shape[0] // self.g), -(-shape[1] // self.k)

    def numbers(self, shape: torch.Size, rank: int) -> int:
        """Stored by factors of this rank."""
        return self.k * self.g * rank * sum(self.sizes(shape))

    def paying(self, shape: torch.Size) -> int:
        """The largest rank that stores fewer numbers than the weight, is a rank of a block and within the bound."""
        s, q = self.sizes(shape)
        return min((shape[0] * shape[1] - 1) // (self.k * self.g * (s + q)), s, q, *([] if self.most is None else [self.most]))

    def blocks(self, weight: Tensor) -> Tensor:
        """(m, n) -> (k, g, s, q)."""
        folded = _fold(weight.T, self.k, self.stride_in)  # (k, q, m)
        return _fold(folded.permute(2, 0, 1), self.g, self.stride_out).permute(2, 0, 1, 3)


def _fold(x: Tensor, parts: int, strided: bool) -> Tensor:
    size = -(-len(x) // parts)
    if len(x) % parts:
        x = torch.cat([x, x.new_zeros(parts * size - len(x), *x.shape[1:])])
    return x.reshape(size, parts, *x.shape[1:]).transpose(0, 1) if strided else x.reshape(parts, size, *x.shape[1:])


def divisors(n: int, most: int) -> list[int]:
    """Divisors of n up to `most`."""
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def block_counts(n: int, most: int) -> list[int]:
    """Block counts worth a look for a side of n: its divisors, and small counts with a shorter last block that is not empty."""
    ragged = [d for d in range(2, 17) if n % d and (d - 1) * -(-n // d) < n]
    return sorted({*divisors(n, most), *(d for d in ragged if d <= most)})


@dataclass(frozen=True)
class Found:
    """An exact block low-rank form."""

    grid: Grid
    blocks: Blocks
    rank: int


def find_rank(weight: Tensor, most: int) -> Found | None:
    """The weight as one block of rank at most `most`, if it is."""
    rank = _Prober(weight).rank_estimate(Grid(1, 1), most)
    return None if rank is None else decompose(weight, Grid(1, 1), rank, most)


def find_grid(weight: Tensor, grids: Iterable[Grid]) -> Found | None:
    """The grid that stores the fewest numbers among those in which the weight is exact and pays."""
    best: Found | None = None
    for estimate, grid in sorted(_survivors(weight, grids), key=lambda pair: pair[0])[:TRIALS]:
        if best is not None and best.grid.numbers(weight.shape, best.rank) <= estimate:
            break
        found = decompose(weight, grid, estimate // grid.numbers(weight.shape, 1), grid.paying(weight.shape))
        if found and (best is None or grid.numbers(weight.shape, found.rank) < best.grid.numbers(weight.shape, best.rank)):
            best = found
    return best


def _survivors(weight: Tensor, grids: Iterable[Grid]) -> Iterator[tuple[int, Grid]]:
    prober = _Prober(weight)
    for grid in grids:
        paying = grid.paying(weight.shape)
        rank = prober.rank_estimate(grid, paying) if paying else None
        if rank is not None:
            yield grid.numbers(weight.shape, rank), grid


class _Prober:
    """Rank estimates from small random pieces; the draw is seeded, so that a search is reproducible."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        self.level = max(PIVOT, 30 * EXACT[weight.dtype])
        self.rng = torch.Generator().manual_seed(0)
        self.row_order, self.column_order = (self._live(alive) for alive in ((weight != 0).any(1), (weight != 0).any(0)))

    def _live(self, alive: Tensor) -> Tensor:
        """The indices that are not all zero, at random."""
        index = alive.nonzero().flatten()
        return index[torch.randperm(len(index), generator=self.rng)]

    def rank_estimate(self, grid: Grid, most: int) -> int | None:
        """A likely rank of a block, at least 1; None when a piece of one proves that it exceeds `most`."""
        estimate = 1
        for group, column in ((0, 0), (grid.g // 2, grid.k // 2)):
            rows = _member(self.row_order, group, grid.g, len(self.weight), grid.stride_out)[: most + MARGIN + 1]
            columns = _member(self.column_order, column, grid.k, self.weight.shape[1], grid.stride_in)[: most + MARGIN + 1]
            estimate = max(estimate, self._pivots(self.weight[rows[:, None], columns]))
            if estimate > most:
                return None
            if grid.k == grid.g == 1:
                break
        return estimate

    def _pivots(self, piece: Tensor) -> int:
        if 0 in piece.shape:
            return 0
        size = min(piece.shape)
        pivots = torch.linalg.lu_factor_ex(piece).LU.diagonal()[:size].abs()
        return int((pivots > self.level * pivots.square().mean().sqrt()).sum())


def _member(order: Tensor, part: int, parts: int, length: int, strided: bool) -> Tensor:
    """Those of `order` that lie in one part of a side."""
    if parts == 1:
        return order
    return order[(order % parts if strided else order // -(-length // parts)) == part]


def _revealed(energies: Tensor, rank: int) -> bool:
    """Whether the spectrum falls off a cliff behind this rank: a smooth tail below the tolerance is small, not structure."""
    return rank >= len(energies) or bool(energies[rank - 1] >= GAP**2 * energies[rank])


def decompose(weight: Tensor, grid: Grid, guess: int, most: int) -> Found | None:
    """Factors of all blocks at the least rank <= most that leaves a residual at rounding level; None when there is none."""
    tolerance = 0.5 * EXACT[weight.dtype] * float(torch.linalg.norm(weight.double()))
    blocks = grid.blocks(weight).double()
    for width in sorted({min(guess + MARGIN, most + 1, *blocks.shape[2:]), min(most + 1, *blocks.shape[2:])}):
        sketch = torch.randn(blocks.shape[-1], width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        side = torch.linalg.qr(blocks @ sketch).Q
        side = torch.linalg.qr(blocks @ torch.linalg.qr(blocks.mT @ side).Q).Q  # without this step, rounding grows as sqrt(rank / MARGIN)
        core = side.mT @ blocks
        missing = float(torch.linalg.norm(blocks - side @ core))
        if missing <= tolerance:
            break
    else:
        return None
    u, sigma, v = torch.linalg.svd(core, full_matrices=False)
    dropped = sigma.square().sum((0, 1)).flip(0).cumsum(0).flip(0)  # energy lost at rank 0, 1, …
    rank = max(1, int((dropped > tolerance**2).sum()))
    if rank > most or not _revealed(sigma.square().sum((0, 1)), rank):
        return None
    factors = Blocks(side @ u[..., :rank], sigma[..., :rank, None] * v[..., :rank, :])
    return Found(grid, factors, rank)
