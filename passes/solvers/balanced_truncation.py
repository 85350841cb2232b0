"""P = A P A^T + B B^T,  Q = A^T Q A + C^T C:  in balanced coordinates P = Q = diag(sigma), and dropping the states behind the r-th gives
    sup |G - G_r|  <=  2 sum_{i>r} sigma_i         (Glover 1984, Enns 1984; discrete time: Al-Saggaf and Franklin 1987).
Gramians come as factors, P = F F^T, by Smith doubling  F <- [F, A^m F], m = 1, 2, 4, ...  compressed by QR: no squares, so that small sigma
keep their digits. It ends when A^m F falls to rounding; rho(A) < 1. Holds from a zero initial state; the bound is up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.passes.solvers.linear_system import System

DOUBLINGS = 60


def gramian_factor(a: Tensor, b: Tensor) -> Tensor:
    """F (n, <= n) with F F^T = sum_l A^l B B^T A^lT; ValueError where that does not converge."""
    factor, power = b, a
    for _ in range(DOUBLINGS):
        more = power @ factor
        if not bool(more.isfinite().all()):
            break
        if torch.linalg.norm(more) <= torch.finfo(b.dtype).eps * torch.linalg.norm(factor):
            return factor
        factor, power = torch.linalg.qr(torch.cat([factor, more], 1).T).R.T, power @ power
    raise ValueError("A has an eigenvalue on or outside the unit circle: it has no Gramian")


@dataclass(frozen=True)
class Balanced:
    """A system and the bases of its balanced coordinates."""

    system: System
    hankel: Tensor  # (r,) Hankel singular values, falling
    left: Tensor  # (r, n) state -> balanced state, unscaled by sigma^-1/2
    right: Tensor  # (n, r)

    def bound(self, order: int) -> float:
        """Of sup |G - G_order|."""
        return 2 * float(self.hankel[order:].sum())

    def order_within(self, bound: float) -> int:
        """The least order whose bound is at most this."""
        tails = 2 * self.hankel.flip(0).cumsum(0).flip(0)
        return int((tails > bound).sum())

    def truncate(self, order: int) -> System:
        """G_order, with the D of G."""
        root = self.hankel[:order].sqrt()
        left, right = self.left[:order] / root[:, None], self.right[:, :order] / root
        return System(left @ self.system.a @ right, left @ self.system.b, self.system.c @ right, self.system.d)


def balance(system: System) -> Balanced:
    """The square-root method: U sigma V^T = (factor of Q)^T (factor of P)."""
    reach, see = gramian_factor(system.a, system.b), gramian_factor(system.a.T, system.c.T)
    u, sigma, v = torch.linalg.svd(see.T @ reach, full_matrices=False)
    return Balanced(system, sigma, (see @ u).T, reach @ v.T)
