"""A + E = V Lambda V^-1 where A has no usable eigenvectors: a small E buys them (Yu et al. 2023, arXiv:2310.01698).

A random E of size s makes kappa(V) about 1/s (their theorem 4): the error of the transfer function grows with s, that of rounding falls.
A search over s finds the valley; from there gradient descent through the eigendecomposition lowers
    |G_E - G|_8^2 / |G|_8^2  +  (u noise)^2 / energy^2
(the 8-norm over a grid stands for the supremum), where the paper has kappa(V) + gamma |E|: that knows nothing of B and C. The same draws,
the same steps: the result depends on the seed alone. Candidates are judged by their certified error, so that a bad one costs time only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.passes.solvers.eigenform import Eigenform, eigenform
from rewriter.passes.solvers.linear_system import System
from rewriter.passes.solvers.modal_error import Reference, unit_roundoff
from rewriter.passes.solvers.modes import Modes

SIZES = torch.logspace(-9, -1, 17, dtype=torch.float64).tolist()  # of |E|_2 / |A|_2
RESTARTS = (1.0, 0.25)  # of the size that is best for a random E: descent favours smaller ones
STEPS = 100
STEP = 0.1  # of the mean entry of E
WORK = 2**28  # n^3 times the steps
PORTS = 4  # more inputs or outputs are mixed into so many while searching
GRID = 2048  # points of the upper half circle
SETTLED = 1e-6
LONGEST = 2**17
TINY = 1e-8


@dataclass(frozen=True)
class Perturbation:
    """What to add to A."""

    e: Tensor  # (n, n)
    form: Eigenform  # of A + E
    size: float  # |E|_2
    found: str  # how


def perturb(system: System, dtype: torch.dtype, seed: int) -> Perturbation | None:
    """The best E of the search; rho(A) < 1, and rho(A + E) < 1. None where no E gave a certified system, or G is 0."""
    rng = torch.Generator().manual_seed(seed)
    few = _mixed(system, rng)
    if (reference := Reference.of(few)) is None or not reference.gain.energy:
        return None
    largest = float(torch.linalg.matrix_norm(system.a, 2)) or 1.0
    draws = [_ginibre(len(system.a), rng) * largest for _ in RESTARTS]

    def cost(e: Tensor) -> float:
        form = eigenform(System(few.a + e, few.b, few.c, few.d))
        return reference.error(form.modes, dtype).total if form else float("inf")

    best_cost, size = min((cost(size * draws[0]), size) for size in SIZES)
    if best_cost == float("inf"):
        return None
    starts = [size * share * draw for share, draw in zip(RESTARTS, draws, strict=True)]
    found = [("random", starts[0]), *(("descent", _descend(reference, start, unit_roundoff(dtype))) for start in starts)]
    how, e = min(found, key=lambda pair: cost(pair[1]))
    form = eigenform(System(system.a + e, system.b, system.c, system.d))
    return Perturbation(e, form, float(torch.linalg.matrix_norm(e, 2)), how) if form else None


def _ginibre(n: int, rng: torch.Generator) -> Tensor:
    e = torch.randn(n, n, generator=rng, dtype=torch.float64)
    return torch.as_tensor(e / torch.linalg.matrix_norm(e, 2))


def _mixed(system: System, rng: torch.Generator) -> System:
    """The same A between at most PORTS random mixtures of its inputs and of its outputs."""
    q, p = system.d.shape
    right = torch.randn(p, PORTS, generator=rng, dtype=torch.float64) if p > PORTS else torch.eye(p, dtype=torch.float64)
    left = torch.randn(PORTS, q, generator=rng, dtype=torch.float64) if q > PORTS else torch.eye(q, dtype=torch.float64)
    return System(system.a, system.b @ right, left @ system.c, left @ system.d @ right)


def _descend(reference: Reference, start: Tensor, unit: float) -> Tensor:
    """The best E met by Adam from `start`, by the smooth objective; it ends early where a mode leaves the circle."""
    system, z, target = reference.system, *_samples(reference.system)
    entry = start.abs().mean()
    scaled = (start / entry).requires_grad_()
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    best, least = start, float("inf")
    for step in range(1, 1 + max(1, min(STEPS, WORK // len(start) ** 3))):
        modes = _modes(system, scaled * entry)
        if modes.radius() >= 1:
            break
        response = torch.einsum("qm,km,mp->kqp", modes.c, z[:, None] / (z[:, None] - modes.eigenvalues), modes.b) + system.d
        objective = (_peak(response - target) / _peak(target)).square() + (unit * modes.noise() / reference.gain.energy).square()
        if not bool(objective.isfinite()):
            break
        if float(objective.detach()) < least:
            best, least = scaled.detach() * entry, float(objective.detach())
        (gradient,) = torch.autograd.grad(objective.log(), scaled)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient.square()
        move = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + TINY)
        scaled = (scaled.detach() - STEP * move).requires_grad_()
    return best


def _modes(system: System, e: Tensor) -> Modes:
    """All n modes of A + E, differentiable in E: to first order V moves to V (I + X), X_ij = (V^-1 dE V)_ij / (lambda_j - lambda_i)."""
    values, vectors = torch.linalg.eig((system.a + e).detach())
    left = torch.linalg.inv_ex(vectors).inverse
    turned = left @ (system.a + e + 0j) @ vectors
    gaps = values - values[:, None]
    turn = torch.where(gaps == 0, 0, turned / torch.where(gaps == 0, 1, gaps))
    b, c = left @ (system.b + 0j), (system.c + 0j) @ vectors
    return Modes(turned.diagonal(), b - turn @ b, c + c @ turn, system.d, len(values))


def _samples(system: System) -> tuple[Tensor, Tensor]:
    """z (k,) on the upper half circle and G there (k, q, p), from the response as far as it matters."""
    for states, power in system.doublings():
        length = states.shape[1] // system.b.shape[1]
        if length >= LONGEST or float(torch.linalg.norm(power)) <= SETTLED:
            break
    spectrum = torch.fft.rfft(system.impulse(states), dim=1)[:, :: max(1, length // (2 * GRID))]
    angles = torch.linspace(0, torch.pi, spectrum.shape[1], dtype=torch.float64)
    return torch.polar(torch.ones_like(angles), angles), spectrum.transpose(0, 1)


def _peak(response: Tensor) -> Tensor:
    """The 8-norm over the grid of the Frobenius norms."""
    return torch.as_tensor(response.abs().square().sum((1, 2)).pow(4).mean().pow(0.125))
