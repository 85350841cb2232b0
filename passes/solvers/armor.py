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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

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
FP64_WORK = 2**23  # multiply-adds of one wrapper's product above which all is in float32


@dataclass(frozen=True)
class Wrapped:
    """The factors in the weight's own scale, and L at the start and after each iteration."""

    left: Tensor  # (rows / b, b, b) diag(r) A
    core: Tensor  # (rows, columns) W' o M
    right: Tensor  # (columns / b, b, b) B diag(c)
    losses: tuple[float, ...]

    def dense(self) -> Tensor:
        """(rows, columns)."""
        return wrapped(self.left, self.core, self.right)


@dataclass(frozen=True)
class Pattern:
    """n of every m inputs are kept, the same ones in each of `shared` neighbouring rows."""

    n: int = 2
    m: int = 4
    shared: int = 1


def armor(
    weight: Tensor, diagonal: Tensor, block: int, pattern: Pattern, rng: torch.Generator, sweeps: int = SWEEPS, gain: float = GAIN
) -> Wrapped:
    """Fits a (rows, columns) weight for inputs of second moments `diagonal` (columns,); the factors are float64, or float32 where large.

    Raises ValueError where `block` does not divide rows and columns, or the pattern's m and shared the block.
    """
    fit, moves = ArmorProblem.of(weight, diagonal, block, pattern), _Moves()
    program: list[Stage[Any, _Move]] = [
        Stage("wrappers", Cyclic(["left", "right"]), moves, 2),
        Stage("values", Cyclic(["values"]), moves),
        Stage("masks", Custom(draw), moves, GROUPS),
    ]
    found = minimise(fit, program, Stop(sweeps, rtol=gain), rng)
    return fit.folded(fit.left, fit.core, fit.right, found.values)


@dataclass(frozen=True)
class _Move:
    change: float
    step: Tensor  # what is added to the factor, or (tiles, shared, m) to the drawn groups


class _Moves(AbstractUpdate[Any, _Move]):
    """The best of a factor, or of one group in every tile, with the rest as it is."""

    def propose(self, problem: AbstractProblem[Any, _Move], block: Any) -> _Move:
        assert isinstance(problem, ArmorProblem)
        return getattr(problem, f"move_{block}")() if isinstance(block, str) else problem.move_groups(block)


def draw(problem: Any, rng: torch.Generator) -> Tensor:
    """(tiles,) one group each, with probabilities as the gradient's absolute values on it; evenly where there is none."""
    assert isinstance(problem, ArmorProblem)
    steep = problem.steepness()
    weights = torch.where(steep.sum(1, keepdim=True) > 0, steep, 1.0)
    return torch.multinomial(weights, 1, generator=rng)[:, 0]


