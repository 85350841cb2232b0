"""The best approximations of a thin product U D, which is never multiplied out: the singular vectors of an r x r core tell.

    min over rank-k X of tr((U D - X) H (U D - X)^T):   U = Q R,  D H D^T = F F^T,  R F = P S V^T:   X = (Q P_k) (P_k^T R D)

H is the second moment of the input, or the identity. The form on the output's side needs no inverse and no root of H; O((m + n) r^2), and
n^2 r more where H is given. Source: Zhou et al., Block-LoRA (arXiv:2501.16720), whose folded form X is; the core is the usual one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Thin:
    """U D = left right, directions of most energy first."""

    left: Tensor  # (m, r) float64, orthonormal columns
    right: Tensor  # (r, n) float64
    energies: Tensor  # (r,) float64 E|left_i right_i x|^2, falling

    @property
    def rank(self) -> int:
        return len(self.energies)

    @property
    def norm(self) -> float:
        """|U D|."""
        return float(self.right.norm())

    def gone(self, rank: int) -> float:
        """|U D - X|, in the Frobenius norm whatever H was."""
        return float(self.right[rank:].norm())

    def lost(self, rank: int) -> float:
        """The error sqrt(E|(U D - X) x|^2 / E|U D x|^2)."""
        return float((self.energies[rank:].sum() / self.energies.sum().clamp_min(TINY)).sqrt())

    def keeping(self, share: float, level: float) -> int:
        """The least rank that keeps this share of the energy; an error of `level`, relative, is rounding's."""
        missing = self.energies.flip(0).cumsum(0).flip(0)  # at rank 0, 1, …
        return int((missing > max(1 - share, level**2) * self.energies.sum()).sum())

    def own_rank(self, level: float) -> int:
        """The least rank at which no more than rounding's share of |U D| is missing."""
        missing = self.right.square().sum(1).flip(0).cumsum(0).flip(0)
        return int((missing > level**2 * self.right.square().sum()).sum())

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """X as (down (k, n), up (m, k)), whose rows and columns carry equal norms: few bits hold both."""
        sizes = self.right[:rank].norm(dim=1).sqrt().clamp_min(TINY)
        return self.right[:rank] / sizes[:, None], self.left[:, :rank] * sizes


def thin(down: Tensor, up: Tensor, second: Tensor | None = None) -> Thin:
    """Of U (m, r) and D (r, n) under H (n, n); all finite."""
    down, (basis, core) = down.double(), torch.linalg.qr(up.double())
    root = torch.linalg.qr(down.T).R.T if second is None else _root(down @ second.double() @ down.T)
    turned, scales, _ = torch.linalg.svd(core @ root, full_matrices=False)
    return Thin(basis @ turned, turned.T @ core @ down, scales.square())


def _root(gram: Tensor) -> Tensor:
    """F with F F^T = gram."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return torch.as_tensor(vectors * values.clamp_min(0).sqrt())
