"""min tr(E H E^T), E = W - M, over M whose blocks M[λ, c] = left[c, λ] right[c, λ] have rank r: block coordinate descent.

Column block c with the others fixed is reduced-rank regression, one per row group, all sharing H_cc:
    B = M_c + (E H)_c (H_cc + ε)^-1,    U = leading eigenvectors of B (H_cc + ε) B^T,    M_c <- U U^T B.
The ridge ε enters as a proximal term ε |M_c - M_c,old|^2, so the true objective never rises, whatever the rank of H. The start is
the blocks' own weighted truncation, which is exact for members. Source: Monarch (arXiv:2204.00595) Theorem 1 is the case H = I; the
weighted descent is reduced-rank regression (Izenman 1975), block by block.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rewriter.passes.solvers.spectral import cholesky, ridged

PROXIMAL = 1e-6  # relative to the mean of H's diagonal
FP64_WORK = 2**30  # multiply-adds of one sweep above which its large products run in float32
SWEEPS = 5
GAIN = 4e-3  # of the loss; a sweep that gains less is the last
EXACT_SIZE = 256  # larger eigenproblems are warm-started after the first sweep


@dataclass(frozen=True)
class Blocks:
    """k column blocks by g row groups of rank r, and the objective after the start and after each sweep."""

    left: Tensor  # (k, g, s, r) float64, orthonormal columns until refitted
    right: Tensor  # (k, g, r, q) float64
    losses: tuple[float, ...] = field(default=())  # tr(E H E^T), falling

    def dense(self) -> Tensor:
        """The (g s, k q) matrix."""
        _, g, s, _ = self.left.shape
        return (self.left @ self.right).permute(1, 2, 0, 3).reshape(g * s, -1)


def descend(weight: Tensor, second: Tensor, k: int, g: int, rank: int, sweeps: int = SWEEPS, start: Blocks | None = None) -> Blocks:
    """Fits an (m, n) weight under H (n, n) in `sweeps` passes over the column blocks, going on from `start`; fewer when nothing is gained.

    Pads with zeros where k or g do not divide. rank <= min(q, s) with q = ceil(n / k), s = ceil(m / g); inputs finite.
    """
    problem = _Problem.of(weight, second, k, g, rank)
    left, right = (start.left.clone(), start.right.clone()) if start else problem.start()
    problem.residual[:] -= Blocks(left, right).dense()
    losses = list(start.losses) if start else [problem.loss()]
    for _ in range(sweeps):
        if losses[-1] <= problem.negligible or _settled(losses):
            break
        losses.append(losses[-1] - problem.sweep(left, right))
    return Blocks(left, right, tuple(losses))


def refit(weight: Tensor, second: Tensor, blocks: Blocks) -> Blocks:
    """All left factors of a row group at once, by least squares on its k r middle features; proximal, so it never loses."""
    k, g, _, r = blocks.left.shape
    problem = _Problem.of(weight, second, k, g, r)
    problem.residual[:] -= blocks.dense()
    return blocks if k == 1 or blocks.losses[-1] <= problem.negligible else problem.refit(blocks)


def _settled(losses: list[float]) -> bool:
    return len(losses) > 1 and losses[-2] - losses[-1] <= GAIN * losses[-2]


@dataclass(frozen=True)
class _Problem:
    residual: Tensor  # (g s, k q) E, updated in place
    second: Tensor  # (k q, k q) H in working precision
    corner: Tensor  # (k, q, q) H_cc + ε, float64
    factor: Tensor  # (k, q, q) its Cholesky factors
    rank: int
    groups: int
    negligible: float

    @classmethod
    def of(cls, weight: Tensor, second: Tensor, k: int, g: int, rank: int) -> _Problem:
        m, n = weight.shape
        q, s = -(-n // k), -(-m // g)
        h = torch.nn.functional.pad(ridged(second), (0, k * q - n, 0, k * q - n))
        padded = torch.nn.functional.pad(weight.double(), (0, k * q - n, 0, g * s - m))
        corner = torch.stack([h[c * q : (c + 1) * q, c * q : (c + 1) * q] for c in range(k)])
        corner = corner + PROXIMAL * h.diagonal().mean() * torch.eye(q, dtype=torch.float64)
        work = torch.float64 if padded.shape[0] * padded.shape[1] ** 2 <= FP64_WORK else torch.float32
        energy = float((padded.square() @ h.diagonal()).sum())  # up to correlations
        return cls(padded.to(work), h.to(work), corner, cholesky(corner, 0.0), rank, g, energy * torch.finfo(work).eps)

    def loss(self) -> float:
        return float(((self.residual @ self.second) * self.residual).sum(dtype=torch.float64))

    def start(self) -> tuple[Tensor, Tensor]:
        """Each block's own weighted truncation."""
        k, q, _ = self.corner.shape
        parts = []
        for c in range(k):
            block = self.residual[:, c * q : (c + 1) * q].double().reshape(self.groups, -1, q)
            basis = leading(block, block @ self.corner[c], self.corner[c])[..., : self.rank]
            parts.append((basis, basis.mT @ block))
        return torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])

    def sweep(self, left: Tensor, right: Tensor) -> float:
        """One pass over the column blocks, in place; returns by how much the loss fell."""
        k, q, _ = self.corner.shape
        fallen = 0.0
        for c in range(k):
            cols = slice(c * q, (c + 1) * q)
            gradient = (self.residual @ self.second[:, cols]).double()  # (g s, q)
            old = left[c] @ right[c]
            target = old + torch.cholesky_solve(gradient.T, self.factor[c]).T.reshape(old.shape)
            image = left[c] @ (right[c] @ self.corner[c]) + gradient.reshape(old.shape)  # target @ corner, for less
            left[c] = leading(target, image, self.corner[c], left[c])
            right[c] = left[c].mT @ target
            step = (left[c] @ right[c] - old).flatten(0, 1)
            change = step.to(self.residual.dtype)
            quadratic = ((change @ self.second[cols, cols]) * change).sum(dtype=torch.float64)
            fallen += float(2 * (step * gradient).sum() - quadratic)
            self.residual[:, cols] -= change
        return fallen

    def refit(self, blocks: Blocks) -> Blocks:
        """See the function of this name."""
        k, g, s, r = blocks.left.shape
        q = blocks.right.shape[3]
        left = blocks.left.clone()
        fallen = 0.0
        for i in range(g):
            image = torch.cat([blocks.right[c, i].to(self.second.dtype) @ self.second[c * q : (c + 1) * q] for c in range(k)])  # (k r, k q)
            gram = torch.cat([image[:, c * q : (c + 1) * q].double() @ blocks.right[c, i].T for c in range(k)], 1)
            slope = (self.residual[i * s : (i + 1) * s] @ image.T).double()  # (s, k r)
            factor = cholesky((gram + gram.T) / 2, PROXIMAL)
            step = torch.cholesky_solve(slope.T, factor).T
            fallen += float(2 * (step * slope).sum() - ((step @ gram) * step).sum())
            left[:, i] += step.reshape(s, k, r).permute(1, 0, 2)
        return replace(blocks, left=left, losses=(*blocks.losses, blocks.losses[-1] - fallen))


def leading(target: Tensor, image: Tensor, corner: Tensor, warm: Tensor | None = None) -> Tensor:
    """Eigenvectors of B G B^T, most energy first, for each B of target (g, s, q); image is B G, corner G (q, q).

    Without `warm` all min(s, q) of them. With warm (g, s, r) the r leading ones, (g, s, r), where large problems take two steps of
    orthogonal iteration from there instead of an eigenproblem: such a step never loses energy either.
    """
    s, q = target.shape[1:]
    side, core = (None, target) if s <= q else torch.linalg.qr(target)
    gram = target @ image.mT if side is None else core @ corner @ core.mT
    gram = (gram + gram.mT) / 2
    if warm is None or gram.shape[-1] <= EXACT_SIZE:
        basis = torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., : s if warm is None else warm.shape[-1]]
    else:
        basis = warm if side is None else side.mT @ warm
        basis = torch.linalg.qr(gram @ (gram @ basis)).Q
    carried: Tensor = basis if side is None else side @ basis
    return carried
