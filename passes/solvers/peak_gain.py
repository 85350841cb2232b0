"""sup over |z| = 1 of |G(z)|_2, bracketed: between the points of a grid too, however narrow a resonance.

The first L terms of the impulse response make P(z) = sum_{l<L} f_l z^-l. For unit vectors, Re(phase z^{L/2} v* P(z) w) is a real
trigonometric polynomial of degree L/2, and one of degree d that has its maximum M at t is at least M cos(d s) at t + s, |s| <= pi/d
(M. Riesz 1914). A grid of N points has one within pi/N of t, so that (Ehlich and Zeller 1964)
    sup |P|  <=  max over the grid of |P| / cos(pi L / (2 N)):        N = 4 L gives 1.083.
The rest of the response is  C A^L (sum_{l<L} A^l z^-l) (I - A^L z^-L)^-1 B z^-L,  of norm at most
    |C A^L| S |B| / (1 - |A^L|),      S = prod (1 + |A^m|), m = 1, 2, 4, ..., L/2  >=  sum_{l<L} |A^l|.
L doubles until that is a hundredth of the peak. Both bounds are rigorous in exact arithmetic and need no eigenvalue of A, so that defective
and non-normal A are no special case. Rounding of f is allowed for by n u K^2 |C| |B|, K the largest |A^m| met: an estimate, not a proof.
The cost is n^2 L p with L a few times 1 / (1 - rho(A)), whatever the error is; differences cancel in f itself, not in norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.passes.solvers.linear_system import System

OVERSAMPLING = 4  # points of the grid for each term of the response
BETWEEN = 1 / math.cos(math.pi / (2 * OVERSAMPLING))
TAIL = 0.01  # of the peak
WORK = 2**34  # multiply-adds of one response; where it ends before the response does, the bracket is true and wide
NUMBERS = 2**25  # of one response
SPECTRA = 512  # matrices whose singular values are taken at a time


@dataclass(frozen=True)
class Gain:
    """lower <= sup |G| <= upper."""

    lower: float
    upper: float


def peak_gain(system: System) -> Gain:
    """The bracket; upper <= 1.1 lower where the response settled within WORK. Infinite where rho(A) >= 1."""
    system = _few_ports(system)
    n, p, q = len(system.a), system.b.shape[1], len(system.c)
    if 0 in (n, p, q):
        exact = float(torch.linalg.matrix_norm(system.d, 2)) if p and q else 0.0
        return Gain(exact, exact)
    if system.radius() >= 1:
        return Gain(math.inf, math.inf)
    longest = min(WORK // (n * n * p), NUMBERS // (p * q))
    size = _norm(system.c) * _norm(system.b)
    summed = growth = 1.0
    for states, power in system.doublings():
        norm, last = _norm(power), 2 * states.shape[1] // p > longest
        growth = max(growth, norm)
        tail = _norm(system.c @ power) * summed * _norm(system.b) / (1 - norm) if norm < 1 else math.inf
        summed *= 1 + norm
        if not last and not tail < math.inf:
            continue
        response = system.impulse(states)
        if last or tail <= TAIL * float(torch.linalg.norm(response)) / min(p, q) ** 0.5:  # that norm is at most the peak
            slack = n * torch.finfo(torch.float64).eps * growth**2 * size
            return _bracket(response, tail + slack)
    raise AssertionError("doublings end only here")


def _bracket(response: Tensor, slack: float) -> Gain:
    """From f (q, L, p), when G differs from its P by at most `slack`."""
    spectrum = torch.fft.rfft(response, n=OVERSAMPLING * response.shape[1], dim=1).transpose(0, 1)
    peak = _largest(spectrum)
    return Gain(max(0.0, peak - slack), peak * BETWEEN + slack)


def _largest(matrices: Tensor) -> float:
    """The largest singular value of all (k, q, p); those of smaller Frobenius norm than one found need no decomposition."""
    frobenius = torch.linalg.matrix_norm(matrices)
    if 1 in matrices.shape[1:]:
        return float(frobenius.max())
    best = 0.0
    for part in frobenius.argsort(descending=True).split(SPECTRA):
        if float(frobenius[part[0]]) <= best:
            break
        best = max(best, float(torch.linalg.matrix_norm(matrices[part], 2).max()))
    return best


def _norm(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x, 2)) if bool(x.isfinite().all()) else math.inf


def _few_ports(system: System) -> System:
    """The same gain with at most n inputs and outputs, where D is zero."""
    if bool(system.d.any()):
        return system
    n, b, c = len(system.a), system.b, system.c
    b = torch.linalg.qr(b.T).R.T if b.shape[1] > n else b
    c = torch.linalg.qr(c).R if len(c) > n else c
    return System.of(system.a, b, c)
