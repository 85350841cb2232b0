"""W = Σ_ρ A_ρ ⊗ B_ρ: a sum of Kronecker products, y = vec(Σ_ρ B_ρ X A_ρ^T) with x cut into as many pieces as A has columns.

A structure of one's own in one file: an operator (how it multiplies) and a structure (how a weight gets into it). Nothing else is needed
to run, export, count, cache and choose it. Source: Van Loan and Pitsianis 1993 (https://doi.org/10.1007/978-94-015-8196-7_17): the blocks
of W, laid out as the rows of a matrix, have rank r, so its truncated SVD is the nearest such sum in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.ops import AnyOps
from rewriter.passes.solvers.rank_search import find_rank
from rewriter.structure import AbstractStructure, Fitted, NoMatch
from rewriter.tolerances import EXACT

PIECES = (4, 8, 16)  # into how many x and y are cut where nothing is asked
MOST_PIECES = 64  # that discovery tries
MOST_TERMS = 4  # that discovery looks for


@dataclass(frozen=True)
class Kronecker(AbstractMatrix):
    """r (m1 n1 + m2 n2) numbers for an (m1 m2, n1 n2) matrix; each factor is stored once and applied piece by piece."""

    outer: Tensor  # (r*n1, m1) A_ρ^T below each other
    inner: Tensor  # (n2, m2*r) B_ρ^T, the terms of one output side by side
    terms: int  # r

    @property
    def shape(self) -> tuple[int, int]:
        (rows, m1), (n2, columns) = self.outer.shape, self.inner.shape
        return m1 * columns // self.terms, rows // self.terms * n2

    def product(self, ops: AnyOps, x: Any) -> Any:
        (rows, _), (n2, columns) = self.outer.shape, self.inner.shape
        n1, m2 = rows // self.terms, columns // self.terms
        inner, outer = ops.const(self.inner), ops.const(self.outer)
        z = ops.concat([ops.matmul(piece, inner) for piece in ops.split(x, [n2] * n1)])  # (j1, i2, ρ)
        z = ops.shuffle(z, n1)  # (i2, ρ, j1)
        y = ops.concat([ops.matmul(piece, outer) for piece in ops.split(z, [rows] * m2)])  # (i2, i1)
        return ops.shuffle(y, m2)  # (i1, i2)

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(2 * 3, 5, generator=rng), torch.randn(7, 4 * 2, generator=rng), 2)


@dataclass(frozen=True)
class Shape:
    """A is (m1, n1), B is (m2, n2)."""

    m1: int
    n1: int
    m2: int
    n2: int

    @property
    def numbers(self) -> int:
        """Stored by one term."""
        return self.m1 * self.n1 + self.m2 * self.n2

    @property
    def most(self) -> int:
        """Terms that make every matrix."""
        return min(self.m1 * self.n1, self.m2 * self.n2)

    @property
    def is_low_rank(self) -> bool:
        """Where A or B is a column and the other a row, the family is that of `low-rank`."""
        return (self.n1 == 1 and self.m2 == 1) or (self.m1 == 1 and self.n2 == 1)

    def blocks(self, weight: Tensor) -> Tensor:
        """(m, n) -> (m1 n1, m2 n2): a Kronecker product becomes vec(A) vec(B)^T."""
        return weight.reshape(self.m1, self.m2, self.n1, self.n2).permute(0, 2, 1, 3).reshape(self.m1 * self.n1, -1)

    def operator(self, left: Tensor, right: Tensor) -> Kronecker:
        """From left (m1 n1, r) and right (r, m2 n2), left @ right being the blocks."""
        terms = len(right)
        outer = left.reshape(self.m1, self.n1, terms).permute(2, 1, 0).flatten(0, 1)
        inner = right.reshape(terms, self.m2, self.n2).permute(2, 1, 0).flatten(1)
        return Kronecker(outer.contiguous(), inner.contiguous(), terms)


@dataclass(frozen=True)
class KroneckerStructure(AbstractStructure):
    """rows: of the outer factor; columns: of the outer factor, by default the best of three shapes; rank: terms, as many as fit."""

    name: ClassVar[str] = "kronecker"
    rows: int | None = None
    columns: int | None = None
    rank: int | None = None

    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """The nearest sum in the Frobenius norm; the input's moments choose among the shapes only."""
        if not torch.isfinite(weight).all():
            return NoMatch("the weight holds NaN or infinity")
        m, n = weight.shape
        shapes = list(self._shapes(m, n, largest_divisors))
        if not shapes:
            return NoMatch(f"{self.spelling()}: a {m} x {n} weight has no such factors")
        fits = [self._fitted(weight, moments, shape, terms) for shape in shapes if (terms := self._terms(shape, cost_limit))]
        if not fits:
            least = min(shape.numbers for shape in shapes) * (self.rank or 1)
            return NoMatch(f"{self.spelling()} stores at least {least} numbers, the limit is {cost_limit}")
        return min(fits, key=lambda fit: fit.weighted_error)

    def discover(self, weight: Tensor) -> Fitted | NoMatch:
        """Up to four terms, over the divisors of both sides; the form that stores the fewest numbers."""
        if not torch.isfinite(weight).all() or not weight.any():
            return NoMatch("the weight is zero or holds NaN or infinity")
        m, n = weight.shape
        found: list[Fitted] = []
        for shape in self._shapes(m, n, divisors):
            most = min(self.rank or MOST_TERMS, shape.most, (weight.numel() - 1) // shape.numbers)
            found += [exact] if most and (exact := self._exact(weight, shape, most)) else []
        refusal = NoMatch(f"no sum of up to {self.rank or MOST_TERMS} Kronecker products that is smaller")
        return min(found, key=lambda exact: exact.operator.cost().params, default=refusal)

    def _shapes(self, m: int, n: int, pieces: Callable[[int, int], list[tuple[int, int]]]) -> Iterator[Shape]:
        """The shapes asked for; `pieces(m, n)` are pairs (m2, n1) to try where nothing is."""
        if (self.rows and m % self.rows) or (self.columns and n % self.columns):
            return
        wanted = {(m // self.rows if self.rows else m2, self.columns or n1) for m2, n1 in pieces(m, n)}
        shapes = (Shape(m // m2, n1, m2, n // n1) for m2, n1 in sorted(wanted))
        yield from (shape for shape in shapes if not shape.is_low_rank)

    def _terms(self, shape: Shape, limit: int) -> int:
        """As many as asked, or as fit; 0 where that cannot be had."""
        most = min(limit // shape.numbers, shape.most)
        return most if self.rank is None else self.rank if self.rank <= most else 0

    def _spelled(self, shape: Shape, terms: int) -> str:
        return replace(self, rows=shape.m1, columns=shape.n1, rank=terms).spelling()

    def _fitted(self, weight: Tensor, moments: Moments, shape: Shape, terms: int) -> Fitted:
        u, s, v = torch.linalg.svd(shape.blocks(weight.double()), full_matrices=False)
        operator = shape.operator(u[:, :terms] * s[:terms], v[:terms]).to(torch.float32)
        return Fitted(operator, self._spelled(shape, terms), moments.error(weight, operator.dense()))

    def _exact(self, weight: Tensor, shape: Shape, most: int) -> Fitted | None:
        found = find_rank(shape.blocks(weight), most)
        if found is None:
            return None
        exact = shape.operator(found.blocks.left[0, 0], found.blocks.right[0, 0])
        stored = exact.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        residual = float((stored.to(torch.float64).dense() - weight.double()).norm() / weight.double().norm())
        return Fitted(stored, self._spelled(shape, found.rank), residual) if residual <= EXACT[weight.dtype] else None


def divisors(m: int, n: int) -> list[tuple[int, int]]:
    """Every pair of piece counts (m2, n1) up to a bound."""
    return [(a, b) for a in range(1, min(m, MOST_PIECES) + 1) if m % a == 0 for b in range(1, min(n, MOST_PIECES) + 1) if n % b == 0]


def largest_divisors(m: int, n: int) -> list[tuple[int, int]]:
    """A few pairs: for each of PIECES, the largest divisors that do not exceed it."""
    return [(max(a for a in range(1, p + 1) if m % a == 0), max(b for b in range(1, p + 1) if n % b == 0)) for p in PIECES]
