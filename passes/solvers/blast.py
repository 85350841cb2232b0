"""min tr(E H E^T), E = W - M, over M whose blocks share their sides, M_ij = U_i diag(s_ij) V_j^T: block coordinate descent.

With T_ij = (W H)_ij V_j, G_jk = V_j^T H_jk V_k, P_i = U_i^T U_i and K_jk = sum_i (s_ij s_ik^T) o P_i the gradient is linear in each factor:
    U_i:    sum_j T_ij diag(s_ij) - U_i sum_jk diag(s_ij) G_jk diag(s_ik)          solved exactly, r unknowns a row
    s_ij:   diag(U_i^T T_ij) - sum_k (P_i o G_jk) s_ik                             b r unknowns a row of blocks, conjugate gradients
    V_j:    sum_i (H W^T)_ji U_i diag(s_ij) - sum_k H_jk V_k K_kj                  coupled by H, conjugate gradients on H_jj^-1 . K_jj^-1
    ahead:  further along what the last sweep changed, as far as the objective falls
The start is the better of two members: the weighted optimum of rank r, s = 1, and a b x b grid of blocks cut to rank r / b, where column t
of U_i belongs to block j = t - i mod b, with what is left of r on its residual. So the fit is never worse than either. Nothing has to be
disturbed to leave the first: there the gradient in s vanishes in sums over rows and columns of blocks only.
Source: BLAST, Lee et al., NeurIPS 2024 (arXiv:2410.21262), by preconditioned gradients under H = I. This descent is ours; its extrapolation
is the enhanced line search of Rajih, Comon and Harshman, SIAM J. Matrix Anal. Appl. 30(3), 2008.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.passes.solvers.bcd.engine import AbstractProblem, AbstractUpdate, Stage, Stop, minimise
from rewriter.passes.solvers.bcd.selection import Cyclic
from rewriter.passes.solvers.bcd.update import conjugate
from rewriter.passes.solvers.block_descent import descend, refit
from rewriter.passes.solvers.spectral import cholesky, ridged, spectrum

RIDGE = 1e-9  # relative; what it solves are steps, so it makes them shorter and moves no optimum
COUPLING_STEPS, RIGHT_STEPS = 4, 3  # of conjugate gradients
FP64_WORK = 2**25  # multiply-adds of W H above which the sweeps run in float32
GAIN = 2e-3  # of the loss; a sweep that gains less is the last


@dataclass(frozen=True)
class Shared:
    """A b x b grid of blocks left[i] diag(coupling[i, j]) right[j]^T."""

    left: Tensor  # (b, p, r)
    coupling: Tensor  # (b, b, r)
    right: Tensor  # (b, q, r)

    def dense(self) -> Tensor:
        """The (b p, b q) matrix."""
        scaled = self.left[:, None] * self.coupling[:, :, None]  # (b, b, p, r)
        return (scaled @ self.right.mT).transpose(1, 2).reshape(self.left.shape[0] * self.left.shape[1], -1)


class SharedFit:
    """A fit of an (m, n) weight under H (n, n) that can be gone on with; padded with zeros where b does not divide.

    rank <= min(m, n), b <= min(m, n); inputs finite.
    """

    def __init__(self, weight: Tensor, second: Tensor, b: int, rank: int) -> None:
        self._problem = _Fit(weight, second, b, rank)
        self.losses: tuple[float, ...] = (self._problem.loss,)  # tr(E H E^T) at the start and after each sweep, falling

    def descend(self, sweeps: int) -> None:
        """At most so many sweeps more; fewer where one gains little."""
        program = [Stage[str, _Move](name, Cyclic([name]), _Exact()) for name in ("coupling", "left", "right", "ahead")]
        found = minimise(self._problem, program, Stop(sweeps, rtol=GAIN, value=self._problem.negligible), torch.Generator())
        self.losses += found.values[1:]

    @property
    def factors(self) -> Shared:
        """In float64, columns of left and right of equal norms over all blocks, so that the coupling keeps the size that it has."""
        at = self._problem.point
        u, v = (side.double() for side in (at.left, at.right))
        norms = [side.square().sum((0, 1)).sqrt().clamp_min(torch.finfo(torch.float64).tiny) for side in (u, v)]
        even = (norms[1] / norms[0]).sqrt()
        return Shared(u * even, at.coupling.double(), v / even)


@dataclass(frozen=True)
class _Point:
    left: Tensor  # (b, p, r) U
    coupling: Tensor  # (b, b, r) s
    right: Tensor  # (b, q, r) V
    image: Tensor  # (b, b, p, r) T
    gram: Tensor  # (r, r b, b) G, [β, (α, j), k]


@dataclass(frozen=True)
class _Move:
    change: float
    point: _Point


class _Exact(AbstractUpdate[str, _Move]):
    def propose(self, problem: AbstractProblem[str, _Move], block: str) -> _Move:
        assert isinstance(problem, _Fit)
        moves = {"left": problem.left, "coupling": problem.coupling, "right": problem.right, "ahead": problem.ahead}
        return moves[block]()


class _Fit(AbstractProblem[str, _Move]):
    """Blocks are "left", "coupling", "right" and "ahead"; large products run in float32."""

    def __init__(self, weight: Tensor, second: Tensor, b: int, rank: int) -> None:
        m, n = weight.shape
        self.b, self.p, self.q = b, -(-m // b), -(-n // b)
        spare = b * self.q - n
        h = torch.nn.functional.pad(ridged(second), (0, spare, 0, spare))
        padded = torch.nn.functional.pad(weight.double(), (0, spare, 0, b * self.p - m))
        work = torch.float64 if padded.shape[0] * padded.shape[1] ** 2 <= FP64_WORK else torch.float32
        target = padded @ h
        self.energy = float((target * padded).sum())
        self.negligible = self.energy * torch.finfo(work).eps
        corners = torch.stack([h[c * self.q : (c + 1) * self.q, c * self.q : (c + 1) * self.q] for c in range(b)])
        self.corners = cholesky(corners, RIDGE).to(work)  # (b, q, q)
        self.second, self.target = h.to(work).view(-1, b, self.q), target.to(work)  # (b q, b, q) H, (b p, b q) W H
        starts = (self._at(*(factor.to(work) for factor in start)) for start in _starts(padded, h, b, rank))
        self.loss, self.point = min(((self.objective(at), at) for at in starts), key=lambda pair: pair[0])
        self.before = self.latest = self.point  # where the last two sweeps ended

    def value(self) -> float:
        return self.loss

    def change(self, block: str, move: _Move) -> float:
        return move.change

    def apply(self, block: str, move: _Move) -> None:
        self.loss, self.point = self.loss + move.change, move.point
        if block == "right":
            self.before, self.latest = self.latest, self.point

    def objective(self, at: _Point) -> float:
        """tr(E H E^T), exact but for cancellation where it is small beside the energy."""
        crossed = (at.image * at.coupling[:, :, None]).sum(1)
        return self.energy + float(((at.left @ _normal(at) - 2 * crossed) * at.left).sum(dtype=torch.float64))

    def left(self) -> _Move:
        at, normal = self.point, _normal(self.point)
        slope = (at.image * at.coupling[:, :, None]).sum(1) - at.left @ normal  # (b, p, r)
        step = torch.cholesky_solve(slope.mT, cholesky(normal, RIDGE)).mT
        change = ((step @ normal - 2 * slope) * step).sum(dtype=torch.float64)
        return _Move(float(change), _Point(at.left + step, at.coupling, at.right, at.image, at.gram))

    def coupling(self) -> _Move:
        at, b = self.point, self.b
        products = at.left.mT @ at.left  # (b, r, r) P

        def times(s: Tensor) -> Tensor:  # each row of blocks, (b, b r), is a system of its own
            folded = _weighted(at.gram, s.view(b, b, -1))  # (r, r, b, b) [β, α, j, i]
            return torch.einsum("iab,baji->ija", products, folded).reshape(s.shape)

        r = at.left.shape[2]
        own = at.gram.view(r, r, b, b).diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1)  # (r, b)
        bend = (products.diagonal(dim1=1, dim2=2)[:, None] * own.T).flatten(1)  # (b, b r)
        slope = (at.left[:, None] * at.image).sum(2).flatten(1) - times(at.coupling.flatten(1))
        step = conjugate(times, slope, 1 / bend.clamp_min(torch.finfo(bend.dtype).tiny), COUPLING_STEPS)
        change = ((times(step) - 2 * slope) * step).sum(dtype=torch.float64)
        return _Move(float(change), _Point(at.left, at.coupling + step.view(b, b, r), at.right, at.image, at.gram))

    def right(self) -> _Move:
        """In the basis where each block's own system is the identity."""
        at, (b, q, r) = self.point, self.point.right.shape
        scaled = at.coupling.permute(2, 1, 0)[None] * (at.left.mT @ at.left).permute(2, 1, 0)[:, :, None]  # (r, r, b, b) [β, α, j, i]
        mixed = (scaled.flatten(1, 2) @ at.coupling.permute(2, 0, 1)).view(r, r, b, b)  # [β, α, j, k] K
        mixer = mixed.permute(2, 3, 0, 1).flatten(1, 2)  # (b, b r, r) [j, (k, β), α]
        own = cholesky(mixed.permute(2, 3, 1, 0).diagonal(dim1=0, dim2=1).permute(2, 0, 1), RIDGE)  # (b, r, r)

        def there(v: Tensor) -> Tensor:
            half = torch.linalg.solve_triangular(self.corners.mT, v, upper=True)
            return torch.as_tensor(torch.linalg.solve_triangular(own, half, upper=False, left=False))

        def back(v: Tensor) -> Tensor:
            half = torch.linalg.solve_triangular(self.corners, v, upper=False)
            return torch.as_tensor(torch.linalg.solve_triangular(own.mT, half, upper=True, left=False))

        def system(v: Tensor) -> Tensor:
            return self._spread(v) @ mixer

        crossed = (self.target.view(b, self.p, -1).mT @ at.left).view(b, b, q, r)  # [i, j]
        slope = (crossed * at.coupling[:, :, None]).sum(0) - system(at.right)
        moved = conjugate(lambda v: back(system(there(v.view(b, q, r)))).flatten(), back(slope).flatten(), torch.ones(1), RIGHT_STEPS)
        step = there(moved.view(b, q, r))
        change = ((system(step) - 2 * slope) * step).sum(dtype=torch.float64)
        return _Move(float(change), self._at(at.left, at.coupling, at.right + step))

    def ahead(self) -> _Move:
        """Twice as far while the objective falls, else half as far while it does; T is linear along the way, G quadratic."""
        at, last, here = self.latest, self.before, self.objective(self.point)
        u, s, v, t = (getattr(at, name) - getattr(last, name) for name in ("left", "coupling", "right", "image"))
        bent = self._gram(v)
        slope = at.gram - last.gram + bent

        def at_stride(x: float) -> _Move:
            gram = at.gram + x * slope + x * x * bent
            point = _Point(at.left + x * u, at.coupling + x * s, at.right + x * v, at.image + x * t, gram)
            return _Move(self.objective(point) - here, point)

        first = best = at_stride(1.0)
        for factor in (2.0, 0.5) if first.change < 0 else (0.5,):
            stride = factor
            while 0.25 <= stride <= 8 and (further := at_stride(stride)).change < best.change:
                stride, best = stride * factor, further
            if best is not first:
                break
        return best

    def _at(self, left: Tensor, coupling: Tensor, right: Tensor) -> _Point:
        image = self.target.view(self.b, self.p, self.b, self.q).transpose(1, 2) @ right
        return _Point(left, coupling, right, image, self._gram(right))

    def _spread(self, right: Tensor) -> Tensor:
        """(b, q, b r): H_jk V_k at [j, :, k]."""
        return (self.second.transpose(0, 1) @ right).view(self.b, self.b, self.q, -1).permute(1, 2, 0, 3).flatten(2)

    def _gram(self, right: Tensor) -> Tensor:
        b, _, r = right.shape
        return (right.mT @ self._spread(right)).view(b, r, b, r).permute(3, 1, 0, 2).reshape(r, r * b, b)


