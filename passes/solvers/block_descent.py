"""min tr(E H E^T), E = W - M, over M whose blocks M[λ, c] = left[c, λ] right[c, λ] have rank r: block coordinate descent.

Column block c with the others fixed is reduced-rank regression, one per row group, all sharing H_cc:
    B = M_c + (E H)_c (H_cc + ε)^-1,    U = leading eigenvectors of B (H_cc + ε) B^T,    M_c <- U U^T B.
The ridge ε enters as a proximal term ε |M_c - M_c,old|^2, so the true objective never rises, whatever the rank of H. The start is
the blocks' own weighted truncation, which is exact for members. Source: Monarch (arXiv:2204.00595) Theorem 1 is the case H = I; the
weighted descent is reduced-rank regression (Izenman 1975), block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rewriter.passes.solvers.bcd.engine import AbstractProblem, AbstractUpdate, Stage, Stop, minimise
from rewriter.passes.solvers.bcd.selection import Cyclic
from rewriter.passes.solvers.spectral import cholesky, ridged

PROXIMAL = 1e-6  # relative to the mean of H's diagonal
FP64_WORK = 2**30  # multiply-adds of one sweep above which its large products run in float32
SWEEPS = 5
GAIN = 4e-3  # of the loss; a sweep that gains less is the last
_Part = tuple[Literal["column", "row"], int]
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
    fit = _Fit(weight, second, k, g, rank, start)
    if start is not None and _settled(start.losses):
        return start
    columns = Stage[_Part, _Move]("column blocks", Cyclic([("column", c) for c in range(k)]), _Exact(), repeats=k)
    return fit.descended([columns], Stop(sweeps, rtol=GAIN, value=fit.negligible), start)


def refit(weight: Tensor, second: Tensor, blocks: Blocks) -> Blocks:
    """All left factors of a row group at once, by least squares on its k r middle features; proximal, so it never loses."""
    k, g, _, r = blocks.left.shape
    fit = _Fit(weight, second, k, g, r, blocks)
    rows = Stage[_Part, _Move]("row groups", Cyclic([("row", i) for i in range(g)]), _Exact(), repeats=g)
    return fit.descended([rows], Stop(1 if k > 1 else 0, value=fit.negligible), blocks)


def _settled(losses: Sequence[float]) -> bool:
    return len(losses) > 1 and losses[-2] - losses[-1] <= GAIN * losses[-2]


@dataclass(frozen=True)
class _Move:
    change: float
    left: Tensor
    right: Tensor | None = None  # of column blocks


class _Exact(AbstractUpdate[_Part, _Move]):
    """The best factors of a part with the others as they are."""

    def propose(self, problem: AbstractProblem[_Part, _Move], block: _Part) -> _Move:
        assert isinstance(problem, _Fit)
        kind, index = block
        return problem.column(index) if kind == "column" else problem.row(index)


class _Fit(AbstractProblem[_Part, _Move]):
    """The objective with its residual at hand, in float32 where its products are large."""

    def __init__(self, weight: Tensor, second: Tensor, k: int, g: int, rank: int, start: Blocks | None) -> None:
        m, n = weight.shape
        self.q, self.s, self.rank, self.groups = -(-n // k), -(-m // g), rank, g
        h = torch.nn.functional.pad(ridged(second), (0, k * self.q - n, 0, k * self.q - n))
        padded = torch.nn.functional.pad(weight.double(), (0, k * self.q - n, 0, g * self.s - m))
        corner = torch.stack([h[self._columns(c)][:, self._columns(c)] for c in range(k)])
        self.corner = corner + PROXIMAL * h.diagonal().mean() * torch.eye(self.q, dtype=torch.float64)  # (k, q, q) H_cc + ε
        self.factor = cholesky(self.corner, 0.0)
        work = torch.float64 if padded.shape[0] * padded.shape[1] ** 2 <= FP64_WORK else torch.float32
        energy = float((padded.square() @ h.diagonal()).sum())  # up to correlations
        self.negligible = energy * torch.finfo(work).eps
        self.residual, self.second = padded.to(work), h.to(work)  # (g s, k q) E, and H
        self.left, self.right = (start.left.clone(), start.right.clone()) if start else self._start()
        self.residual -= Blocks(self.left, self.right).dense()
        self.loss = start.losses[-1] if start else float(((self.residual @ self.second) * self.residual).sum(dtype=torch.float64))

    def descended(self, program: Sequence[Stage[_Part, _Move]], stop: Stop, start: Blocks | None) -> Blocks:
        found = minimise(self, program, stop, torch.Generator())
        return Blocks(self.left, self.right, (*(start.losses[:-1] if start else ()), *found.values))

    def value(self) -> float:
        return self.loss

    def change(self, block: _Part, move: _Move) -> float:
        return move.change

    def apply(self, block: _Part, move: _Move) -> None:
        kind, index = block
        if kind == "column":
            assert move.right is not None
            step = move.left @ move.right - self.left[index] @ self.right[index]  # (g, s, q)
            self.residual[:, self._columns(index)] -= step.flatten(0, 1).to(self.residual.dtype)
            self.left[index], self.right[index] = move.left, move.right
        else:
            step = (move.left - self.left[:, index]) @ self.right[:, index]  # (k, s, q)
            self.residual[self._rows(index)] -= step.transpose(0, 1).flatten(1).to(self.residual.dtype)
            self.left[:, index] = move.left
        self.loss += move.change

    def column(self, c: int) -> _Move:
        """Reduced-rank regression, see above."""
        cols = self._columns(c)
        gradient = (self.residual @ self.second[:, cols]).double()  # (g s, q)
        old = self.left[c] @ self.right[c]
        target = old + torch.cholesky_solve(gradient.T, self.factor[c]).T.reshape(old.shape)
        image = self.left[c] @ (self.right[c] @ self.corner[c]) + gradient.reshape(old.shape)  # target @ corner, for less
        left = leading(target, image, self.corner[c], self.left[c])
        right = left.mT @ target
        step = (left @ right - old).flatten(0, 1)
        taken = step.to(self.residual.dtype)
        quadratic = ((taken @ self.second[cols, cols]) * taken).sum(dtype=torch.float64)
        return _Move(float(quadratic - 2 * (step * gradient).sum()), left, right)

    def row(self, i: int) -> _Move:
        """Least squares on the middle features of row group i."""
        k, _, s, r = self.left.shape
        parts = [self._columns(c) for c in range(k)]
        image = torch.cat([self.right[c, i].to(self.second.dtype) @ self.second[parts[c]] for c in range(k)])  # (k r, k q)
        gram = torch.cat([image[:, parts[c]].double() @ self.right[c, i].T for c in range(k)], 1)
        slope = (self.residual[self._rows(i)] @ image.T).double()  # (s, k r)
        factor = cholesky((gram + gram.T) / 2, PROXIMAL)
        step = torch.cholesky_solve(slope.T, factor).T
        change = ((step @ gram) * step).sum() - 2 * (step * slope).sum()
        return _Move(float(change), self.left[:, i] + step.reshape(s, k, r).permute(1, 0, 2))

    def _columns(self, c: int) -> slice:
        return slice(c * self.q, (c + 1) * self.q)

    def _rows(self, i: int) -> slice:
        return slice(i * self.s, (i + 1) * self.s)

    def _start(self) -> tuple[Tensor, Tensor]:
        """Each block's own weighted truncation."""
        parts = []
        for c in range(len(self.corner)):
            block = self.residual[:, self._columns(c)].double().reshape(self.groups, -1, self.q)
            basis = leading(block, block @ self.corner[c], self.corner[c])[..., : self.rank]
            parts.append((basis, basis.mT @ block))
        return torch.stack([p[0] for p in parts]), torch.stack([p[1] for p in parts])


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
