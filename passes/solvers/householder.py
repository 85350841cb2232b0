"""H(v, β) = I - β v v^T, |v| = 1, β in [0, 2]: a matrix A as a product of as few of them as there can be.

Every contraction is such a product, and nothing else is. On the range of I - A, which is that of its transpose, let N stand for I - A and
P = N + N^T - N N^T for I - A A^T. A = A' H(v, β) with rank(I - A') one less exactly where v ~ N^T z, β = 2 - μ, (P - μ N) z = 0. So k =
rank(I - A) factors suffice exactly when all k eigenvalues μ of N^-1 P are real, and these give the β. A complex pair takes off a 2 x 2
contraction, a reflection times a symmetric matrix: three factors. For orthogonal A, P = 0 and all β = 2: reflections (Cartan, Dieudonné,
Scherk).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

from rewriter.structure import NoMatch
from rewriter.tolerances import EXACT

LARGEST_CLUSTER = 12  # coinciding β that are looked for
LARGEST_SEARCH = 64  # factors among which they are looked for
Split = Callable[[Tensor], tuple[Tensor, Tensor]]  # a small contraction into (vectors, betas)


@dataclass(frozen=True)
class Reflectors:
    """H(v_1, β_1) … H(v_k, β_k); the last one meets a column vector first."""

    vectors: Tensor  # (n, k) unit columns
    betas: Tensor  # (k,) in [0, 2]

    def dense(self) -> Tensor:
        """The (n, n) product."""
        y, t = wy(self.vectors, self.betas)
        return torch.eye(len(y), dtype=y.dtype) - y @ t @ y.T


def wy(vectors: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """(Y (n, k), T (k, k) upper triangular) with H_1 … H_k = I - Y T Y^T, compact WY (Schreiber and Van Loan 1989).

    T^-1 = diag(1/β) + striu(Y^T Y), multiplied out so that β = 0 is safe; T_ij = -β_i β_j v_i^T H_{i+1} … H_{j-1} v_j, at most 4.
    """
    unit = torch.eye(len(betas), dtype=betas.dtype) + betas[:, None] * (vectors.T @ vectors).triu(1)
    return vectors, torch.linalg.solve_triangular(unit, torch.diag(betas), upper=True, unitriangular=True)


def reflections(q: Tensor, tolerance: float | None = None) -> Reflectors | NoMatch:
    """An orthogonal (n, n) matrix as exactly rank(Q - I) reflections: two for each plane that it turns, one for each -1.

    `tolerance`: what counts as zero, by default the dtype's.
    """
    tolerance = EXACT[q.dtype] if tolerance is None else tolerance
    q = q.double()
    gap = float(torch.linalg.matrix_norm(q @ q.T - torch.eye(len(q), dtype=q.dtype)))
    if not gap <= 2 * len(q) * tolerance:
        return NoMatch(f"Q Q^T is {gap:.1e} away from I: not orthogonal")
    return Reflectors(*_turns(q, tolerance))


def factors(a: Tensor, tolerance: float | None = None) -> Reflectors | NoMatch:
    """An (n, n) contraction as rank(I - A) factors, and one more for each complex pair of μ; a norm above 1 is refused.

    Coinciding β < 2 are a Jordan block, which rounding scatters into complex pairs. About six of them are found again; of more, some pairs
    stay, and the product is as exact with more factors. `tolerance`: what counts as zero, by default the dtype's.
    """
    tolerance = EXACT[a.dtype] if tolerance is None else tolerance
    a = a.double()
    gap = torch.eye(len(a), dtype=a.dtype) - a
    rest = _range(gap, tolerance)
    levels, frame = torch.linalg.eigh(_defect(rest.core))
    outside = float(torch.linalg.matrix_norm(gap - rest.basis @ rest.core @ rest.basis.T))
    if outside > len(a) * tolerance or (levels < -4 * tolerance).any():
        return NoMatch(f"its norm is {float(torch.linalg.matrix_norm(a, 2)):.8g}, that of a product of factors with β in [0, 2] at most 1")
    isometric = int((levels <= 2 * tolerance).sum())
    for few in (True, False):
        found = _fewest(rest, frame, isometric, tolerance) if few else _by_schur_form(rest).product()
        if float(torch.linalg.matrix_norm(found.dense() - a)) <= len(a) * tolerance:
            return found
    return NoMatch(f"its factors are too ill-conditioned to leave less than {len(a) * tolerance:.0e}")


def nearest_factors(basis: Tensor, a: Tensor) -> Reflectors:
    """As many factors as `basis` (n, k) has columns, for B A B^T + I - B B^T: exact where A (k, k) is a contraction with real μ.

    Else near it: a norm above 1 is cut down, a complex pair taken for a rotation or for two real μ.
    """
    u, sigma, v = torch.linalg.svd(a)
    rest = _range(torch.eye(len(a), dtype=a.dtype) - (u * sigma.clamp_max(1)) @ v, EXACT[torch.float64])
    idle = torch.linalg.qr(rest.basis, mode="complete").Q[:, len(rest.core) :]
    live = _by_schur_form(rest, _split_in_two).product()
    return Reflectors(basis @ torch.cat([live.vectors, idle], 1), torch.nn.functional.pad(live.betas, (0, idle.shape[1])))


def _turns(q: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The reflections of an orthogonal matrix, from its real Schur form: vectors Q x - x lose digits where Q turns by small angles only."""
    form, frame = _schur(q)
    vectors = [q[:, :0]]
    for i, width in _blocks(form):
        j = i + width - 1
        half = torch.atan2(form[j, i] - form[i, j], form[i, i] + form[j, j]) / 2
        if width == 1 and form[i, i] < 0:
            vectors.append(frame[:, [i]])
        elif width == 2 and 2 * half.abs() > tolerance:
            vectors += [half.cos() * frame[:, [j]] - half.sin() * frame[:, [i]], frame[:, [j]]]
    found = torch.cat(vectors, 1)
    return found, torch.full((found.shape[1],), 2.0, dtype=q.dtype)


