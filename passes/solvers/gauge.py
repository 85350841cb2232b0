"""The factors A B of a product are free up to A G, G^-1 B; training wants the balanced choice, A^T A = B B^T diagonal.

    A = Q_1 R_1, B^T = Q_2 R_2, R_1 R_2^T = U S V^T:    A' = Q_1 U S^1/2,  B' = S^1/2 V^T Q_2^T

Gradient descent on balanced factors keeps them balanced (Du, Hu and Lee, arXiv:1806.00900); far from it, healing made models worse.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balanced(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of (..., q, r) and (..., r, s), r <= q and r <= s; as they are where r is larger, which leaves the product no such form."""
    if down.shape[-1] > min(down.shape[-2], up.shape[-1]):
        return down, up
    left, right = torch.linalg.qr(down.double()), torch.linalg.qr(up.double().mT)
    u, s, vh = torch.linalg.svd(left.R @ right.R.mT)
    root = s.sqrt()
    found = (left.Q @ u) * root[..., None, :], root[..., :, None] * (vh @ right.Q.mT)
    return found[0].to(down.dtype), found[1].to(up.dtype)
