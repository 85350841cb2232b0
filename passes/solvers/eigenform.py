"""A = V Lambda V^-1:  B~ = V^-1 B,  C~ = C V,  at the price of kappa(V) = |V| |V^-1| in rounding.

A normal A has a unitary V, which `eig` misses where eigenvalues repeat. There the real parts S = (A + A^T) / 2 and K = (A - A^T) / (2 i) of
A = S + i K commute and are Hermitian, so that the eigenvectors of  cos(t) S + sin(t) K  are A's for almost every t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.passes.solvers.linear_system import System
from rewriter.passes.solvers.modes import Modes

WELL = 2.0  # kappa that calls for no better basis
ANGLES = (0.5, 1.0, 2.0)
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Eigenform:
    """The modes of a system, |b| = |c| in each."""

    modes: Modes
    kappa: float  # of V with columns of unit length


def eigenform(system: System) -> Eigenform | None:
    """None where A has no basis of eigenvectors in float64: kappa above 1 / (n eps)."""
    values, vectors = torch.linalg.eig(system.a)
    kappa = condition(vectors)
    if kappa > WELL and (unitary := _normal(system.a)) is not None:
        (values, vectors), kappa = unitary, 1.0
    if not kappa * len(values) * EPS < 1:
        return None
    left = vectors.mH if kappa == 1.0 else torch.linalg.inv(vectors)
    reals = (values.imag == 0).nonzero()[:, 0]
    kept = torch.cat([reals, (values.imag > 0).nonzero()[:, 0]])
    modes = Modes(values[kept], left[kept] @ (system.b + 0j), (system.c + 0j) @ vectors[:, kept], system.d, len(reals))
    return Eigenform(modes.balanced(), kappa)


def condition(vectors: Tensor) -> float:
    """The ratio of the extreme singular values; 1 for no vectors at all."""
    values = torch.linalg.svdvals(vectors)
    return float(values[0] / values[-1]) if len(values) else 1.0


def _normal(a: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and a unitary basis, its conjugate pairs exact conjugates; None where A is not normal."""
    size, n = float(torch.linalg.norm(a)), len(a)
    if torch.linalg.norm(a @ a.T - a.T @ a) > n * EPS * size**2:
        return None
    found = [_unitary(a, angle, n * EPS * size) for angle in ANGLES]
    residuals = [float(torch.linalg.norm((a + 0j) @ vectors - vectors * values)) for values, vectors in found]
    best = min(range(len(found)), key=residuals.__getitem__)
    return found[best] if residuals[best] <= math.sqrt(EPS) * size else None


def _unitary(a: Tensor, angle: float, level: float) -> tuple[Tensor, Tensor]:
    """The basis that one combination gives; eigenvalues within `level` of the real axis get real vectors."""
    s, k = (a + a.T) / 2, (a - a.T) / 2j
    vectors = torch.linalg.eigh(math.cos(angle) * s + math.sin(angle) * k).eigenvectors
    values = (vectors.conj() * ((a + 0j) @ vectors)).sum(0)
    upper, flat = values.imag > level, values.imag.abs() <= level
    real = torch.linalg.svd(torch.cat([vectors[:, flat].real, vectors[:, flat].imag], 1), full_matrices=False).U[:, : int(flat.sum())]
    on_axis, turn = torch.linalg.eigh(real.T @ s @ real)
    pairs = vectors[:, upper]
    return torch.cat([on_axis + 0j, values[upper], values[upper].conj()]), torch.cat([real @ turn + 0j, pairs, pairs.conj()], 1)
