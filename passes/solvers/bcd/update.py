"""How a block moves, with gradient g_b, bound H_b, its largest eigenvalue L_b:

    Gradient  -g_b / L_b         Newton  -t (d2f_bb)^-1 g_b, t halved to Armijo's fall       PCG  a few conjugate gradient steps on it
    Forest    Newton by messages       TwoMetric  Newton where a bound does not hold, gradient where it does, projected     Support  N of M

All but Support keep x above the problem's `lower`, but only Gradient and TwoMetric are sure to descend beside such a bound.
Source: JMLR 23(131), 2022, sections 4 to 6; two metrics: Gafni and Bertsekas, SIAM J. Control Optim. 22(6), 1984.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.passes.solvers.bcd.engine import AbstractProblem, AbstractUpdate
from rewriter.passes.solvers.bcd.forest import solve_forest
from rewriter.passes.solvers.bcd.smooth import AbstractSmooth, positive
from rewriter.passes.solvers.bcd.supports import best_support

ARMIJO = 1e-4  # of the fall that the slope promises
HALVINGS = 40


@dataclass(frozen=True)
class Gradient(AbstractUpdate[Tensor, Tensor]):
    """`search`: L_b is looked for from the largest L_i of the block, doubled until f falls as it promises, in place of an eigenvalue."""

    search: bool = False

    def propose(self, problem: AbstractProblem[Tensor, Tensor], block: Tensor) -> Tensor:
        assert isinstance(problem, AbstractSmooth)
        g = problem.slope(block)
        if not self.search:
            return _projected(problem, block, -g / torch.linalg.eigvalsh(problem.curvature(block))[-1])
        bound = float(problem.diagonal[block].max())
        for _ in range(HALVINGS):
            move = _projected(problem, block, -g / bound)
            if problem.change(block, move) <= float(g @ move) + bound / 2 * float(move @ move):
                return move
            bound *= 2
        return torch.zeros_like(g)


class AbstractSearched(AbstractUpdate[Tensor, Tensor]):
    """A direction, halved until f falls as its slope promises."""

    @abc.abstractmethod
    def direction(self, problem: AbstractSmooth, block: Tensor, g: Tensor) -> Tensor:
        """(b,) from the block's gradient g (b,)."""

    def propose(self, problem: AbstractProblem[Tensor, Tensor], block: Tensor) -> Tensor:
        assert isinstance(problem, AbstractSmooth)
        g = problem.slope(block)
        move = self.direction(problem, block, g)
        for _ in range(HALVINGS):
            here = _projected(problem, block, move)
            if problem.change(block, here) <= ARMIJO * float(g @ here):
                return here
            move = move / 2
        return torch.zeros_like(move)


@dataclass(frozen=True)
class Newton(AbstractSearched):
    """Exact on quadratics. `bound`: with H_b in place of the Hessian, the paper's matrix update, which scores by H_b foretell."""

    bound: bool = False

    def direction(self, problem: AbstractSmooth, block: Tensor, g: Tensor) -> Tensor:
        return -_solve(problem.curvature(block) if self.bound else problem.hessian(block), g)


@dataclass(frozen=True)
class PCG(AbstractSearched):
    """`steps` of conjugate gradients on Newton's system, preconditioned by its diagonal: every step lowers the quadratic model."""

    steps: int = 4

    def direction(self, problem: AbstractSmooth, block: Tensor, g: Tensor) -> Tensor:
        h = problem.hessian(block)
        return conjugate(lambda v: h @ v, -g, 1 / positive(h.diagonal()), self.steps)


@dataclass(frozen=True)
class Forest(AbstractSearched):
    """Newton's move of a block whose graph is a forest."""

    def direction(self, problem: AbstractSmooth, block: Tensor, g: Tensor) -> Tensor:
        return -solve_forest(problem.hessian(block), g)


@dataclass(frozen=True)
class TwoMetric(AbstractSearched):
    """Identifies which bounds hold in finitely many steps, and then converges like Newton."""

    def direction(self, problem: AbstractSmooth, block: Tensor, g: Tensor) -> Tensor:
        free = (problem.x[block] > problem.lower) | (g < 0)
        move = -g / problem.diagonal[block]
        if bool(free.any()):
            move[free] = -_solve(problem.hessian(block)[free][:, free], g[free])
        return move


@dataclass(frozen=True)
class Support(AbstractUpdate[Tensor, Tensor]):
    """Keeps `n` entries of the block, the others at zero: mask and values by trying every support under the block's bound."""

    n: int = 2

    def propose(self, problem: AbstractProblem[Tensor, Tensor], block: Tensor) -> Tensor:
        assert isinstance(problem, AbstractSmooth)
        h, x = problem.curvature(block), problem.x[block]
        right = h @ x - problem.slope(block)
        return best_support(torch.ones(1, 1, dtype=x.dtype), h, right[None], self.n)[0][0] - x


def conjugate(times: Any, right: Tensor, preconditioner: Tensor, steps: int) -> Tensor:
    """`steps` of preconditioned conjugate gradients from zero on H d = right; H by `times`, the preconditioner by its diagonal.

    Each leading index is a system of its own: the last axis is summed over.
    """
    d, rest = torch.zeros_like(right), right
    scaled = preconditioner * rest
    way, energy = scaled, (rest * scaled).sum(-1, keepdim=True)
    for _ in range(steps):
        image = times(way)
        bend = (way * image).sum(-1, keepdim=True)
        rate = torch.where(bend > 0, energy / bend, 0.0)
        d, rest = d + rate * way, rest - rate * image
        scaled = preconditioner * rest
        after = (rest * scaled).sum(-1, keepdim=True)
        way, energy = scaled + torch.where(energy > 0, after / energy, 0.0) * way, after
    return d


def _projected(problem: AbstractSmooth, block: Tensor, move: Tensor) -> Tensor:
    return (problem.x[block] + move).clamp_min(problem.lower) - problem.x[block]


def _solve(h: Tensor, r: Tensor) -> Tensor:
    """By Cholesky, by the pseudo-inverse where H is singular."""
    factor, failed = torch.linalg.cholesky_ex(h)
    return torch.linalg.pinv(h, hermitian=True) @ r if bool(failed) else torch.cholesky_solve(r[:, None], factor)[:, 0]
