"""How fits grow with the width of a layer: seconds and peak memory of every lossy family at half of the numbers, one thread.

    python tools/bench_fits.py [--widths 512 1024 2048 4096] [--families low-rank monarch]

Square normal weights under a second moment with neighbours correlated and many scales. Each fit runs in a process of its own; memory is
what its high-water mark gains over the inputs, in units of one (n, n) float64 matrix. Exponents are least squares in the logarithm; a
dense decomposition has 3 in time and 2 in memory. "moments": streaming the rows of a calibration at width 512, by their number; a cost
that grows faster than the rows would show there. A fit whose error is not that of its operator is red and ends the run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rewriter import registry
from rewriter.moments import Accumulator, Moments
from rewriter.structure import Fitted
from rewriter.tolerances import EQUAL

FAMILIES = ("low-rank", "pivoted-low-rank", "block-dense", "monarch", "blast", "armor")
SHARE, ROWS = 0.5, (4096, 8192, 16384, 32768)
SHARES = {"armor": 0.5625}  # 2:4 and its wrappers
Point = tuple[float, float]  # seconds, bytes


def fit(family: str, n: int) -> Point:
    """In a process of its own; a small fit before it, so that libraries are loaded."""
    torch.set_num_threads(1)
    _fit(family, *_layer(128))
    weight, seen = _layer(n)
    before, begin = _peak(), time.perf_counter()
    found = _fit(family, weight, seen)
    seconds, peak = time.perf_counter() - begin, _peak()
    if abs(seen.error(weight, found.operator.dense()) - found.weighted_error) > EQUAL[torch.float32][0]:
        raise SystemExit(f"red: {family} at {n}: its error is not that of its operator")
    return seconds, peak - before


def _layer(n: int) -> tuple[Tensor, Moments]:
    weight = torch.randn(n, n, generator=torch.Generator().manual_seed(n)) / n**0.5
    place, scale = torch.arange(n, dtype=torch.float64), torch.logspace(-1, 1, n, dtype=torch.float64)
    second = 0.8 ** (place[:, None] - place).abs() * scale[:, None] * scale
    return weight, Moments(second, torch.zeros(n, dtype=torch.float64), 8 * n, "synthetic")


def _fit(family: str, weight: Tensor, seen: Moments) -> Fitted:
    limit = int(SHARES.get(family, SHARE) * weight.numel())
    found = registry.structures()[family]().fit(weight, seen, limit, torch.Generator().manual_seed(0))
    if not isinstance(found, Fitted):
        raise SystemExit(f"red: {family} at {len(weight)}: {found.reason}")
    return found


def moments(_: str, rows: int) -> Point:
    torch.set_num_threads(1)
    x = torch.randn(rows, 512)
    before, begin = _peak(), time.perf_counter()
    streamed = Accumulator(512)
    streamed.update(x)
    return time.perf_counter() - begin, _peak() - before


def _peak() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def alone(task: Callable[[str, int], Point], family: str, n: int) -> Point:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, family, n).result()


def exponent(sizes: Sequence[int], values: Sequence[float]) -> str:
    if len(sizes) < 2 or min(values) <= 0:
        return "-"
    return f"{np.polyfit(np.log(sizes), np.log(values), 1)[0]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    given, console = parser.parse_args(), Console(width=150)
    shown = Table(title=f"seconds and memory (in n x n float64 matrices) of fits at {SHARE:.0%} of the numbers, one thread")
    for head in ("fit", *(f"n = {n}" for n in given.widths), "exponent, s", "exponent, bytes"):
        shown.add_column(head, justify="left" if head == "fit" else "right")
    for family in given.families:
        points = [alone(fit, family, n) for n in given.widths]
        cells = [f"{s:.1f} s, {b / 8 / n**2:.1f}" for n, (s, b) in zip(given.widths, points, strict=True)]
        seconds, nbytes = zip(*points, strict=True)
        shown.add_row(family, *cells, exponent(given.widths, seconds), exponent(given.widths, nbytes))
        Console(stderr=True).print(family, *cells, style="dim")
    console.print(shown)
    times = [alone(moments, "", rows)[0] for rows in ROWS]
    console.print(
        f"moments of {', '.join(map(str, ROWS))} rows: {', '.join(f'{t:.2f}' for t in times)} s, exponent {exponent(ROWS, times)}"
    )


if __name__ == "__main__":
    main()
