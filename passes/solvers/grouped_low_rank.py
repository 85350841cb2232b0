"""Rows of a product in groups, each behind a latent of its own: y_g = W_g x + b_g ~ U_g (D_g x + d_g), min E |y_g - y'_g|^2 over rank r.

The bias is a column more, its input always one: U_g is the leading eigenvectors of E y_g y_g^T, so the projection takes it along. Where
what all tokens have in common does not count, as a softmax over keys drops it, the bias goes and E y y^T is the covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.moments import Moments
from rewriter.passes.solvers.spectral import spectrum


@dataclass(frozen=True)
class Grouped:
    """float64, groups side by side."""

    down: Tensor  # (n, groups * r)
    shift: Tensor  # (groups * r,)
    up: Tensor  # (m, r)
    error: float  # relative weighted, of all groups


def grouped(weight: Tensor, bias: Tensor | None, moments: Moments, groups: int, rank: int, common: bool = True) -> Grouped:
    """Of an (m, n) weight whose rows lie group by group; `common`: whether what all tokens have in common counts."""
    target, second = weight.double(), moments.second if common else moments.covariance()
    if common and bias is not None:
        target = torch.cat([target, bias.double()[:, None]], 1)
        second = torch.cat([torch.cat([second, moments.mean[:, None]], 1), torch.cat([moments.mean, torch.ones(1).double()])[None]])
    parts, lost, energy = [], 0.0, 0.0
    for rows in target.chunk(groups):
        down, up = spectrum(rows, second).truncate(rank)
        gap = rows - up.T @ down.T
        lost += float(((gap @ second) * gap).sum().clamp_min(0))
        energy += float(((rows @ second) * rows).sum())
        parts.append((down, up.T))
    down = torch.cat([d for d, _ in parts], 1)
    n = weight.shape[1]
    shift = down[n] if len(down) > n else torch.zeros(down.shape[1], dtype=torch.float64)
    return Grouped(down[:n].contiguous(), shift, torch.cat([u for _, u in parts]), (lost / max(energy, 1e-300)) ** 0.5)
