"""The forms of one matrix: neighbours of a product multiplied ahead of time, thin products of a sum beside one another.

F_j ... F_2 F_1, cut into runs, each run of several one dense matrix;    U_1 D_1 + U_2 D_2 = [U_1 U_2] [D_1; D_2]
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor

from rewriter.algebra import Compose, Dense, Sum
from rewriter.operator import AbstractMatrix, tensors

MOST = 16  # forms of one product that are built and timed


def products(operator: AbstractMatrix) -> list[AbstractMatrix]:
    """The operator as it stands first; then its mergings, of more than MOST those that store the fewest numbers."""
    factors = operator.as_product()
    merged = [cuts for cuts in groupings(len(factors)) if len(cuts) < len(factors) - 1 and _multiplies(factors, cuts)]
    return [operator, *(form(factors, cuts) for cuts in sorted(merged, key=lambda cuts: _numbers(factors, cuts))[: MOST - 1])]


def sums(terms: Sequence[AbstractMatrix]) -> list[AbstractMatrix]:
    """As it stands first; then the products of two dense factors as one, and all of it as one dense matrix."""
    thin = [term for term in terms if _two_dense(term)]
    found: list[AbstractMatrix] = [Sum(tuple(terms))]
    if len(thin) > 1:
        rest = [term for term in terms if not _two_dense(term)]
        found.append(Sum((*rest, beside(thin))) if rest else beside(thin))
    return [*found, Dense(sum(exactly(term) for term in terms).T.to(_dtype(terms[0])).contiguous())]  # type: ignore[union-attr]


def _two_dense(term: AbstractMatrix) -> bool:
    return [type(factor) for factor in term.as_product()] == [Dense, Dense]


def beside(thin: Sequence[AbstractMatrix]) -> AbstractMatrix:
    """The sum of products of two dense factors as one of them."""
    down, up = zip(*(tensors(term) for term in thin), strict=True)
    return Compose((Dense(torch.cat(down, 1)), Dense(torch.cat(up, 0))))


def groupings(count: int) -> list[tuple[int, ...]]:
    """The places to cut a chain of `count` factors: all cuts first (as it stands), then every coarser grouping."""
    inner = range(1, count)
    return [cut for size in range(count - 1, -1, -1) for cut in combinations(inner, size)]


def form(factors: Sequence[AbstractMatrix], cuts: tuple[int, ...]) -> AbstractMatrix:
    """The product with the factors between two cuts multiplied, in double precision."""
    runs = [factors[start:stop] for start, stop in pairwise([0, *cuts, len(factors)])]
    made = [run[0] if len(run) == 1 else dense(Compose(tuple(run))) for run in runs]
    return made[0] if len(made) == 1 else Compose(tuple(made))


def dense(operator: AbstractMatrix) -> Dense:
    """One matrix, multiplied in double precision and stored as its factors are."""
    return Dense(exactly(operator).T.to(_dtype(operator)).contiguous())


def exactly(operator: AbstractMatrix) -> Tensor:
    """(m, n) in double precision."""
    return operator.to(torch.float64).dense()


def _dtype(operator: AbstractMatrix) -> torch.dtype:
    return next(t.dtype for t in tensors(operator) if t.is_floating_point())


def _multiplies(factors: Sequence[AbstractMatrix], cuts: tuple[int, ...]) -> bool:
    """Whether each run of several has numbers to multiply: permutations alone have none."""
    runs = [factors[start:stop] for start, stop in pairwise([0, *cuts, len(factors)])]
    return all(len(run) == 1 or any(t.is_floating_point() for f in run for t in tensors(f)) for run in runs)


def _numbers(factors: Sequence[AbstractMatrix], cuts: tuple[int, ...]) -> int:
    """Stored by the form, without making it."""
    runs = [factors[start:stop] for start, stop in pairwise([0, *cuts, len(factors)])]
    return sum(run[0].cost().params if len(run) == 1 else run[-1].shape[0] * run[0].shape[1] for run in runs)
