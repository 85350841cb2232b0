"""Inputs of the structure tests: anisotropic moments, weights whose spectrum falls slowly."""

from __future__ import annotations

import torch

from rewriter.moments import Moments


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def anisotropic(n: int, seed: int = 0) -> Moments:
    """A spectrum i^-1 in a random frame and a few outlier channels, as activations have."""
    rng = generator(seed)
    frame = torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64)).Q
    scale = torch.ones(n, dtype=torch.float64)
    scale[torch.randperm(n, generator=rng)[: max(1, n // 64)]] = 10
    second = scale[:, None] * ((frame / torch.arange(1, n + 1)) @ frame.T) * scale
    return Moments(second, torch.zeros(n, dtype=torch.float64), 0, "synthetic")


def decaying(m: int, n: int, seed: int = 0, power: float = 0.3) -> torch.Tensor:
    """Singular values i^-power in random frames, (m, n) float32."""
    rng = generator(seed)
    k = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(d, k, generator=rng, dtype=torch.float64)).Q for d in (m, n))
    return ((left * torch.arange(1, k + 1, dtype=torch.float64) ** -power) @ right.T).float()
