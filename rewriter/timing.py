"""Timings on shared, noisy machines: callables interleaved in one process, medians, ratios with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Timing:
    """Paired samples, in seconds: sample i of every callable was taken in the same round."""

    samples: tuple[tuple[float, ...], ...]  # one row a callable

    def seconds(self, which: int) -> float:
        """The median."""
        return median(self.samples[which])

    def ratio(self, slow: int, fast: int) -> tuple[float, float, float]:
        """Median of the paired ratios slow/fast, with the 10th and 90th percentile."""
        ratios = sorted(a / b for a, b in zip(self.samples[slow], self.samples[fast], strict=True))
        last = len(ratios) - 1
        return ratios[round(0.1 * last)], median(ratios), ratios[round(0.9 * last)]


def interleave(
    calls: Sequence[Callable[[], object]], seconds: float = 0.5, rounds: int = 200, least: int = 7, again: bool = False
) -> Timing:
    """Time the calls in turn, in rounds, for about `seconds` each; one untimed round first. At least `least` rounds, at most `rounds`.

    `again`: each is called twice in a row and the second time counts: the caches hold what it leaves there itself, as in a loop over it.
    """
    for call in calls:
        call()
    samples: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    while len(samples[0]) < rounds and (len(samples[0]) < least or time.perf_counter() - begin < seconds * len(calls)):
        for row, call in zip(samples, calls, strict=True):
            if again:
                call()
            start = time.perf_counter()
            call()
            row.append(time.perf_counter() - start)
    return Timing(tuple(map(tuple, samples)))
