"""x' = A x + B u in continuous time, made a recurrence by a step dt:  the state spaces that S4 and S4D start from.

HiPPO-LegS (Gu et al. 2020):  A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 above;  B_n = sqrt(2n+1). A + P P^T with
P_n = sqrt(n + 1/2) is -1/2 I plus a skew matrix, hence normal: S4D-LegS keeps its eigenvalues and drops P P^T (Gu et al. 2022,
arXiv:2206.11893). Zero-order hold: exp(dt A), A^-1 (exp(dt A) - I) B; bilinear: (I - dt/2 A)^-1 (I + dt/2 A), (I - dt/2 A)^-1 dt B.
The kernel is K_l = sum of weight Re(c lambda^l b), a product with a Vandermonde matrix: `Modes.response`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rewriter.passes.solvers.modes import Modes

Method = Literal["zoh", "bilinear"]
Start = Literal["legs", "inv", "lin", "real"]


def hippo_legs(n: int) -> tuple[Tensor, Tensor]:
    """A (n, n), B (n, 1) in float64."""
    index = torch.arange(n, dtype=torch.float64)
    root = (2 * index + 1).sqrt()
    return -(torch.outer(root, root).tril(-1) + torch.diag(index + 1)), root[:, None]


def s4d_start(kind: Start, n: int) -> tuple[Tensor, Tensor, int]:
    """Eigenvalues (m,) and B (m,) complex, and how many are real: n / 2 conjugate pairs, or n real modes for "real"; n even."""
    if n < 2 or n % 2:
        raise ValueError(f"a state of {n}; S4D stores conjugate pairs, so that it must be even and positive")
    k = torch.arange(n if kind == "real" else n // 2, dtype=torch.float64)
    ones = torch.ones(len(k), dtype=torch.complex128)
    if kind == "real":
        return -(k + 1) + 0j, ones, n
    if kind == "legs":
        a, b = hippo_legs(n)
        frequency, vectors = torch.linalg.eigh(-0.5j * (a - a.T))
        return torch.complex(-0.5 * ones.real, frequency[n // 2 :]), (vectors.mH @ (b + 0j))[n // 2 :, 0], 0
    imaginary = torch.pi * k if kind == "lin" else n / torch.pi * (n / (2 * k + 1) - 1)
    return torch.complex(-0.5 * ones.real, imaginary), ones, 0


def s4d(kind: Start, n: int, steps: Tensor, c: Tensor, d: Tensor, method: Method = "zoh") -> Modes:
    """One system for each channel: steps dt (H,), c (H, m) complex, d (H,) -> modes with leading dimension H, one input, one output."""
    a, b, reals = s4d_start(kind, n)
    eigenvalues, driven = discretize_diagonal(a, b, steps[:, None].double(), method)
    return Modes(eigenvalues, driven[..., None], c[:, None, :], d[:, None, None], reals)


def discretize_diagonal(a: Tensor, b: Tensor, step: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """(m,) complex each, nonzero a, and step (..., 1) -> the recurrence's eigenvalues and B (..., m)."""
    if method == "zoh":
        return torch.exp(step * a), torch.expm1(step * a) / a * b
    return (1 + step / 2 * a) / (1 - step / 2 * a), step * b / (1 - step / 2 * a)


def discretize(a: Tensor, b: Tensor, step: float, method: Method) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n, p) of the recurrence."""
    n = len(a)
    if method == "zoh":
        block = torch.zeros(n + b.shape[1], n + b.shape[1], dtype=a.dtype)
        block[:n] = step * torch.cat([a, b], 1)
        both = torch.matrix_exp(block)  # [exp(dt A), the integral of exp(t A) B; 0, I]
    else:
        eye = torch.eye(n, dtype=a.dtype)
        both = torch.linalg.solve(eye - step / 2 * a, torch.cat([eye + step / 2 * a, step * b], 1))
    return both[:n, :n].contiguous(), both[:n, n:].contiguous()
