"""W = I - U V^T: the identity minus a matrix of rank k, y = x + (x @ u) @ v.

A product of k Householder factors I - β v v^T is of this form (compact WY), and so is an orthogonal matrix that turns or mirrors within k
dimensions. Folded it stores as many numbers as any other member; so the fit takes the best member, and a product proper, which never
lengthens a vector, only where `contraction` asks for one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.ops import AnyOps
from rewriter.passes.solvers.householder import Reflectors, wy
from rewriter.passes.solvers.householder_fit import identity_minus, nearest_product
from rewriter.passes.solvers.spectral import spectrum
from rewriter.passes.structures._common import exact, fitted, too_dear, unusable
from rewriter.structure import AbstractStructure, Fitted, NoMatch
from rewriter.tolerances import EXACT


@dataclass(frozen=True)
class HouseholderProduct(AbstractMatrix):
    """2 k n numbers; v holds the sign."""

    u: Tensor  # (n, k)
    v: Tensor  # (k, n)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.u), len(self.u)

    def product(self, ops: AnyOps, x: Any) -> Any:
        return ops.add(x, ops.matmul(ops.matmul(x, ops.const(self.u)), ops.const(self.v)))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(7, 3, generator=rng), torch.randn(3, 7, generator=rng))


def folded(factors: Reflectors) -> HouseholderProduct:
    """The factors in compact WY form, T multiplied into one side."""
    y, t = wy(factors.vectors, factors.betas)
    return HouseholderProduct(y, -(y @ t).T.contiguous())


@dataclass(frozen=True)
class HouseholderStructure(AbstractStructure):
    """factors: k, by default as many as the limit admits; contraction: whether to keep the norm at most 1, by factors with β in [0, 2]."""

    name: ClassVar[str] = "householder"
    factors: int | None = None
    contraction: bool = False

    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """The weighted optimum at its rank, in closed form; with `contraction` a descent. A weight that zero fits better is refused."""
        if (refused := _unusable(weight, moments)) is not None:
            return refused
        n = len(weight)
        count = self.factors or max(1, min(cost_limit // (2 * n), n))
        spelling = replace(self, factors=count).spelling()
        if 2 * count * n > cost_limit:
            return too_dear(spelling, 2 * count * n, cost_limit, cost_limit // (2 * n))
        if count > n:
            return NoMatch(f"{spelling} of a {n} x {n} weight; {n} factors are all of it")
        found = fitted(self._nearest(weight, moments.second, count), spelling, weight, moments)
        if not found.weighted_error < 1:
            return NoMatch(f"{spelling} has a weighted error of {found.weighted_error:.3g}: the weight is far from the identity")
        return found

    def _nearest(self, weight: Tensor, second: Tensor, count: int) -> HouseholderProduct:
        if self.contraction:
            return folded(nearest_product(weight, second, count))
        down, up = spectrum(torch.eye(len(weight), dtype=torch.float64) - weight.double(), second).truncate(count)
        return HouseholderProduct(down, -up)

    def discover(self, weight: Tensor) -> Fitted | NoMatch:
        """The rank at which the singular values of I - W fall to rounding level, where it pays; orthogonal matrices among them."""
        if (refused := _unusable(weight)) is not None:
            return refused
        most = min((len(weight) - 1) // 2, self.factors or len(weight))
        found = identity_minus(weight, most) if most else None
        if found is None:
            return NoMatch(f"the rank of I - W exceeds {most}, the largest that stores fewer than {weight.numel()} numbers")
        norm = float(torch.linalg.matrix_norm(weight.double(), 2)) if self.contraction else 0.0
        if norm > 1 + EXACT[weight.dtype]:
            return NoMatch(f"its norm is {norm:.6g}, a contraction has at most 1")
        u, v = found
        return exact(HouseholderProduct(v.T.contiguous(), -u.T.contiguous()), replace(self, factors=u.shape[1]).spelling(), weight)


def _unusable(weight: Tensor, moments: Moments | None = None) -> NoMatch | None:
    if (refused := unusable(weight, moments)) is not None:
        return refused
    m, n = weight.shape
    return None if m == n else NoMatch(f"a {m} x {n} weight is not square")
