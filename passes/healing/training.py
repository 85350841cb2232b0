"""The loop: Adam on the factors, a cosine over the time that there is, the best validated weights kept, never worse than the start.

Each tensor's step is relative to its own size (Adafactor's, arXiv:1804.04235, section 8): factors differ by orders of magnitude.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 0.03  # of the whole
CHECKS = 12  # validations at most,
CHECKING = 0.1  # of the time at most
PATIENCE = 4  # validations without a gain in a row, before it ends
SMALLEST = 1e-3  # size below which a tensor's step does not shrink further
CLIP = 1.0
RESERVE = 2.5  # of the longest step and validation seen, kept free before the deadline


@dataclass(frozen=True)
class Clock:
    """A wall-clock promise, or a number of steps, which is reproducible."""

    begin: float
    seconds: float
    steps: int | None = None

    def progress(self, done: int) -> float:
        """0 to 1; of a clock without time, 1."""
        if self.steps is not None:
            return done / self.steps
        return (time.monotonic() - self.begin) / self.seconds if self.seconds else 1.0

    def share(self, seconds: float) -> float:
        """Of the whole, so many seconds; nothing where steps count."""
        return 0.0 if self.steps is not None else seconds / self.seconds

    def part(self, taken: int, end: float, parts: int) -> Clock:
        """One of so many equal parts of what is left until `end`, in progress of the whole, after so many steps."""
        if self.steps is not None:
            return Clock(self.begin, self.seconds, max(1, (int(end * self.steps) - taken) // parts))
        now = time.monotonic()
        return Clock(now, max(self.begin + end * self.seconds - now, 0.0) / parts)

    def less(self, steps: int) -> Clock:
        """What is left after so many steps."""
        return self if self.steps is None else Clock(self.begin, self.seconds, max(self.steps - steps, 1))

    def over(self, done: int, reserve: float) -> bool:
        """Whether the next step, and `reserve` seconds after it, would be too much."""
        if self.steps is not None:
            return done >= self.steps
        return time.monotonic() + reserve - self.begin >= self.seconds


@dataclass
class Trained:
    """What came of it: losses on the validation batches, and the steps."""

    before: float
    after: float
    steps: int = 0

    @property
    def better(self) -> bool:
        return self.after < self.before


def train(
    tensors: Sequence[Tensor],
    loss: Callable[[int], Tensor],
    validate: Callable[[], float],
    batches: Sequence[int],
    clock: Clock,
    rate: float,
    average: float,
    rng: torch.Generator,
    progressed: Callable[[float], None],
    since: float = 0.0,
) -> Iterator[Trained]:
    """Changes `tensors` in place, yielding what came of it so far, once for each percent of progress and at the end.

    loss(batch) is differentiable, `validate` says how good the tensors are as they stand (less is better); `average` > 0: what is validated
    and kept is the moving average of the weights; `progressed` is told before each step how far the run is; nothing is judged before
    `since` of it.
    """
    size = [max(float(t.detach().square().mean().sqrt()), SMALLEST) for t in tensors]
    adam = torch.optim.Adam([{"params": [t], "size": s} for t, s in zip(tensors, size, strict=True)])
    mean = [t.detach().clone() for t in tensors] if average else []

    def validated() -> float:
        with _swapped(tensors, mean), torch.no_grad():
            return validate()

    begin, start = time.monotonic(), clock.progress(0)
    best = [t.detach().clone() for t in tensors]
    came = Trained(before=(first := validated()), after=first)
    longest = checking = time.monotonic() - begin  # the first step is taken for as long as a validation
    percent, looked = 0, since
    stale = halved = 0  # checks without a gain: in a row, and all
    order = _shuffled(batches, rng)

    def check() -> int:
        """0, or one more in a row that was no gain: back to the best weights then, to go on from there at half the rate."""
        if (found := validated()) < came.after:
            came.after = found
            _copy(best, mean or tensors)
            return 0
        _copy(tensors, best)
        if mean:
            _copy(mean, best)
        return stale + 1

    def progress() -> float:
        """0 to 1, from the first step on."""
        return min((clock.progress(came.steps) - start) / (1 - start), 1.0)

    while not clock.over(came.steps, RESERVE * (longest + checking)) and stale < PATIENCE:
        begin, now = time.monotonic(), progress()
        progressed(now)
        for group in adam.param_groups:
            group["lr"] = rate * 0.5**halved * group["size"] * _schedule(now)
        adam.zero_grad()
        loss(next(order)).backward()
        torch.nn.utils.clip_grad_norm_(tensors, CLIP)
        adam.step()
        for kept, tensor in zip(mean, tensors, strict=False):
            kept.lerp_(tensor.detach(), 1 - min(average, (came.steps + 1) / (came.steps + 10)))
        came.steps += 1
        longest = max(longest, time.monotonic() - begin)
        if progress() - looked >= max(1 / CHECKS, clock.share(checking) / CHECKING):
            looked, stale = progress(), check()
            halved += stale > 0
        if (now_percent := int(100 * now)) > percent:
            percent = now_percent
            yield came
    if came.steps:
        check()
        _copy(tensors, best)
    yield came


def _copy(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(into, values, strict=True):
            tensor.copy_(value)


class _swapped:
    """The averaged weights in the tensors' place, for a while."""

    def __init__(self, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        self.tensors, self.others = tensors, others

    def __enter__(self) -> None:
        self.before = [t.detach().clone() for t in self.tensors] if self.others else []
        if self.others:
            _copy(self.tensors, self.others)

    def __exit__(self, *_: object) -> None:
        if self.others:
            _copy(self.tensors, self.before)


def _shuffled(batches: Sequence[int], rng: torch.Generator) -> Iterator[int]:
    """Every batch once, again and again, each time in another order."""
    while True:
        yield from (batches[i] for i in torch.randperm(len(batches), generator=rng))


def _schedule(progress: float) -> float:
    """A short rise, then half a cosine down to nothing."""
    return min(progress / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * progress)) if progress > 0 else 1e-3