def _weighted(gram: Tensor, coupling: Tensor) -> Tensor:
    """sum_k G_jk diag(s_ik), (r, r, b, b) at [β, α, j, i]."""
    b, _, r = coupling.shape
    return (gram @ coupling.permute(2, 1, 0)).view(r, r, b, b)


def _normal(at: _Point) -> Tensor:
    """sum_jk diag(s_ij) G_jk diag(s_ik), (b, r, r)."""
    found = torch.einsum("ija,baji->iab", at.coupling, _weighted(at.gram, at.coupling))
    return (found + found.mT) / 2


def _starts(weight: Tensor, second: Tensor, b: int, rank: int) -> Sequence[tuple[Tensor, Tensor, Tensor]]:
    """(U, s, V) of the best low rank and of a grid with the rest on its residual, float64."""
    low = _low_rank(weight, second, b, rank)
    each = rank // b
    blocks = refit(weight, second, descend(weight, second, b, b, each, sweeps=0))  # left (k, g, p, r), right (k, g, r, q)
    t = torch.arange(b)
    column = (t[None, :] - t[:, None]) % b  # [i, t] -> j
    left = blocks.left[column, t[:, None]].permute(0, 2, 1, 3).flatten(2)  # (b, p, b each)
    right = blocks.right[t[:, None], column].permute(0, 3, 1, 2).flatten(2)  # (b, q, b each), rows i = t - j
    mask = (t[:, None, None] + t[None, :, None]) % b == t  # (b, b, b) [i, j, t]
    coupling = mask.double().repeat_interleave(each, 2)
    grid = (left, coupling, right)
    if rank % b == 0:
        return [low, grid]
    rest = _low_rank(weight - blocks.dense(), second, b, rank % b)
    return [low, tuple(torch.cat(pair, 2) for pair in zip(grid, rest, strict=True))]  # type: ignore[list-item]


def _low_rank(weight: Tensor, second: Tensor, b: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    down, up = spectrum(weight, second).truncate(rank)
    return up.T.reshape(b, -1, rank), torch.ones(b, b, rank, dtype=torch.float64), down.reshape(b, -1, rank)
