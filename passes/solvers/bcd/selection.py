"""Which block is next: in turn, at random, or the one that promises the largest fall.

Scores of a block b with gradient g:   GS |g_b|,   GSL |g_b|^2 / L_b,   GSD sum g_i^2 / L_i,   GSQ g_b^T H_b^-1 g_b.
Over fixed blocks the largest score wins; over variable blocks the `size` coordinates of largest score are the block, which for GSQ is a
search of its own (iterative hard thresholding of the quadratic bound). Source: JMLR 23(131), 2022, sections 3.1 to 3.3.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import networkx
import torch
from torch import Tensor

from rewriter.passes.solvers.bcd.engine import AbstractProblem, AbstractSelection
from rewriter.passes.solvers.bcd.partition import induced_forest
from rewriter.passes.solvers.bcd.smooth import AbstractSmooth, positive

B = TypeVar("B")
Score = Literal["gs", "gsl", "gsd", "gsq"]
THRESHOLDINGS = 10  # steps of the search for GSQ's block, as in the paper's code


@dataclass(frozen=True)
class Cyclic(AbstractSelection[B]):
    """One after the other."""

    partition: Sequence[B]

    def blocks(self, problem: AbstractProblem[B, Any], rng: torch.Generator) -> Iterator[B]:
        while self.partition:
            yield from self.partition


@dataclass(frozen=True)
class Permuted(AbstractSelection[B]):
    """One after the other, in a new order each time round."""

    partition: Sequence[B]

    def blocks(self, problem: AbstractProblem[B, Any], rng: torch.Generator) -> Iterator[B]:
        while self.partition:
            yield from (self.partition[i] for i in torch.randperm(len(self.partition), generator=rng).tolist())


@dataclass(frozen=True)
class Random(AbstractSelection[B]):
    """Independently each time, in proportion to `weights` (one a block), by default evenly."""

    partition: Sequence[B]
    weights: Tensor | None = None

    def blocks(self, problem: AbstractProblem[B, Any], rng: torch.Generator) -> Iterator[B]:
        weights = torch.ones(len(self.partition)) if self.weights is None else self.weights
        while self.partition:
            yield self.partition[int(torch.multinomial(weights, 1, generator=rng))]


@dataclass(frozen=True)
class Custom(AbstractSelection[B]):
    """Whatever a function of the problem says; None ends."""

    choose: Callable[[Any, torch.Generator], B | None]

    def blocks(self, problem: AbstractProblem[B, Any], rng: torch.Generator) -> Iterator[B]:
        while (block := self.choose(problem, rng)) is not None:
            yield block


@dataclass(frozen=True)
class Greedy(AbstractSelection[Tensor]):
    """The fixed block of largest score."""

    partition: Sequence[Tensor]
    score: Score = "gsd"

    def blocks(self, problem: AbstractProblem[Tensor, Any], rng: torch.Generator) -> Iterator[Tensor]:
        assert isinstance(problem, AbstractSmooth)
        scored = _scorer(problem, self.partition, self.score)
        while self.partition:
            slope = descent(problem)
            scores = scored(slope)
            best = int(scores.argmax())
            if not float(scores[best]) > 0:
                return
            yield self.partition[best]


@dataclass(frozen=True)
class Top(AbstractSelection[Tensor]):
    """The `size` coordinates of largest score; for GSL, L_b of a block that may be any is taken for its largest L_i."""

    size: int
    score: Score = "gsd"

    def blocks(self, problem: AbstractProblem[Tensor, Any], rng: torch.Generator) -> Iterator[Tensor]:
        assert isinstance(problem, AbstractSmooth)
        while bool((slope := descent(problem)).any()):
            if self.score == "gsq":
                yield _thresholded(problem, slope, self.size)
            elif self.score == "gsl":
                yield _under_one_bound(slope.square(), problem.diagonal, self.size)
            else:
                scores = slope.square() if self.score == "gs" else slope.square() / problem.diagonal
                yield scores.topk(min(self.size, len(scores))).indices


@dataclass(frozen=True)
class TopForest(AbstractSelection[Tensor]):
    """Coordinates by falling GSD score, each left out that would close a cycle: no forest holds this one and more."""

    graph: networkx.Graph

    def blocks(self, problem: AbstractProblem[Tensor, Any], rng: torch.Generator) -> Iterator[Tensor]:
        assert isinstance(problem, AbstractSmooth)
        while bool((slope := descent(problem)).any()):
            order = (slope.square() / problem.diagonal).argsort(descending=True, stable=True)
            yield torch.tensor(induced_forest(self.graph, order.tolist()))


def descent(problem: AbstractSmooth) -> Tensor:
    """(n,) the gradient, zero where a bound stops the way down."""
    slope = problem.gradient()
    return torch.where((problem.x <= problem.lower) & (slope > 0), 0.0, slope)


def _scorer(problem: AbstractSmooth, partition: Sequence[Tensor], score: Score) -> Callable[[Tensor], Tensor]:
    """(blocks,) scores of a gradient; what does not change from step to step is computed once."""
    if score == "gs":
        return lambda g: torch.stack([g[b].square().sum() for b in partition])
    if score == "gsd":
        return lambda g: torch.stack([(g[b].square() / problem.diagonal[b]).sum() for b in partition])
    bounds = [problem.curvature(b) for b in partition]
    if score == "gsl":
        largest = positive(torch.stack([torch.linalg.eigvalsh(h)[-1] for h in bounds]))
        return lambda g: torch.stack([g[b].square().sum() for b in partition]) / largest
    inverse = [torch.linalg.pinv(h, hermitian=True) for h in bounds]
    return lambda g: torch.stack([g[b] @ h @ g[b] for b, h in zip(partition, inverse, strict=True)])


def _under_one_bound(energy: Tensor, bounds: Tensor, size: int) -> Tensor:
    """The block of largest sum of energies (n,) over largest bound (n,): for each bound that may be the largest, the best under it."""
    order = bounds.argsort(stable=True).tolist()
    held: list[tuple[float, int]] = []
    total, best, highest = 0.0, -1.0, 0.0
    for i in order:
        total += float(energy[i])
        heapq.heappush(held, (float(energy[i]), i))
        total -= heapq.heappop(held)[0] if len(held) > size else 0.0
        if total > best * float(bounds[i]):
            best, highest = total / float(bounds[i]), float(bounds[i])
    allowed = torch.where(bounds <= highest, energy, -1.0)
    return allowed.topk(min(size, int((bounds <= highest).sum()))).indices


def _thresholded(problem: AbstractSmooth, slope: Tensor, size: int) -> Tensor:
    """The support of argmin g . d + d^T H d / 2 over d of `size` entries, by iterative hard thresholding in the metric of L_i."""
    size = min(size, len(slope))
    scale = problem.diagonal.sqrt()
    d = _largest(-slope / scale, size)  # of the scaled move
    for _ in range(THRESHOLDINGS):
        grown = problem.times(d / scale) / scale
        along = float(d @ grown)
        step = float(d @ d) / along if along > 0 else 1.0
        d = _largest(d - step * (slope / scale + grown), size)
    return d.abs().topk(size).indices


def _largest(d: Tensor, size: int) -> Tensor:
    kept = torch.zeros_like(d)
    index = d.abs().topk(size).indices
    kept[index] = d[index]
    return kept
