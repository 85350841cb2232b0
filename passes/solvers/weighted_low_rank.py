"""min sum_ij w_ij (m_ij - s_ij - (U V^T)_ij)^2 over U (m, r), V (n, r) and a sparse S: alternating half-steps that need not be exact.

A half-step is a regression of r unknowns for each row, (V^T W_i V) u_i = V^T W_i m_i; exactly it costs |W| r^2 + m r^3. Here it is `inner`
conjugate gradient steps from where u_i stands, all rows sharing the preconditioner (V^T diag(mean of W) V)^-1: |W| r each. S takes the
`kept` entries of largest w r^2 exactly, so they are out of the fit's way: the split into sparse and low rank.
Sources: Gu, Song, Yin and Zhang (arXiv:2302.11068), inexact half-steps suffice; Song, Ye, Yin and Zhang (arXiv:2306.04169), real weights;
warm starts and the shared preconditioner in place of their sketches are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.passes.solvers.bcd.engine import AbstractProblem, AbstractUpdate, Stage, Stop, minimise
from rewriter.passes.solvers.bcd.selection import Cyclic
from rewriter.passes.solvers.bcd.update import conjugate
from rewriter.passes.solvers.observed import observed
from rewriter.passes.solvers.spectral import cholesky

ROUNDS, INNER = 10, 2
RIDGE = 1e-9  # relative, of the regressions: rows without a weight have one, at zero
OVERSAMPLED, POWER = 8, 2  # of the randomised start


@dataclass(frozen=True)
class Completed:
    """M ~ left right^T + sparse; the factors' columns carry equal norms."""

    left: Tensor  # (m, r)
    right: Tensor  # (n, r)
    sparse: Tensor | None  # (m, n) sparse COO
    losses: tuple[float, ...]  # at the start and after each round, falling

    def dense(self) -> Tensor:
        """(m, n)."""
        low = self.left @ self.right.T
        return low if self.sparse is None else low + self.sparse.to_dense()


def complete(
    target: Tensor,
    weights: Tensor,
    rank: int,
    rng: torch.Generator,
    kept: int = 0,
    inner: int = INNER,
    rounds: int = ROUNDS,
    rtol: float = 0.0,
) -> Completed:
    """Fits (m, n) under nonnegative weights or a mask (m, n); `inner` = 0 solves every half-step exactly.

    What stands in target where the weight is zero is never read. Raises ValueError where shapes differ, a weight is negative or not
    finite, the target is not finite where it is read, or rank or kept cannot be.
    """
    m, n = target.shape
    if weights.shape != target.shape or not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
        raise ValueError(f"weights of shape {tuple(weights.shape)} for a {m} x {n} target; give one finite weight >= 0 for each entry")
    if not 0 < rank <= min(m, n) or not 0 <= kept <= m * n:
        raise ValueError(f"rank {rank} with {kept} sparse entries of a {m} x {n} target; the rank is 1 to {min(m, n)}")
    seen = weights > 0
    if not bool(target[seen].isfinite().all()):
        raise ValueError("the target holds NaN or inf where the weight is not zero; give such entries the weight 0")
    problem = _Completion(torch.where(seen, target, 0.0), weights.to(target.dtype), rank, kept, rng)
    half = _Half(inner)
    program = [Stage[str, _Move]("half-steps", Cyclic(["left", "right"]), half, 2)]
    if kept:
        program.append(Stage("support", Cyclic(["support"]), half))
    found = minimise(problem, program, Stop(rounds, rtol=rtol), rng)
    left, right = _balanced(problem.factors["left"], problem.factors["right"])
    sparse = problem.seen.matrix((1 - problem.free) * problem.residual).to_sparse() if kept else None
    return Completed(left, right, sparse, found.values)


@dataclass(frozen=True)
class _Move:
    change: float
    value: Tensor  # the factor, or 0 where S takes an entry and 1 elsewhere
    residual: Tensor


