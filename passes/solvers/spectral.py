"""min over rank-r W' of tr((W - W') H (W - W')^T):  W' = U U^T W with U the r leading eigenvectors of W H W^T.

The output-side form needs no inverse and no root of H, so a rank-deficient H (few calibration rows, dead inputs) is safe; one decomposition
serves every rank. For a tall W = Q R the small side suffices: eigenvectors of R H R^T, carried back by Q.
Source: Swift-SVD (arXiv:2604.01609), the closed form in W H W^T; the QR reduction for tall weights is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-9  # relative to the mean of H's diagonal; decides among directions that no input reaches
FP64_SIZE = 2048  # larger eigenproblems run in float32 and are polished


def ridged(second: Tensor, ridge: float = RIDGE) -> Tensor:
    """H + ridge * mean(diag H) * I in float64, (n, n); the identity where H is zero. H must be finite."""
    h = second.double()
    scale = float(h.diagonal().mean()) if len(h) else 0.0
    if scale <= 0:
        return torch.eye(len(h), dtype=torch.float64)
    h = h.clone() if h is second else h
    h.diagonal().add_(ridge * scale)
    return h


def cholesky(gram: Tensor, ridge: float) -> Tensor:
    """The factor of gram + ridge * mean(diag) * I, (…, d, d); a ridge that rounding errors outweigh grows tenfold until there is one."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(gram.dtype).tiny)[..., None, None]
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * scale * eye)
        if not bool(failed.any()):
            return torch.as_tensor(factor)
        ridge = max(10 * ridge, torch.finfo(gram.dtype).eps)


@dataclass(frozen=True)
class Spectrum:
    """The output-side decomposition of a weight: energies fall, and `truncate` gives the optimum of any rank."""

    weight: Tensor  # (m, n) float64
    basis: Tensor  # (m, min(m, n)) orthonormal columns, most energy first
    gram: Tensor  # (d, d) W H W^T on the small side
    side: Tensor | None  # (m, d) Q of a tall weight

    def truncate(self, rank: int) -> tuple[Tensor, Tensor]:
        """(down (n, r), up (r, m)) float64, up with orthonormal rows: W' = up^T down^T."""
        basis = self.basis[:, :rank]
        if self.gram.dtype != torch.float64:
            basis = self._polish(basis)
        return self.weight.T @ basis, basis.T.contiguous()

    def _polish(self, basis: Tensor) -> Tensor:
        """One exact step of orthogonal iteration: takes float32 rounding out of the leading eigenvectors."""
        small = basis if self.side is None else self.side.T @ basis
        small = torch.as_tensor(torch.linalg.qr(self.gram.double() @ small.double()).Q)
        return small if self.side is None else self.side @ small


def spectrum(weight: Tensor, second: Tensor) -> Spectrum:
    """The decomposition of an (m, n) weight under H (n, n); one eigenproblem of size min(m, n). Inputs must be finite."""
    w, h = weight.double(), second.double()
    side, core = (None, w) if w.shape[0] <= w.shape[1] else torch.linalg.qr(w)
    scale = float(h.diagonal().mean()) if len(h) else 0.0
    if len(core) > FP64_SIZE:
        core, h = core.float(), h.float()
    gram = core @ core.T  # of W (H + ridge) W^T, without a copy of H; the identity stands for an H of zeros
    gram = gram if scale <= 0 else core @ h @ core.T + RIDGE * scale * gram
    vectors = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors.flip(1).double()
    return Spectrum(w, vectors if side is None else side @ vectors, gram, side)
