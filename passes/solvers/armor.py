"""W ~ diag(r) A (W' o M) B diag(c): A, B block diagonal, M keeps n of every m inputs, by exact block descent on a proxy loss.

    L = sum_ij (Wbar_ij - (A S B)_ij)^2 d_j,    Wbar = W / column norms c / row norms r,    S = W' o M,    d = diag E[x x^T]

separates over b x b tiles (i, j) once A and B stand. With R = Wbar - A S B and D_j = diag(d) on tile column j, every move descends:
    A_i += (sum_j R D Z^T)(sum_j Z D Z^T)^-1,  Z = S B        B_j += (sum_i Y^T Y)^-1 sum_i Y^T R,  Y = A S
    W'  += a few conjugate gradient steps of P V Q = G on the support,  P = A^T A,  Q = B D B^T,  G = A^T R D B^T
    M, W' of one group a tile, drawn in proportion to |G| on it: every support is tried (`supports`)
so L never exceeds that of its start, A = B = I and the n largest of Wbar^2 d, which is NoWag-P: its zero-iteration form.
Source: ARMOR (arXiv:2510.05528), the model, the proxy loss and the draw; the exact moves in place of its Adam steps are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.passes.solvers.bcd.engine import AbstractProblem, AbstractUpdate, Stage, Stop, minimise
from rewriter.passes.solvers.bcd.selection import Custom, Cyclic
from rewriter.passes.solvers.bcd.supports import best_support
from rewriter.passes.solvers.bcd.update import conjugate
from rewriter.passes.solvers.pruning import Normalised, kept
from rewriter.passes.solvers.spectral import cholesky

PROXIMAL = 1e-6  # relative ridge of the wrappers' systems; they move from where they are, so it costs no descent
SWEEPS, GROUPS, STEPS = 60, 4, 4  # iterations; groups a tile and conjugate gradient steps in each
GAIN = 1e-4  # of L; an iteration that gains less is the last


@dataclass(frozen=True)
class Wrapped:
    """The factors in the weight's own scale, and L at the start and after each iteration."""

    left: Tensor  # (rows / b, b, b) diag(r) A
    core: Tensor  # (rows, columns) W' o M
    right: Tensor  # (columns / b, b, b) B diag(c)
    losses: tuple[float, ...]

    def dense(self) -> Tensor:
        """(rows, columns)."""
        return _rows(self.left[:, None] @ _tiles(self.core, len(self.left[0])) @ self.right)


@dataclass(frozen=True)
class Pattern:
    """n of every m inputs are kept, the same ones in each of `shared` neighbouring rows."""

    n: int = 2
    m: int = 4
    shared: int = 1


def armor(
    weight: Tensor, diagonal: Tensor, block: int, pattern: Pattern, rng: torch.Generator, sweeps: int = SWEEPS, gain: float = GAIN
) -> Wrapped:
    """Fits a (rows, columns) weight for inputs of second moments `diagonal` (columns,), in float64.

    Raises ValueError where `block` does not divide rows and columns, or the pattern's m and shared the block.
    """
    rows, columns = weight.shape
    if rows % block or columns % block or block % pattern.m or block % pattern.shared:
        raise ValueError(
            f"blocks of {block} with {pattern.n}:{pattern.m} in {pattern.shared} rows for a {rows} x {columns} weight; the block has to "
            f"divide both sides, {pattern.m} and {pattern.shared} the block"
        )
    fit = _Armor(Normalised.of(weight.double()), diagonal.double(), block, pattern)
    moves = _Moves()
    program: list[Stage[Any, _Move]] = [
        Stage("wrappers", Cyclic(["left", "right"]), moves, 2),
        Stage("values", Cyclic(["values"]), moves),
        Stage("masks", Custom(_drawn), moves, GROUPS),
    ]
    found = minimise(fit, program, Stop(sweeps, rtol=gain), rng)
    left = fit.left * fit.given.rows.view(len(fit.left), block, 1)
    return Wrapped(left, _rows(fit.core), fit.right * fit.given.columns.view(len(fit.right), 1, block), found.values)


@dataclass(frozen=True)
class _Move:
    change: float
    step: Tensor  # what is added to the factor, or (tiles, shared, m) to the drawn groups


class _Moves(AbstractUpdate[Any, _Move]):
    """The best of a factor, or of one group in every tile, with the rest as it is."""

    def propose(self, problem: AbstractProblem[Any, _Move], block: Any) -> _Move:
        assert isinstance(problem, _Armor)
        return getattr(problem, f"move_{block}")() if isinstance(block, str) else problem.move_groups(block)


def _drawn(problem: Any, rng: torch.Generator) -> Tensor:
    """(tiles,) one group each, with probabilities as the gradient's absolute values on it; evenly where there is none."""
    assert isinstance(problem, _Armor)
    steep = problem.by_group(problem.gradient.abs()).sum((-2, -1))
    weights = torch.where(steep.sum(1, keepdim=True) > 0, steep, 1.0)
    return torch.multinomial(weights, 1, generator=rng)[:, 0]