class _Completion(AbstractProblem[str, _Move]):
    """Blocks are "left", "right" and "support"; numbers of entries are held where one is observed."""

    def __init__(self, target: Tensor, weights: Tensor, rank: int, kept: int, rng: torch.Generator) -> None:
        self.seen, self.kept = observed(weights > 0), kept
        self.weights = self.active = self.seen.values(weights)  # active: 0 where S takes the entry
        self.free = torch.ones_like(self.weights)
        self.factors = dict(zip(("left", "right"), _start(target, weights, rank, rng), strict=True))
        self.residual = self.seen.values(target) - self.seen.image(self.factors["left"], self.factors["right"])
        self.lost = self.loss(self.residual, self.active)

    def value(self) -> float:
        return self.lost

    @staticmethod
    def loss(residual: Tensor, active: Tensor) -> float:
        return float(torch.dot((active * residual).flatten(), residual.flatten()))

    def change(self, block: str, move: _Move) -> float:
        return move.change

    def apply(self, block: str, move: _Move) -> None:
        if block == "support":
            self.free, self.active = move.value, self.weights * move.value
        else:
            self.factors[block], self.residual = move.value, move.residual
        self.lost += move.change


@dataclass(frozen=True)
class _Half(AbstractUpdate[str, _Move]):
    inner: int

    def propose(self, problem: AbstractProblem[str, _Move], block: str) -> _Move:
        assert isinstance(problem, _Completion)
        return self._support(problem) if block == "support" else self._factor(problem, block)

    def _support(self, problem: _Completion) -> _Move:
        """The entries of largest w r^2 go to S."""
        gains = (problem.weights * problem.residual.square()).flatten()
        free = torch.ones_like(gains)
        free[gains.topk(min(problem.kept, int((gains > 0).sum()))).indices] = 0
        free = free.view_as(problem.free)
        return _Move(problem.loss(problem.residual, problem.weights * free) - problem.lost, free, problem.residual)

    def _factor(self, problem: _Completion, block: str) -> _Move:
        """A regression of each row of the factor on the other factor."""
        seen, active, here = problem.seen, problem.active, problem.factors[block]
        other = problem.factors["right" if block == "left" else "left"]
        onto = seen.onto_left if block == "left" else seen.onto_right

        def image(rows: Tensor, basis: Tensor) -> Tensor:
            return seen.image(rows, basis) if block == "left" else seen.image(basis, rows)

        if self.inner:
            mean = active.sum() / (len(here) * len(other))
            factor = cholesky((other.T @ other) * mean.clamp_min(torch.finfo(other.dtype).tiny), RIDGE)
            basis = torch.linalg.solve_triangular(factor, other.T, upper=False).T  # in which the mean row's system is the identity
            slope = onto(active * problem.residual, basis)
            moved = conjugate(lambda d: onto(active * image(d, basis), basis), slope, torch.ones_like(slope), self.inner)
            step = torch.linalg.solve_triangular(factor.mT, moved.T, upper=True).T
        else:
            pairs = (other[:, :, None] * other[:, None, :]).flatten(1)
            every = seen.matrix(active)
            grams = ((every if block == "left" else every.T) @ pairs).view(-1, other.shape[1], other.shape[1])
            step = torch.cholesky_solve(onto(active * problem.residual, other)[..., None], cholesky(grams, RIDGE))[..., 0]
        after = problem.residual - image(step, other)
        return _Move(problem.loss(after, active) - problem.lost, here + step, after)


def _start(target: Tensor, weights: Tensor, rank: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The leading singular vectors of what is observed, by a randomised range; scaled up for what is not."""
    share = weights / weights.amax().clamp_min(torch.finfo(weights.dtype).tiny)
    seen = target * share / share.mean().clamp_min(torch.finfo(weights.dtype).tiny)
    width = min(rank + OVERSAMPLED, *seen.shape)
    basis = torch.linalg.qr(seen @ torch.randn(seen.shape[1], width, generator=rng, dtype=seen.dtype)).Q
    for _ in range(POWER):
        basis = torch.linalg.qr(seen @ torch.linalg.qr(seen.T @ basis).Q).Q
    u, s, v = torch.linalg.svd(basis.T @ seen, full_matrices=False)
    scale = s[:rank].sqrt()
    return basis @ u[:, :rank] * scale, v[:rank].T * scale


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthogonal columns of equal norms on both sides."""
    (a, b), (c, d) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, s, v = torch.linalg.svd(b @ d.T)
    return a @ u * s.sqrt(), c @ v.T * s.sqrt()
