"""Atoms and combinators of the operator algebra: most structures are a composition of these.

Monarch = BlockDiagonal . Permutation . BlockDiagonal; ARMOR = BlockDiagonal . Sparse . BlockDiagonal; low rank = Dense . Dense; an adapter
branch = Sum(Dense, low rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from rewriter.operator import AbstractMatrix
from rewriter.ops import AnyOps
from rewriter.packing import pack


@dataclass(frozen=True)
class Dense(AbstractMatrix):
    """y = x @ weight."""

    weight: Tensor  # (n, m)

    @property
    def shape(self) -> tuple[int, int]:
        n, m = self.weight.shape
        return m, n

    def product(self, ops: AnyOps, x: Any) -> Any:
        return ops.matmul(x, ops.const(self.weight))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(7, 5, generator=rng))


@dataclass(frozen=True)
class Diagonal(AbstractMatrix):
    """y = x * scale."""

    scale: Tensor  # (n,)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.scale), len(self.scale)

    def product(self, ops: AnyOps, x: Any) -> Any:
        return ops.mul(x, ops.const(self.scale))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(7, generator=rng))


@dataclass(frozen=True)
class BlockDiagonal(AbstractMatrix):
    """y_b = x_b @ blocks[b]."""

    blocks: Tensor  # (k, q, p)

    @property
    def shape(self) -> tuple[int, int]:
        k, q, p = self.blocks.shape
        return k * p, k * q

    def product(self, ops: AnyOps, x: Any) -> Any:
        return ops.block_matmul(x, ops.const(self.blocks))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(3, 5, 2, generator=rng))


@dataclass(frozen=True)
class Sparse(AbstractMatrix):
    """y = x @ w, of whose every `group` neighbouring inputs `kept` are stored; neighbouring outputs may share theirs."""

    values: Tensor  # (groups * kept, m)
    positions: Tensor  # (bytes, m / shared) uint8, packed
    kept: int
    group: int
    features: int  # n <= groups * group

    @classmethod
    def of(cls, weight: Tensor, kept: int, group: int, shared: int = 1) -> Self:
        """The (n, m) weight as applied, without all but the `kept` largest of each group; `shared` has to divide m."""
        n = len(weight)
        groups = torch.nn.functional.pad(weight, (0, 0, 0, -n % group)).unflatten(0, (-1, group))  # (groups, group, m)
        scores = groups.square().unflatten(2, (-1, shared)).sum(3)
        places = scores.topk(kept, 1).indices.sort(1).values
        values = groups.gather(1, places.repeat_interleave(shared, 2))
        return cls(values.flatten(0, 1), pack(places.flatten(0, 1), group), kept, group, n)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[1], self.features

    def product(self, ops: AnyOps, x: Any) -> Any:
        width = len(self.values) // self.kept * self.group
        x = x if self.features == width else ops.pad(x, width)
        return ops.matmul(x, ops.scatter(ops.const(self.values), ops.const(self.positions), self.kept, self.group))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls.of(torch.randn(11, 6, generator=rng), 2, 4, 3)


@dataclass(frozen=True)
class Permutation(AbstractMatrix):
    """y[j] = x[index[j]]; also a selection, when index leaves some features out."""

    index: Tensor  # (m,) int64
    features: int  # n

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.index), self.features

    def product(self, ops: AnyOps, x: Any) -> Any:
        return ops.gather(x, ops.const(self.index))

    def dense(self) -> Tensor:
        return torch.eye(self.features)[self.index]

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randperm(7, generator=rng), 7)


@dataclass(frozen=True)
class Compose(AbstractMatrix):
    """The factors' product in order of application: the first factor sees x."""

    factors: tuple[AbstractMatrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors[-1].shape[0], self.factors[0].shape[1]

    def product(self, ops: AnyOps, x: Any) -> Any:
        for factor in self.factors:
            x = factor.product(ops, x)
        return x

    def as_product(self) -> tuple[AbstractMatrix, ...]:
        return tuple(inner for factor in self.factors for inner in factor.as_product())

    def balanced(self) -> Compose:
        return Compose(tuple(factor.balanced() for factor in self.factors))

    def unbalanced(self, trained: AbstractMatrix) -> AbstractMatrix:
        assert isinstance(trained, Compose)
        return Compose(tuple(mine.unbalanced(theirs) for mine, theirs in zip(self.factors, trained.factors, strict=True)))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls((Dense.random(rng), Diagonal(torch.randn(5, generator=rng)), Dense(torch.randn(5, 4, generator=rng))))


@dataclass(frozen=True)
class ByTokens(AbstractMatrix):
    """One matrix in two forms: `few` runs in calls of at most `most` tokens, `many` in the others. Both are stored."""

    few: AbstractMatrix
    many: AbstractMatrix
    most: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.few.shape

    def product(self, ops: AnyOps, x: Any) -> Any:
        return ops.by_rows(x, self.most, lambda x: self.few.product(ops, x), lambda x: self.many.product(ops, x))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        down, up = torch.randn(7, 2, generator=rng), torch.randn(2, 5, generator=rng)
        return cls(Compose((Dense(down), Dense(up))), Dense(down @ up), 3)


@dataclass(frozen=True)
class Sum(AbstractMatrix):
    """The sum of the terms' images."""

    terms: tuple[AbstractMatrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.terms[0].shape

    def product(self, ops: AnyOps, x: Any) -> Any:
        total = self.terms[0].product(ops, x)
        for term in self.terms[1:]:
            total = ops.add(total, term.product(ops, x))
        return total

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls((Dense.random(rng), Dense.random(rng)))