def _split(block: Tensor) -> tuple[Tensor, Tensor]:
    """A 1 x 1 or 2 x 2 contraction, the latter as a reflection times a symmetric matrix."""
    if len(block) == 1:
        return torch.ones_like(block), 1 - block[0]
    u, sigma, v = torch.linalg.svd(block)
    signs = torch.stack([torch.ones_like(sigma[0]), -torch.linalg.det(u @ v).sign()])
    mirror = torch.linalg.eigh(torch.eye(2, dtype=block.dtype) - (u * signs) @ v).eigenvectors[:, 1:]
    return torch.cat([mirror, v.T], 1), torch.cat([torch.full_like(sigma[:1], 2), 1 - signs * sigma])


def _split_in_two(block: Tensor) -> tuple[Tensor, Tensor]:
    """A 1 x 1 contraction, or the nearer of two products of two for a 2 x 2 one: its rotation, or what the real parts of its μ give."""
    if len(block) == 1:
        return _split(block)
    real = _Rest(torch.eye(2, dtype=block.dtype), torch.eye(2, dtype=block.dtype) - block)
    u, _, v = torch.linalg.svd(block)
    products = [Reflectors(*_turns(u @ v, 0.0)), real.peel(_schur(_quotient(real.core))[1], [1, 1]).product()]
    best = min((p for p in products if len(p.betas) == 2), key=lambda p: float(torch.linalg.matrix_norm(p.dense() - block)))
    return best.vectors, best.betas


