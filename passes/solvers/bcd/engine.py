"""min f, one block at a time: select a block, propose a move of it, take the move where f falls.

    b_t = select(f, x_t),   d_t = update(f, x_t, b_t),   x_{t+1} = x_t + d_t where f(x_t + d_t) <= f(x_t), else x_t

Any selection goes with any update; a program of several stages runs through them in every iteration, so that factors, values and masks of
one fit are blocks of one descent. Because every move is judged by its exact change, f never rises, whatever proposed the move.
Source: Nutini, Laradji and Schmidt, "Let's Make Block Coordinate Descent Converge Faster", JMLR 23(131), 2022, Algorithm 1.
"""

from __future__ import annotations

import abc
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

B = TypeVar("B")  # a block: indices, or the name of a factor
D = TypeVar("D")  # a move of a block


class AbstractProblem(abc.ABC, Generic[B, D]):
    """f at its current point. Law: `change` is f after `apply` minus f before, up to rounding."""

    @abc.abstractmethod
    def value(self) -> float:
        """f now."""

    @abc.abstractmethod
    def change(self, block: B, move: D) -> float:
        """f after the move minus f now."""

    @abc.abstractmethod
    def apply(self, block: B, move: D) -> None:
        """Take the move."""


class AbstractSelection(abc.ABC, Generic[B]):
    """Which block is next."""

    @abc.abstractmethod
    def blocks(self, problem: AbstractProblem[B, D], rng: torch.Generator) -> Iterator[B]:
        """The next block each time it is asked, from the problem as it then stands; ends where no block can gain."""


class AbstractUpdate(abc.ABC, Generic[B, D]):
    """How a block moves."""

    @abc.abstractmethod
    def propose(self, problem: AbstractProblem[B, D], block: B) -> D:
        """A move of the block."""


@dataclass(frozen=True)
class Stage(Generic[B, D]):
    """`repeats` moves of an iteration; `name` is for the trace."""

    name: str
    select: AbstractSelection[B]
    update: AbstractUpdate[B, D]
    repeats: int = 1


@dataclass(frozen=True)
class Stop:
    """After `iterations`, `seconds`, or `patience` iterations in a row that each fell by no more than `rtol` of f, or once f <= `value`."""

    iterations: int = 100
    rtol: float = 0.0
    patience: int = 1
    value: float = -float("inf")
    seconds: float = float("inf")  # what it stops depends on the machine: leave it where the same seed has to give the same result


@dataclass(frozen=True)
class Step:
    """One move: which stage, by how much f changed, whether it was taken, and when."""

    stage: str
    change: float
    taken: bool
    seconds: float  # since the start


@dataclass(frozen=True)
class Result:
    """How a descent ended: "reached" the asked value, "settled", "stuck" (no stage has a block that can gain), or out of "iterations" or
    "seconds"."""

    ended: str
    values: tuple[float, ...]  # f at the start and after each iteration, falling
    trace: tuple[Step, ...] = field(repr=False)

    @property
    def value(self) -> float:
        return self.values[-1]


def minimise(problem: AbstractProblem[B, D], program: Sequence[Stage[B, D]], stop: Stop, rng: torch.Generator) -> Result:
    """Descends from the problem's point, in place. Raises ValueError for a program without stages."""
    if not program:
        raise ValueError("a program has at least one stage")
    queues = [stage.select.blocks(problem, rng) for stage in program]
    values, trace, begun = [problem.value()], list[Step](), time.perf_counter()

    def move(stage: Stage[B, D], block: B) -> float:
        proposed = stage.update.propose(problem, block)
        change = problem.change(block, proposed)
        taken = change <= 0  # so NaN is left
        if taken:
            problem.apply(block, proposed)
        trace.append(Step(stage.name, change, taken, time.perf_counter() - begun))
        return change if taken else 0.0

    def ended() -> str:
        flat = [a - b <= stop.rtol * abs(a) for a, b in itertools.pairwise(values[-stop.patience - 1 :])]
        if values[-1] <= stop.value:
            return "reached"
        if stop.rtol > 0 and len(flat) == stop.patience and all(flat):
            return "settled"
        if len(values) > stop.iterations:
            return "iterations"
        return "seconds" if time.perf_counter() - begun > stop.seconds else ""

    reason = ended()
    while not reason:
        fallen, moved = 0.0, False
        for stage, queue in zip(program, queues, strict=True):
            for _, block in zip(range(stage.repeats), queue, strict=False):
                fallen, moved = fallen + move(stage, block), True
        values.append(values[-1] + fallen)
        reason = ended() if moved else "stuck"
    return Result(reason, tuple(values), tuple(trace))
