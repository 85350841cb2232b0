"""Inputs of the structure tests: anisotropic moments, weights whose spectrum falls slowly, maps as modules."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.backends.fx.custom_op import MAP
from rewriter.moments import Moments
from rewriter.operator import AbstractMap, flatten


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Mapped(torch.nn.Module):
    """A map as one opaque node, its tensors parameters."""

    def __init__(self, operator: AbstractMap) -> None:
        super().__init__()
        leaves, self.spec = flatten(operator)
        self.leaves = torch.nn.ParameterList(torch.nn.Parameter(leaf, requires_grad=False) for leaf in leaves)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        found: list[Tensor] = MAP(list(inputs), list(self.leaves), self.spec, "it")
        return found


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
