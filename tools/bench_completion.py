"""Weighted low rank: inexact half-steps against exact ones, and how their cost grows.

    python tools/bench_completion.py

One thread; CPU seconds, the median of interleaved runs with the 10th and 90th percentile of their ratio. Both start from the same factors
and take the same rounds; where the inexact ones end with a loss more than 1 % above, nothing is printed and the exit code is 1. The
exponents are a least squares fit of log time over log size, the time of the start being left out.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from rewriter.passes.solvers.weighted_low_rank import INNER, ROUNDS, Completed, complete
from rewriter.timing import Timing

REPEATS = 5
CASES = (
    ("1024 x 1024, rank 64, half observed", 1024, 64, 0.5),
    ("1024 x 1024, rank 64, log-normal weights", 1024, 64, 0.0),
    ("512 x 512, rank 64, half observed", 512, 64, 0.5),
    ("512 x 512, rank 16, a fifth observed", 512, 16, 0.2),
)
SHARES, RANKS, SIZE = (0.02, 0.04, 0.08, 0.16), (16, 32, 64, 128), 2048


def problem(size: int, rank: int, share: float) -> tuple[Tensor, Tensor]:
    """A target of that rank with noise, and a mask of that share; log-normal weights for a share of 0."""
    rng = torch.Generator().manual_seed(size + rank)
    target = torch.randn(size, rank, generator=rng) @ torch.randn(rank, size, generator=rng) / math.sqrt(rank)
    weights = torch.randn(size, size, generator=rng).exp() if share == 0 else (torch.rand(size, size, generator=rng) < share).float()
    return target + 0.1 * torch.randn(size, size, generator=rng), weights


def timed(target: Tensor, weights: Tensor, rank: int, inner: int, rounds: int = ROUNDS) -> tuple[float, Completed]:
    begun = time.process_time()
    found = complete(target, weights, rank, torch.Generator().manual_seed(0), inner=inner, rounds=rounds)
    return time.process_time() - begun, found


def compared(size: int, rank: int, share: float) -> list[str]:
    target, weights = problem(size, rank, share)
    runs = [(timed(target, weights, rank, 0), timed(target, weights, rank, INNER)) for _ in range(REPEATS)]
    (_, exact), (_, inexact) = runs[-1]
    if not inexact.losses[-1] <= 1.01 * exact.losses[-1]:
        sys.exit(f"{size} x {size}, rank {rank}: a loss of {inexact.losses[-1]:.4g} where exact half-steps reach {exact.losses[-1]:.4g}")
    timing = Timing(tuple(tuple(run[which][0] for run in runs) for which in (0, 1)))
    low, middle, high = timing.ratio(0, 1)
    scale = float((weights * target.square()).sum())
    errors = (f"{math.sqrt(found.losses[-1] / scale):.5f}" for found in (exact, inexact))
    return [f"{timing.seconds(0):.2f}", f"{timing.seconds(1):.2f}", f"{middle:.1f}x ({low:.1f}-{high:.1f})", *errors]


def per_round(rank: int, share: float) -> float:
    """Seconds of a round, from runs of many and of few."""
    target, weights = problem(SIZE, rank, share)
    found = []
    for _ in range(3):
        few, many = (timed(target, weights, rank, INNER, rounds)[0] for rounds in (2, 12))
        found.append((many - few) / 10)
    return median(found)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log sizes."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (sizes, seconds))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def main() -> None:
    torch.set_num_threads(1)
    console = Console(width=130)
    table = Table(title=f"{ROUNDS} rounds, {INNER} conjugate gradient steps a half-step, one thread")
    for head in ("problem", "exact, CPU s", "inexact", "ratio (spread)", "target", "weighted error, exact", "inexact"):
        table.add_column(head)
    for name, size, rank, share in track(CASES, "comparing", console=console, transient=True):
        exact, inexact, ratio, *errors = compared(size, rank, share)
        table.add_row(name, exact, inexact, ratio, "5x" if rank == 64 else "", *errors)
    growth = Table(title=f"one round of {SIZE} x {SIZE}")
    for head in ("over", "at", "ms", "exponent"):
        growth.add_column(head)
    shares = [per_round(64, share) for share in track(SHARES, "shares", console=console, transient=True)]
    ranks = [per_round(rank, 0.1) for rank in track(RANKS, "ranks", console=console, transient=True)]
    for name, sizes, seconds in (
        ("observed entries, rank 64", [share * SIZE**2 for share in SHARES], shares),
        ("rank, 10 % observed", [float(rank) for rank in RANKS], ranks),
    ):
        at, ms = ", ".join(f"{size:,.0f}" for size in sizes), ", ".join(f"{1e3 * s:.0f}" for s in seconds)
        growth.add_row(name, at, ms, f"{exponent(sizes, seconds):.2f}")
    console.print(table)
    console.print(growth)


if __name__ == "__main__":
    main()
