"""min tr(P z H z^T) / 2 - <r, z> over z (g, m) whose g rows share one support S of n columns: every support is tried,

    z_S = P^-1 r_S H_SS^-1,  which gains <r_S, z_S> / 2.

Exact for any P and H, so a mask and its values are chosen together; C(m, n) systems of n unknowns, all groups at once. g = 1 is N:M.
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


def best_support(p: Tensor, h: Tensor, r: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """z (..., g, m) with n columns that are not zero, and what it gains (...,); p (..., g, g) and h (..., m, m) positive semidefinite."""
    found = supports(n, r.shape[-1])
    inner = _factor(h[..., found[:, :, None], found[:, None, :]])  # (..., supports, n, n)
    across = torch.cholesky_solve(r, _factor(p))  # P^-1 r
    right = r[..., found].transpose(-3, -2)  # (..., supports, g, n)
    values = torch.cholesky_solve(across[..., found].transpose(-3, -2).mT, inner).mT
    gain, which = (right * values).sum((-2, -1)).max(-1)
    chosen = values.gather(-3, which[..., None, None, None].expand(*which.shape, 1, *values.shape[-2:]))[..., 0, :, :]
    index = found[which][..., None, :].expand(chosen.shape)
    return torch.zeros_like(r).scatter(-1, index, chosen), gain / 2


def _factor(gram: Tensor) -> Tensor:
    """Cholesky with a ridge at rounding level, so that what is singular has a finite answer."""
    tiny = torch.finfo(gram.dtype)
    scale = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(tiny.tiny / tiny.eps)[..., None, None]
    factor: Tensor = torch.linalg.cholesky(gram + 4 * gram.shape[-1] * tiny.eps * scale * torch.eye(gram.shape[-1], dtype=gram.dtype))
    return factor
