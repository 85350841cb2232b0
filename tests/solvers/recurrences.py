"""Planted recurrences: normal, repeated, defective, non-normal; small enough for exact oracles."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.passes.solvers.linear_system import System
from rewriter.passes.solvers.modes import Modes
from rewriter.passes.solvers.s4d import discretize, hippo_legs


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(normal(n, n, seed=7)).Q


def with_ports(a: Tensor, p: int = 2, q: int = 3) -> System:
    n = len(a)
    return System.of(a, normal(n, p, seed=1), normal(q, n, seed=2), normal(q, p, seed=3))


def jordan(n: int, value: float, coupling: float) -> Tensor:
    return value * torch.eye(n, dtype=torch.float64) + coupling * torch.eye(n, dtype=torch.float64).roll(1, 1).triu(1)


def legs(n: int) -> System:
    a, b = discretize(*hippo_legs(n), 0.01, "bilinear")
    return System.of(a, b, normal(1, n, seed=4))


def resonance(angle: float, gap: float) -> System:
    """One conjugate pair at distance gap from the circle."""
    turn = torch.tensor([[0.0, -angle], [angle, 0.0]], dtype=torch.float64)
    return System.of((1 - gap) * torch.matrix_exp(turn), torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]))


def some_modes(reals: int, pairs: int, p: int, q: int, *lead: int) -> Modes:
    """Random decaying modes, with leading channels."""
    m = reals + pairs
    x = torch.complex(normal(*lead, m, seed=1), normal(*lead, m, seed=2))
    b, c = (torch.complex(normal(*s, seed=3), normal(*s, seed=4)) for s in ((*lead, m, p), (*lead, q, m)))
    x[..., :reals], b[..., :reals, :], c[..., :reals] = x[..., :reals].real + 0j, b[..., :reals, :].real + 0j, c[..., :reals].real + 0j
    return Modes(x / (1.1 * (1 + x.abs())), b, c, normal(*lead, q, p, seed=5), reals)


def triangular(n: int) -> Tensor:
    return normal(n, n, seed=5).triu(1) / n**0.5 + torch.diag(0.9 * torch.tanh(normal(n, seed=6)))


Q = orthogonal(16)
PLANTED: dict[str, System] = {
    "orthogonal": with_ports(0.99 * Q),
    "normal, repeated": with_ports(Q @ torch.diag(torch.tensor([0.9, 0.9, -0.5, 0.2], dtype=torch.float64).repeat(4)) @ Q.T),
    "random": with_ports(0.9 * normal(16, 16) / torch.linalg.eigvals(normal(16, 16)).abs().max()),
    "jordan": with_ports(jordan(16, 0.5, 0.5)),
    "slow jordan": with_ports(jordan(16, 0.9, 0.1)),
    "triangular": with_ports(triangular(16)),
    "legs": legs(16),
}
