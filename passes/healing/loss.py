"""What healing makes small: how far each block's state, and the output, are from the dense model's.

    L = mean_b w_b |s_b - t_b|^2 / |t_b|^2  +  OUTPUT * (|y - y'|^2 / |y|^2 + the same of the means over each sample's rows)

Block weights (an option): w_b = 2 - exp(-d_b^2 / 2 s^2), d_b the decibels by which block b's signal-to-noise ratio, smoothed, lies below
the best one's (Momentum-GS, arXiv:2412.04887, for PSNR there). Logits are compared as distributions, KL(dense | rewritten).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

OUTPUT = 5.0  # the output's part against one block's
SMOOTHED = 0.9
DECIBELS = 3.0  # s


@dataclass
class Loss:
    """`weighted`: blocks that lag get more; `logits`: outputs by name that are compared as distributions."""

    weighted: bool = False
    logits: frozenset[str] = frozenset()
    noise: dict[str, float] = field(default_factory=dict)  # each block's decibels, smoothed

    def __call__(self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
        """The loss of one batch, a scalar, from the states that `states` names."""
        blocks = [name for name in wanted if not name.startswith(":")]
        errors = {name: distance(found[name], wanted[name]) for name in blocks}
        weights = self._weights(errors)
        total = sum((weights[name] * error for name, error in errors.items()), torch.zeros(())) / max(len(blocks), 1)
        for name in [name for name in wanted if name not in errors]:
            total = total + OUTPUT * self.output(name, found[name], wanted[name])
        return total

    def output(self, name: str, found: Tensor, wanted: Tensor) -> Tensor:
        """The distance of one output."""
        if name.removeprefix(":") in self.logits:
            given = torch.log_softmax(wanted, -1)
            return (given.exp() * (given - torch.log_softmax(found, -1))).sum(-1).mean()
        return distance(found, wanted)

    def _weights(self, errors: Mapping[str, Tensor]) -> dict[str, float]:
        if not self.weighted:
            return dict.fromkeys(errors, 1.0)
        for name, error in errors.items():
            now = -10 * math.log10(max(float(error.detach()), 1e-12))
            self.noise[name] = SMOOTHED * self.noise.get(name, now) + (1 - SMOOTHED) * now
        best = max(self.noise.values())
        return {name: 2 - math.exp(-((best - self.noise[name]) ** 2) / (2 * DECIBELS**2)) for name in errors}


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """|found - wanted|^2 / |wanted|^2."""
    return (found - wanted).square().sum() / wanted.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