class _Armor(AbstractProblem[Any, _Move]):
    """L by tiles. A block is "left", "right", "values", or the index of a group in every tile."""

    def __init__(self, given: Normalised, diagonal: Tensor, block: int, pattern: Pattern) -> None:
        self.given, self.size, self.pattern = given, block, pattern
        self.target = _tiles(given.core, block)  # (I, J, b, b)
        self.weights = diagonal.view(-1, 1, block)  # (J, 1, b) d
        scores = given.core.square() * diagonal
        grouped = scores.view(-1, pattern.shared, scores.shape[1]).sum(1)
        mask = kept(grouped, pattern.n, pattern.m).repeat_interleave(pattern.shared, 0)
        self.core = _tiles(given.core * mask, block)
        self.mask = _tiles(mask, block)
        self.left, self.right = (torch.eye(block, dtype=torch.float64).repeat(k, 1, 1) for k in self.core.shape[:2])
        self._refresh()

    def _refresh(self) -> None:
        """What the wrappers change: P, Q, R and G."""
        self.across = self.left.mT @ self.left  # (I, b, b) P
        self.along = (self.right * self.weights) @ self.right.mT  # (J, b, b) Q
        self.gradient = self.left[:, None].mT @ (self.residual() * self.weights) @ self.right.mT  # (I, J, b, b) G

    def residual(self) -> Tensor:
        """(I, J, b, b) R."""
        return self.target - self.left[:, None] @ self.core @ self.right

    def value(self) -> float:
        return float((self.residual().square() * self.weights).sum())

    def change(self, block: Any, move: _Move) -> float:
        return move.change

    def apply(self, block: Any, move: _Move) -> None:
        if not isinstance(block, str):
            self._apply_groups(block, move.step)
        elif block == "values":
            self.core = self.core + move.step
            self.gradient = self.gradient - self.across[:, None] @ move.step @ self.along
        else:
            setattr(self, block, getattr(self, block) + move.step)
            self._refresh()

    def _apply_groups(self, drawn: Tensor, step: Tensor) -> None:
        """G changes by a product of rank `shared` in every tile."""
        (i, j), (rows, columns) = self._places(), self._indices(drawn)
        tile = torch.arange(len(drawn))[:, None, None]
        entries = tile, rows[:, :, None], columns[:, None, :]
        core, mask, gradient = (t.view(-1, self.size, self.size) for t in (self.core, self.mask, self.gradient))  # changed in place
        core[entries] += step
        mask[entries] = (core[entries] != 0).any(1, keepdim=True).expand(step.shape)
        every = torch.arange(self.size)
        p = self.across[i[:, None, None], every[:, None], rows[:, None, :]]  # (tiles, b, shared)
        q = self.along[j[:, None, None], columns[:, :, None], every]  # (tiles, m, b)
        gradient.baddbmm_(p, step @ q, alpha=-1)

    def move_left(self) -> _Move:
        z = self.core @ self.right
        gram, slope = ((other * self.weights @ z.mT).sum(1) for other in (z, self.residual()))
        step = torch.cholesky_solve(slope.mT, cholesky(gram, PROXIMAL)).mT
        return _Move(float(((step @ gram) * step).sum() - 2 * (step * slope).sum()), step)

    def move_right(self) -> _Move:
        y = self.left[:, None] @ self.core
        gram, slope = ((y.mT @ other).sum(0) for other in (y, self.residual()))
        step = torch.cholesky_solve(slope, cholesky(gram, PROXIMAL))
        return _Move(float((((gram @ step - 2 * slope) * step) * self.weights).sum()), step)

    def move_values(self) -> _Move:
        shape = self.core.shape

        def times(v: Tensor) -> Tensor:
            return (self.mask * (self.across[:, None] @ v.view(shape) @ self.along)).flatten(2)

        scale = self.across.diagonal(dim1=1, dim2=2)[:, None, :, None] * self.along.diagonal(dim1=1, dim2=2)[None, :, None, :]
        inverse = torch.where(scale > 0, 1 / scale, 0.0).flatten(2)
        right = (self.mask * self.gradient).flatten(2)
        step = conjugate(times, right, inverse, STEPS)
        return _Move(float(((times(step) - 2 * right) * step).sum()), step.view(shape))

    def move_groups(self, drawn: Tensor) -> _Move:
        (i, j), (rows, columns) = self._places(), self._indices(drawn)
        tile = torch.arange(len(drawn))[:, None, None]
        p = self.across[i[:, None, None], rows[:, :, None], rows[:, None, :]]
        q = self.along[j[:, None, None], columns[:, :, None], columns[:, None, :]]
        x, slope = (t.flatten(0, 1)[tile, rows[:, :, None], columns[:, None, :]] for t in (self.core, self.gradient))
        right = p @ x @ q + slope
        z, gain = best_support(p, q, right, self.pattern.n)
        before = (((p @ x @ q) * x).sum((-2, -1)) - 2 * (right * x).sum((-2, -1))).sum()
        return _Move(float(-2 * gain.sum() - before), z - x)

    def by_group(self, tiles: Tensor) -> Tensor:
        """(tiles, groups, shared, m) of (I, J, b, b)."""
        g, m, b = self.pattern.shared, self.pattern.m, self.size
        return tiles.reshape(-1, b // g, g, b // m, m).transpose(2, 3).reshape(-1, (b // g) * (b // m), g, m)

    def _places(self) -> tuple[Tensor, Tensor]:
        """The tiles' rows and columns in the grid, in order."""
        high, wide = self.core.shape[:2]
        return torch.arange(high).repeat_interleave(wide), torch.arange(wide).repeat(high)

    def _indices(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """(tiles, shared) rows and (tiles, m) columns of the drawn groups in their tiles."""
        g, m = self.pattern.shared, self.pattern.m
        wide = self.size // m
        return (drawn // wide * g)[:, None] + torch.arange(g), (drawn % wide * m)[:, None] + torch.arange(m)


def _tiles(matrix: Tensor, b: int) -> Tensor:
    """(rows / b, columns / b, b, b) of (rows, columns)."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // b, b, columns // b, b).transpose(1, 2).contiguous()


def _rows(tiles: Tensor) -> Tensor:
    """The inverse of `_tiles`."""
    high, wide, b, _ = tiles.shape
    return tiles.transpose(1, 2).reshape(high * b, wide * b)