class ArmorProblem(AbstractProblem[Any, _Move]):
    """A block is "left", "right", "values", or the index of a group in every tile, tiles being counted row by row."""

    def __init__(self, given: Normalised, diagonal: Tensor, block: int, pattern: Pattern) -> None:
        self.given, self.size, self.pattern, self.weights = given, block, pattern, diagonal
        self.high, self.wide = (n // block for n in given.core.shape)
        scores = given.core.square() * diagonal
        grouped = scores.view(-1, pattern.shared, scores.shape[1]).sum(1)
        self.mask = kept(grouped, pattern.n, pattern.m).repeat_interleave(pattern.shared, 0)
        self.core = given.core * self.mask
        self.left, self.right = (torch.eye(block, dtype=given.core.dtype).repeat(k, 1, 1) for k in (self.high, self.wide))
        self.refresh()

    @classmethod
    def of(cls, weight: Tensor, diagonal: Tensor, block: int, pattern: Pattern) -> Self:
        """At its start, in the precision that its size allows; ValueError as `armor` says."""
        rows, columns = weight.shape
        if rows % block or columns % block or block % pattern.m or block % pattern.shared:
            raise ValueError(
                f"blocks of {block} with {pattern.n}:{pattern.m} in {pattern.shared} rows for a {rows} x {columns} weight; the block has "
                f"to divide both sides, {pattern.m} and {pattern.shared} the block"
            )
        work = torch.float64 if weight.numel() * block <= FP64_WORK else torch.float32
        return cls(Normalised.of(weight.to(work).contiguous()), diagonal.to(work), block, pattern)

    def folded(self, left: Tensor, core: Tensor, right: Tensor, losses: Sequence[float]) -> Wrapped:
        """These factors in the weight's own scale."""
        rows, columns = (s.view(-1, self.size) for s in (self.given.rows, self.given.columns))
        return Wrapped(left * rows[:, :, None], core, right * columns[:, None], tuple(losses))

    def refresh(self) -> None:
        """What the wrappers change: P, Q and G."""
        self.across = self.left.mT @ self.left  # (I, b, b) P
        self.along = (self.right * self.weights.view(self.wide, 1, -1)) @ self.right.mT  # (J, b, b) Q
        self.gradient = wrapped(self.left.mT, self.residual() * self.weights, self.right.mT)  # (rows, columns) G

    def residual(self) -> Tensor:
        """(rows, columns) R."""
        return self.given.core - wrapped(self.left, self.core, self.right)

    def value(self) -> float:
        return float((self.residual().square() * self.weights).sum())

    def change(self, block: Any, move: _Move) -> float:
        return move.change

    def apply(self, block: Any, move: _Move) -> None:
        if not isinstance(block, str):
            self._apply_groups(block, move.step)
        elif block == "values":
            self.core = self.core + move.step
            self.gradient = self.gradient - wrapped(self.across, move.step, self.along)
        else:
            setattr(self, block, getattr(self, block) + move.step)
            self.refresh()

    def _apply_groups(self, drawn: Tensor, step: Tensor) -> None:
        """G changes by a product of rank `shared` in every tile."""
        (i, j, rows, columns, here), every = self._places(drawn), torch.arange(self.size)
        self.core[here] += step
        self.mask[here] = (self.core[here] != 0).any(1, keepdim=True).expand(step.shape)
        p = self.across[i, every[:, None], rows.mT]  # (tiles, b, shared)
        q = self.along[j, columns.mT, every]  # (tiles, m, b)
        grid = self.gradient.view(self.high, self.size, self.wide, self.size).transpose(1, 2)
        grid -= (p @ (step @ q)).view(self.high, self.wide, self.size, self.size)

    def move_left(self) -> _Move:
        z = by_right(self.core, self.right).view(self.high, self.size, -1)
        gram, slope = ((other * self.weights).view(z.shape) @ z.mT for other in (z.view(self.core.shape), self.residual()))  # (I, b, b)
        step = torch.cholesky_solve(slope.mT, cholesky(gram, PROXIMAL)).mT
        return _Move(float(((step @ gram) * step).sum() - 2 * (step * slope).sum()), step)

    def move_right(self) -> _Move:
        y, r = (x.view(-1, self.wide, self.size).transpose(0, 1) for x in (by_left(self.left, self.core), self.residual()))
        gram, slope = y.mT @ y, y.mT @ r  # (J, b, b)
        step = torch.cholesky_solve(slope, cholesky(gram, PROXIMAL))
        return _Move(float((((gram @ step - 2 * slope) * step) * self.weights.view(self.wide, 1, -1)).sum()), step)

    def move_values(self) -> _Move:
        """Tiles are systems of their own, so each has its own step lengths."""

        def times(v: Tensor) -> Tensor:
            return self._tiled(self.mask * wrapped(self.across, self._whole(v), self.along))

        across, along = (t.diagonal(dim1=1, dim2=2).flatten() for t in (self.across, self.along))
        scale = torch.outer(across, along)
        right = self._tiled(self.mask * self.gradient)
        step = conjugate(times, right, self._tiled(torch.where(scale > 0, 1 / scale, 0.0)), STEPS)
        return _Move(float(((times(step) - 2 * right) * step).sum()), self._whole(step))

    def move_groups(self, drawn: Tensor) -> _Move:
        i, j, rows, columns, here = self._places(drawn)
        p, q = self.across[i, rows, rows.mT], self.along[j, columns.mT, columns]
        x = self.core[here]
        right = p @ x @ q + self.gradient[here]
        z, gain = best_support(p, q, right, self.pattern.n)
        before = (((p @ x @ q) * x).sum((-2, -1)) - 2 * (right * x).sum((-2, -1))).sum()
        return _Move(float(-2 * gain.sum() - before), z - x)

    def steepness(self) -> Tensor:
        """(tiles, groups) the sum of |G| over each group."""
        b, g, m = self.size, self.pattern.shared, self.pattern.m
        sums = self.gradient.abs().view(self.high, b // g, g, self.wide, b // m, m).sum((2, 5))
        return sums.transpose(1, 2).reshape(self.high * self.wide, -1)

    def _places(self, drawn: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Each tile's row and column in the grid (tiles, 1, 1), its drawn group's rows (tiles, shared, 1) and columns (tiles, 1, m) in the
        tile, and the index of these entries in the matrix."""
        g, m, across = self.pattern.shared, self.pattern.m, self.size // self.pattern.m
        tile, drawn = torch.arange(len(drawn)).view(-1, 1, 1), drawn.view(-1, 1, 1)
        i, j = tile // self.wide, tile % self.wide
        rows, columns = drawn // across * g + torch.arange(g).view(-1, 1), drawn % across * m + torch.arange(m)
        return i, j, rows, columns, (i * self.size + rows, j * self.size + columns)

    def _tiled(self, matrix: Tensor) -> Tensor:
        """(I, J, b b) of (rows, columns)."""
        return matrix.view(self.high, self.size, self.wide, self.size).transpose(1, 2).flatten(2)

    def _whole(self, tiles: Tensor) -> Tensor:
        """The inverse of `_tiled`."""
        return tiles.view(self.high, self.wide, self.size, self.size).transpose(1, 2).reshape(self.core.shape)


def wrapped(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """diag(left) core diag(right), (rows, columns), for blocks (I, b, b) and (J, b, b)."""
    return by_right(by_left(left, core), right)


def by_left(left: Tensor, core: Tensor) -> Tensor:
    """diag(left) core."""
    return (left @ core.view(len(left), left.shape[1], -1)).view(core.shape)


def by_right(core: Tensor, right: Tensor) -> Tensor:
    """core diag(right)."""
    return (core.view(len(core), len(right), -1).transpose(0, 1) @ right).transpose(0, 1).reshape(core.shape)
