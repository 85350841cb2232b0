"""Which tiles a product is cut into: the fastest of a short list, timed where it first runs with about so many rows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

FEW_ROWS = 16  # the least that tensor cores multiply
MOST_ROWS = 4096  # beyond, more rows are more of the same
ROUNDS = 7


@dataclass(frozen=True)
class Tiles:
    """Of one program: rows, reduced numbers at a time, columns; and among how many programs a sum is split."""

    rows: int
    reduced: int
    columns: int
    warps: int = 4
    stages: int = 3
    split: int = 1


INTERPRETED = (Tiles(16, 16, 16),)
FEW = (  # the first fits anywhere, for it is what a product takes that is met while a graph is captured
    Tiles(16, 64, 32),
    Tiles(16, 128, 32, 4, 4),
    Tiles(16, 128, 64, 4, 4),
    Tiles(16, 64, 128, 4, 4),
    Tiles(16, 128, 32, 4, 4, 4),
    Tiles(16, 128, 64, 4, 4, 4),
    Tiles(16, 128, 64, 4, 4, 16),
)
MANY = (
    Tiles(32, 32, 32),
    Tiles(32, 64, 64, 4, 4),
    Tiles(64, 64, 64, 4, 4),
    Tiles(64, 64, 128, 4, 4),
    Tiles(128, 64, 64, 4, 4),
    Tiles(128, 64, 128, 8, 3),
    Tiles(128, 64, 256, 8, 3),
    Tiles(64, 64, 64, 4, 4, 4),
)
_FASTEST: dict[Hashable, Tiles] = {}


def about(rows: int) -> int:
    """The next power of two, within bounds: what is timed once for all of these."""
    return min(max(1 << (rows - 1).bit_length(), FEW_ROWS), MOST_ROWS)


def choices(rows: int, q: int, p: int) -> Sequence[Tiles]:
    """Those that suit a product of blocks (q, p): no split of what is one step, no tile twice as wide as a block."""
    listed = FEW if rows <= FEW_ROWS else MANY
    return [listed[0], *(t for t in listed[1:] if (t.split - 1) * t.reduced < q and t.columns < 2 * max(p, FEW_ROWS))]


def fastest(key: Hashable, among: Sequence[Tiles], launch: Callable[[Tiles], None]) -> Tiles:
    """By median time, kept by key; the first, and nothing kept, where a graph is being captured, which admits no timing."""
    if len(among) > 1 and key not in _FASTEST:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return among[0]
        seconds = {tiles: _seconds(functools.partial(launch, tiles)) for tiles in among}
        _FASTEST[key] = min(seconds, key=lambda tiles: seconds[tiles])
    return _FASTEST.get(key, among[0])


def _seconds(call: Callable[[], None]) -> float:
    """Infinite where the device has not the memory on chip for it."""
    from triton.runtime.errors import OutOfResources

    try:
        call()
    except OutOfResources:
        return float("inf")
    samples: list[float] = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    return median(samples) / 1e3
