"""sup over |z| = 1 of |G(z)|_2, or of |G - G'|_2 with G' diagonal, bracketed: between the points of a grid too, however narrow a resonance.

The first L terms of the impulse response make P(z) = sum_{l<L} f_l z^-l. For unit vectors, Re(phase z^{L/2} v* P(z) w) is a real
trigonometric polynomial of degree L/2, and one of degree d that has its maximum M at t is at least M cos(d s) at t + s, |s| <= pi/d
(M. Riesz 1914). A grid of N points has one within pi/N of t, so that (Ehlich and Zeller 1964)
    sup |P|  <=  max over the grid of |P| / cos(pi L / (2 N)):        N = 4 L gives 1.083.
The rest of the response is  C A^L (sum_{l<L} A^l z^-l) (I - A^L z^-L)^-1 B z^-L,  of norm at most
    |C A^L| S |B| / (1 - |A^L|),      S = prod (1 + |A^m|), m = 1, 2, 4, ..., L/2  >=  sum_{l<L} |A^l|.
L doubles until that is a hundredth of the peak. Both bounds are rigorous in exact arithmetic and need no eigenvector of A: defective and
non-normal A are no special case. Rounding of f is allowed for by eps n K^2 |C| |B|, K the largest |A^m| met, and by eps sum |f'_l|:
estimates, not proofs. The cost is n^2 L p with L a few times 1 / (1 - rho(A)), whatever the error is; differences cancel in f itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewriter.passes.solvers.linear_system import System
from rewriter.passes.solvers.modes import Modes

OVERSAMPLING = 4  # points of the grid for each term of the response
BETWEEN = 1 / math.cos(math.pi / (2 * OVERSAMPLING))
TAIL = 0.01  # of the peak
WORK = 2**33  # multiply-adds of one response
NUMBERS = 2**25  # of one response
DECOMPOSED = 2**30  # m^3 times the spectra whose singular values are taken; the Frobenius norm bounds the others
SPECTRA = 128  # taken at a time, largest first


@dataclass(frozen=True)
class Gain:
    """lower <= sup |G| <= upper; energy^2 = sum |f_l|_F^2, the mean square of the output for white input, a hundredth off at most."""

    lower: float
    upper: float
    energy: float


UNBOUNDED = Gain(0.0, math.inf, math.inf)


def peak_gain(system: System, modes: Modes | None = None) -> Gain:
    """Of G, or of its difference from that of `modes`; upper <= 1.1 lower + rounding unless many ports exceed DECOMPOSED.

    UNBOUNDED where rho(A) or a mode is 1 or more, or so near that the response does not end within WORK and NUMBERS.
    """
    system, modes = _narrow(system, modes)
    n, (q, p) = len(system.a), system.d.shape
    if 0 in (q, p):
        return Gain(0.0, 0.0, 0.0)
    longest = min(WORK // max(1, n * n * p), NUMBERS // (p * q))
    if longest < 1 or max(system.radius(), modes.radius() if modes else 0.0) >= TAIL ** (1 / longest):
        return UNBOUNDED
    size, summed, growth, eps = _norm(system.c) * _norm(system.b), 1.0, 1.0, torch.finfo(torch.float64).eps
    for states, power in system.doublings():
        length, norm = states.shape[1] // p, _norm(power)
        if length > longest or norm == math.inf:
            return UNBOUNDED
        growth = max(growth, norm)
        rounding = eps * (n * growth**2 * size + (modes.tail(0) if modes else 0.0))
        tail = _norm(system.c @ power) * summed * _norm(system.b) / (1 - norm) if norm < 1 else math.inf
        tail += modes.tail(length) if modes else 0.0
        summed *= 1 + norm
        if tail == math.inf:
            continue
        response = system.impulse(states)
        if modes:
            response = response - modes.response(length).movedim(0, 1)
        peak = float(torch.linalg.norm(response)) / min(p, q) ** 0.5  # at most the true one
        if tail <= max(TAIL * peak, rounding):
            return _bracket(response, tail + rounding)
    raise AssertionError("doublings have no end")


def _bracket(response: Tensor, slack: float) -> Gain:
    """From f (q, L, p), when G differs from its P by at most `slack`."""
    spectrum = torch.fft.rfft(response, n=OVERSAMPLING * response.shape[1], dim=1).transpose(0, 1)  # (k, q, p)
    frobenius, order = torch.linalg.matrix_norm(spectrum).sort(descending=True)
    if 1 in spectrum.shape[1:]:
        lower = upper = float(frobenius[0])
    else:
        count, lower = min(len(order), max(1, DECOMPOSED // min(spectrum.shape[1:]) ** 3)), 0.0
        for start in range(0, count, SPECTRA):
            if float(frobenius[start]) <= lower:  # so are all that follow
                break
            part = spectrum[order[start : min(start + SPECTRA, count)]]
            lower = max(lower, float(torch.linalg.matrix_norm(part, 2).max()))
        upper = max([lower, *frobenius[count : count + 1].tolist()])
    return Gain(max(0.0, lower - slack), upper * BETWEEN + slack, float(torch.linalg.norm(response)))


def _narrow(system: System, modes: Modes | None) -> tuple[System, Modes | None]:
    """The same gain between fewer ports, where the inputs outnumber the rows that read them, or the outputs the columns that write them."""
    d = system.d - modes.d if modes else system.d
    read = _basis([system.b, *([modes.b.real, modes.b.imag] if modes else []), d])
    said = _basis([system.c.T, *([modes.c.real.T, modes.c.imag.T] if modes else []), d.T]).T
    narrowed = System(system.a, system.b @ read, said @ system.c, said @ d @ read)
    if modes:
        modes = replace(modes, b=modes.b @ (read + 0j), c=(said + 0j) @ modes.c, d=torch.zeros_like(narrowed.d))
    return narrowed, modes


def _basis(rows: list[Tensor]) -> Tensor:
    """Orthonormal columns that span all rows, at most as many as these; the identity where that is no gain. (k, p) each -> (p, <= p)."""
    stacked = torch.cat([r for r in rows if bool(r.any())] or rows)
    p = stacked.shape[1]
    return torch.linalg.qr(stacked.T).Q if len(stacked) < p else torch.eye(p, dtype=stacked.dtype)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(x, 2)) if bool(x.isfinite().all()) else math.inf
