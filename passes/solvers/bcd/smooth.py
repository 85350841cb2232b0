"""Problems that are smooth in one vector x: what selections and updates ask of them, and the two that are measured against the paper.

    LeastSquares  f(x) = |A x - b|^2 / 2 + ridge |x|^2 / 2 + l1 . x        Logistic  f(x) = sum log(1 + exp(-b_i a_i . x)) + ridge |x|^2 / 2

`lower` bounds every x_i from below; with lower = 0 the term l1 . x is l1 |x|_1. A block is a tensor of indices, a move what is added to x.
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from rewriter.passes.solvers.bcd.engine import AbstractProblem


def positive(curvatures: Tensor) -> Tensor:
    """To divide by; a coordinate that nothing depends on has a gradient of 0 and the curvature 0."""
    return curvatures.clamp_min(torch.finfo(curvatures.dtype).tiny)


class AbstractSmooth(AbstractProblem[Tensor, Tensor]):
    """f of x (n,), float64. `curvature` bounds the Hessian of a block everywhere: f(x + d) <= f(x) + g_b . d + d^T H_b d / 2."""

    x: Tensor  # (n,)
    diagonal: Tensor  # (n,) L_i > 0, the diagonal of the bound
    lower: float = -float("inf")

    @abc.abstractmethod
    def gradient(self) -> Tensor:
        """(n,)."""

    @abc.abstractmethod
    def slope(self, block: Tensor) -> Tensor:
        """(b,) the block's part of the gradient, for less."""

    @abc.abstractmethod
    def hessian(self, block: Tensor) -> Tensor:
        """(b, b) at x."""

    @abc.abstractmethod
    def curvature(self, block: Tensor) -> Tensor:
        """(b, b) H_b."""

    @abc.abstractmethod
    def times(self, v: Tensor) -> Tensor:
        """(n,) the whole bound times v."""


class _Linear(AbstractSmooth):
    """f = sum loss_i((A x)_i) + ridge |x|^2 / 2 + l1 . x, with A x at hand."""

    steepest: float  # the largest second derivative of a loss

    def __init__(self, a: Tensor, b: Tensor, ridge: float = 0.0, l1: float = 0.0, lower: float = -float("inf")) -> None:
        self.a, self.b, self.ridge, self.l1, self.lower = a.double(), b.double(), ridge, l1, lower
        self.x = torch.zeros(a.shape[1], dtype=torch.float64)
        self.image = self.a @ self.x  # (m,)
        self.diagonal = positive(self.steepest * self.a.square().sum(0) + ridge)

    @abc.abstractmethod
    def losses(self, image: Tensor) -> Tensor:
        """(m,)."""

    @abc.abstractmethod
    def slopes(self) -> Tensor:
        """(m,) first derivatives at x."""

    @abc.abstractmethod
    def bends(self) -> Tensor:
        """(m,) second derivatives at x."""

    def value(self) -> float:
        return float(self.losses(self.a @ self.x).sum() + self._rest(self.x))

    def _rest(self, x: Tensor) -> Tensor:
        return self.ridge / 2 * x.square().sum() + self.l1 * x.sum()

    def change(self, block: Tensor, move: Tensor) -> float:
        after = self.image + self.a[:, block] @ move
        rest = self._rest(self.x[block] + move) - self._rest(self.x[block])
        return float((self.losses(after) - self.losses(self.image)).sum() + rest)

    def apply(self, block: Tensor, move: Tensor) -> None:
        self.x[block] += move
        self.image += self.a[:, block] @ move

    def gradient(self) -> Tensor:
        return self.a.T @ self.slopes() + self.ridge * self.x + self.l1

    def slope(self, block: Tensor) -> Tensor:
        return self.a[:, block].T @ self.slopes() + self.ridge * self.x[block] + self.l1

    def hessian(self, block: Tensor) -> Tensor:
        part = self.a[:, block]
        return self._ridged(part.T @ (self.bends()[:, None] * part))

    def curvature(self, block: Tensor) -> Tensor:
        part = self.a[:, block]
        return self._ridged(self.steepest * part.T @ part)

    def times(self, v: Tensor) -> Tensor:
        return self.steepest * (self.a.T @ (self.a @ v)) + self.ridge * v

    def _ridged(self, gram: Tensor) -> Tensor:
        return gram + self.ridge * torch.eye(len(gram), dtype=torch.float64)


class LeastSquares(_Linear):
    """a: (m, n), b: (m,)."""

    steepest = 1.0

    def losses(self, image: Tensor) -> Tensor:
        return (image - self.b).square() / 2

    def slopes(self) -> Tensor:
        return self.image - self.b

    def bends(self) -> Tensor:
        return torch.ones_like(self.image)


class Logistic(_Linear):
    """a: (m, n), b: (m,) of -1 and 1."""

    steepest = 0.25

    def losses(self, image: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-self.b * image)

    def slopes(self) -> Tensor:
        return -self.b * torch.sigmoid(-self.b * self.image)

    def bends(self) -> Tensor:
        p = torch.sigmoid(self.b * self.image)
        return p * (1 - p)


class Quadratic(AbstractSmooth):
    """f(x) = x^T H x / 2 - c . x with H (n, n) symmetric positive definite: label propagation is one."""

    def __init__(self, h: Tensor, c: Tensor) -> None:
        self.h, self.c = h.double(), c.double()
        self.x = torch.zeros(len(c), dtype=torch.float64)
        self.image = self.h @ self.x
        self.diagonal = positive(self.h.diagonal())

    def value(self) -> float:
        return float(self.x @ (self.h @ self.x) / 2 - self.c @ self.x)

    def change(self, block: Tensor, move: Tensor) -> float:
        return float(move @ (self.image[block] - self.c[block] + self.h[block][:, block] @ move / 2))

    def apply(self, block: Tensor, move: Tensor) -> None:
        self.x[block] += move
        self.image += self.h[:, block] @ move

    def gradient(self) -> Tensor:
        return self.image - self.c

    def slope(self, block: Tensor) -> Tensor:
        return self.image[block] - self.c[block]

    def hessian(self, block: Tensor) -> Tensor:
        return self.h[block][:, block]

    def curvature(self, block: Tensor) -> Tensor:
        return self.hessian(block)

    def times(self, v: Tensor) -> Tensor:
        return self.h @ v
