"""What calibration keeps of a site's input x: count, mean E[x] and second moment E[x x^T], streamed in float64.

The weighted error of a replacement W' of W is sqrt(tr(E H E^T) / tr(W H0 W^T)), E = W - W': the expected error of the site's product
relative to the product itself. Where a bias can take the mean error up, H is the covariance (`centered`), and the shift E mean goes to the
bias.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Second-order statistics of a site's input of width n."""

    second: Tensor  # (n, n) float64, E[x x^T]
    mean: Tensor  # (n,) float64
    count: int  # rows seen; 0 where the moments come from a formula
    law: str  # which inputs, for the report
    memo: list[tuple[weakref.ref[Tensor], int, float]] = field(default_factory=list, init=False, compare=False, repr=False)

    @property
    def features(self) -> int:
        return len(self.mean)

    def covariance(self) -> Tensor:
        """E[(x - mean)(x - mean)^T], (n, n)."""
        return torch.addr(self.second, self.mean, self.mean, alpha=-1)

    def centered(self) -> Moments:
        """The moments of x - mean: what a fit sees whose bias takes the mean error up."""
        return replace(self, second=self.covariance(), mean=torch.zeros_like(self.mean))

    def energy(self, weight: Tensor) -> float:
        """E|W x|^2 for an (m, n) weight; remembered for the weight that was asked last, as every family asks it."""
        version = 0 if weight.is_inference() else weight._version  # counts changes in place
        for known, then, value in self.memo:
            if known() is weight and then == version:
                return value
        w = weight.double()
        value = float(((w @ self.second) * w).sum().clamp_min(0))
        self.memo[:] = [(weakref.ref(weight), version, value)]
        return value

    def error(self, weight: Tensor, approximation: Tensor, shifted: bool = False) -> float:
        """The relative weighted error of an (m, n) approximation; `shifted`: the bias takes the mean error up."""
        gap = weight.double() - approximation.double()
        lost = (((gap @ (self.covariance() if shifted else self.second)) * gap).sum()).clamp_min(0)
        return float((lost / max(self.energy(weight), torch.finfo(torch.float64).tiny)).sqrt())

    def shift(self, weight: Tensor, approximation: Tensor) -> Tensor:
        """(W - W') mean, (m,): what the bias gains when W' replaces W."""
        return (weight.double() - approximation.double()) @ self.mean


def isotropic(n: int, law: str = "none: plain Frobenius norm") -> Moments:
    """White inputs: the weighted error becomes the Frobenius one. Only for weights of which nothing is known."""
    return Moments(torch.eye(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64), 0, law)


def layer_norm(gamma: Tensor, beta: Tensor | None, rms: bool, law: str = "upstream LayerNorm affine") -> Moments:
    """Inputs behind a LayerNorm or RMSNorm with affine (gamma, beta), the normalised vector taken as uniform in direction.

    E[z z^T] = (n I - 1 1^T)/(n - 1) for LayerNorm (z is centred, |z|^2 = n), I for RMSNorm.
    """
    n, g = len(gamma), gamma.double()
    mean = torch.zeros(n, dtype=torch.float64) if beta is None else beta.double()
    white = torch.eye(n, dtype=torch.float64)
    if not rms and n > 1:
        white = (n * white - 1) / (n - 1)
    return Moments(g[:, None] * white * g + torch.outer(mean, mean), mean, 0, law)


class Accumulator:
    """Streams rows of x into count, mean and covariance; chunked so that no second copy of a large batch exists.

    Rows are taken relative to the first chunk's mean (the shifted-data form of the variance), so that a large mean costs the covariance
    no digits.
    """

    def __init__(self, features: int, chunk: int = 8192) -> None:
        self.square = torch.zeros(features, features, dtype=torch.float64)
        self.total = torch.zeros(features, dtype=torch.float64)
        self.origin: Tensor | None = None
        self.count = 0
        self.chunk = chunk

    def update(self, x: Tensor) -> None:
        """x: (..., n); rows are everything but the last axis."""
        rows = x.detach().reshape(-1, x.shape[-1])
        for part in rows.split(self.chunk):
            part = part.float() if part.dtype != torch.float64 else part
            if self.origin is None:
                self.origin = part.mean(0)
            part = part - self.origin
            self.square += (part.T @ part).double()
            self.total += part.sum(0, dtype=torch.float64)
        self.count += len(rows)

    def moments(self, law: str, shrunk: bool = True) -> Moments:
        """The averages so far, the accumulator being used up; at least one row must have been seen.

        `shrunk`, for fits: few rows say little of many directions. With N rows of n features the covariance is shrunk towards its diagonal
        by min(1/2, n / 10 N), after Ledoit and Wolf (2004), so that a fit does not take directions that no row happened to show for dead
        ones.
        """
        assert self.origin is not None
        offset = self.total / self.count
        mean = self.origin.double() + offset
        covariance = self.square.div_(self.count).addr_(offset, offset, alpha=-1)
        kept = 1 - min(0.5, len(mean) / (10 * self.count)) if shrunk else 1.0
        diagonal = covariance.diagonal().clone()
        covariance.mul_(kept).diagonal().copy_(diagonal)
        return Moments(covariance.addr_(mean, mean), mean, self.count, law)
