"""What block-dense, monarch and block-shuffle share: settings within a limit, the best fit of several grids, discovery over grids."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace

import torch
from torch import Tensor

from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.passes.solvers.block_descent import SWEEPS, Blocks, descend, refit
from rewriter.passes.solvers.rank_search import Grid, find_grid
from rewriter.passes.structures._common import exact, fitted, too_dear, unusable
from rewriter.structure import AbstractStructure, Fitted, NoMatch

TRIAL_SWEEPS = 2
FURTHER = 0.7  # what descent may make of its start's error; the largest gain seen on trained and synthetic weights was 0.78
Build = Callable[[Grid, Blocks, torch.Size], AbstractMatrix]


def choices(
    name: str, weight: Tensor, moments: Moments, grids: Iterable[Grid], rank: int | None, cost_limit: int
) -> list[tuple[Grid, int]] | NoMatch:
    """The grids that can be had within the limit, each with its rank (the given or the largest); else the cheapest's numbers."""
    if (refused := unusable(weight, moments)) is not None:
        return refused
    m, n = weight.shape
    possible = [g for g in grids if g.k <= n and g.g <= m and (rank or 1) <= min(g.sizes(weight.shape))]
    if not possible:
        return NoMatch(f"a {m} x {n} weight has no such blocks: {', '.join(f'{g.k} by {g.g}' for g in grids)}, rank {rank or 1}")
    affordable = [g for g in possible if g.numbers(weight.shape, rank or 1) <= cost_limit]
    if not affordable:
        least = min(possible, key=lambda g: g.numbers(weight.shape, 1))
        return too_dear(f"{name} of {least.k} by {least.g} blocks, rank {rank or 1},", least.numbers(weight.shape, rank or 1), cost_limit)
    return [(g, rank or min(cost_limit // g.numbers(weight.shape, 1), *g.sizes(weight.shape))) for g in affordable]


def fit_best(structure: AbstractStructure, settings: list[tuple[Grid, int]], weight: Tensor, moments: Moments, build: Build) -> Fitted:
    """The best of the settings after a few sweeps, fitted to the end; the first of equals."""

    def sweep(grid: Grid, rank: int, sweeps: int, start: Blocks | None = None) -> Blocks:
        return descend(weight, moments.second, grid.k, grid.g, rank, sweeps, start)

    trials = [(sweep(grid, rank, TRIAL_SWEEPS), grid, rank) for grid, rank in settings]
    blocks, grid, rank = min(trials, key=lambda trial: trial[0].losses[-1])
    blocks = refit(weight, moments.second, sweep(grid, rank, SWEEPS - TRIAL_SWEEPS, blocks))
    return fitted(build(grid, blocks, weight.shape), spelled(structure, grid, rank), weight, moments)


def may_beat(settings: list[tuple[Grid, int]] | NoMatch, weight: Tensor, moments: Moments, rival: float) -> bool:
    """Whether some setting's start, each block on its own, lies near enough to a rival's weighted error for descent to beat it."""
    if isinstance(settings, NoMatch):
        return False
    energy = moments.energy(weight)
    starts = (descend(weight, moments.second, grid.k, grid.g, rank, sweeps=0).losses[-1] for grid, rank in settings)
    return any(FURTHER**2 * max(loss, 0.0) < rival**2 * energy for loss in starts)


def discovered(structure: AbstractStructure, grids: Iterable[Grid], weight: Tensor, build: Build) -> Fitted | NoMatch:
    """The smallest exact form of a usable weight over the grids."""
    found = find_grid(weight, grids)
    if found is None:
        return NoMatch(f"no {structure.name} grid makes every block of a rank that stores fewer than {weight.numel()} numbers")
    return exact(build(found.grid, found.blocks, weight.shape), spelled(structure, found.grid, found.rank), weight)


def spelled(structure: AbstractStructure, grid: Grid, rank: int) -> str:
    """With concrete settings; rows only where they differ from the blocks."""
    concrete = {"blocks": grid.k, "rows": None if grid.g == grid.k else grid.g, "rank": rank}
    names = {field.name for field in fields(structure)}
    return replace(structure, **{name: value for name, value in concrete.items() if name in names}).spelling()
