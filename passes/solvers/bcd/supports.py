"""min z^T H z / 2 - r . z over z with n nonzeros of m: every support is tried, z_S = H_SS^-1 r_S gains r_S . z_S / 2.

Exact for any H, so a mask and its values are chosen together; C(m, n) systems of n unknowns, all groups at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST = 1000  # supports that are tried; 8:16 has 12,870


def supports(n: int, m: int) -> Tensor:
    """(C(m, n), n) indices in ascending order. Raises ValueError where n is not below m, or there are more than MOST."""
    if not 0 < n < m:
        raise ValueError(f"{n}:{m} keeps no part of a group; give 0 < n < m")
    if math.comb(m, n) > MOST:
        raise ValueError(f"{n}:{m} has {math.comb(m, n):,} supports, {MOST:,} can be tried; take smaller groups")
    return torch.combinations(torch.arange(m), n)


def best_support(h: Tensor, r: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """z (..., m) with n nonzeros and what it gains (...,), for h (..., m, m) symmetric positive semidefinite and r (..., m)."""
    found = supports(n, r.shape[-1])
    parts = h[..., found[:, :, None], found[:, None, :]]  # (..., supports, n, n)
    tiny = torch.finfo(h.dtype).eps * h.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None].clamp_min(torch.finfo(h.dtype).tiny)
    factor = torch.linalg.cholesky(parts + 4 * n * tiny[..., None] * torch.eye(n, dtype=h.dtype))
    right = r[..., found]  # (..., supports, n)
    values = torch.cholesky_solve(right[..., None], factor)[..., 0]
    gains = (right * values).sum(-1) / 2
    gain, which = gains.max(-1)
    chosen = values.gather(-2, which[..., None, None].expand(*which.shape, 1, n))[..., 0, :]
    return torch.zeros_like(r).scatter(-1, found[which], chosen), gain