@dataclass(frozen=True)
class _Rest:
    """A = (I - B N B^T) H_j … H_k, the factors taken off so far."""

    basis: Tensor  # (n, r) B, orthonormal columns
    core: Tensor  # (r, r) N
    found: tuple[tuple[Tensor, Tensor], ...] = ()

    def peel(self, frame: Tensor, widths: Sequence[int], split: Split = _split) -> _Rest:
        """Takes the first z of an orthonormal frame (r, r) off, `width` at a time: a contraction I - V M V^T, V spanning N^T z."""
        basis, core, found = self.basis @ frame, frame.T @ self.core @ frame, self.found
        for width in filter(None, widths):
            rows, pivot = core[:width], core[:width, :width]
            span, heights = torch.linalg.qr(rows.T)
            vectors, betas = split(torch.eye(width, dtype=core.dtype) - heights @ torch.linalg.solve(pivot.T, heights.T))
            found = ((basis @ span @ vectors, betas), *found)
            core = (core - core[:, :width] @ torch.linalg.solve(pivot, rows))[width:, width:]
            basis = basis[:, width:]
        return _Rest(basis, core, found)

    def product(self) -> Reflectors:
        """When all is taken off."""
        vectors, betas = ([self.basis], [self.core.diagonal()]) if not self.found else zip(*self.found, strict=True)
        return Reflectors(torch.cat(list(vectors), 1), torch.cat(list(betas)).clamp(0, 2))


def _range(gap: Tensor, tolerance: float) -> _Rest:
    """I - A on its range."""
    left, sigma, _ = torch.linalg.svd(gap)
    basis = left[:, : int((sigma > tolerance).sum())]
    return _Rest(basis, basis.T @ gap @ basis)


def _fewest(rest: _Rest, frame: Tensor, isometric: int, tolerance: float) -> Reflectors:
    """What the first vectors of the frame turn as reflections, coinciding β one by one, and the others."""
    rest = rest.peel(frame, [isometric], lambda block: _turns(block, tolerance))
    while (coinciding := _coinciding(rest.core, tolerance)) is not None:
        rest = rest.peel(coinciding, [1])
    return _by_schur_form(rest).product()


def _by_schur_form(rest: _Rest, split: Split = _split) -> _Rest:
    """All of it, in the order of a Schur form."""
    form, frame = _schur(_quotient(rest.core))
    return rest.peel(frame, [width for _, width in _blocks(form)], split)


def _defect(core: Tensor) -> Tensor:
    """P = N + N^T - N N^T."""
    return core + core.T - core @ core.T


def _quotient(core: Tensor) -> Tensor:
    """N^-1 P, whose eigenvalues are the 2 - β."""
    quotient: Tensor = torch.linalg.solve(core, _defect(core))
    return quotient


def _coinciding(core: Tensor, tolerance: float) -> Tensor | None:
    """A frame (k, k) whose first z belongs to one of several coinciding β: of the eigenvalues that rounding scatters, the mean is near."""
    values = torch.linalg.eigvals(_quotient(core)) if len(core) <= LARGEST_SEARCH else torch.zeros(0, dtype=torch.complex128)
    for centre in values[values.imag > 0].real:
        near = values[(values - centre).abs().argsort()][:LARGEST_CLUSTER]
        for size in range(len(near), 1, -1):
            mean = near[:size].mean()
            _, sigma, right = torch.linalg.svd(_defect(core) - mean.real * core)
            z = right[-1]
            if mean.imag.abs() <= tolerance and sigma[-1] * (core.T @ z).norm() <= tolerance * (z @ core @ z):
                return torch.as_tensor(right.flip(0).T)
    return None


def _schur(a: Tensor) -> tuple[Tensor, Tensor]:
    """(quasi-triangular, orthogonal): a = frame @ form @ frame^T."""
    form, frame = scipy.linalg.schur(a.numpy(), output="real") if len(a) else (a.numpy(), a.numpy())
    return torch.from_numpy(form), torch.from_numpy(frame)


def _blocks(form: Tensor) -> list[tuple[int, int]]:
    """(where, 1 or 2) of each block on the diagonal of a real Schur form."""
    starts: list[tuple[int, int]] = []
    i = 0
    while i < len(form):
        starts.append((i, 2 if i + 1 < len(form) and form[i + 1, i] != 0 else 1))
        i += starts[-1][1]
    return starts
