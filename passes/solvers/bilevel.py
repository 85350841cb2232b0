"""min over x of F(x) = (1/m) sum_i f_i(x, y(x)), y_i(x) = argmin g_i(x, y_i): multi-block bilevel descent on samples of blocks and of data.

With S the I blocks of this step, F_S the mean of their f_i, and every old value taken on the new batch (MSVR, STORM):
    s_i <- (1 - α) s_i + (α + γ) grad_y g_i(new) - γ grad_y g_i(old),    y_i <- y_i - τ s_i
    v1: H_i <- the same rule on the Hessian of g_i, eigenvalues kept >= bound;    v_i = H_i^-1 I grad_yi F_S
    v2: u_i <- the same rule on (Hessian of g_i) v_i - I grad_yi F_S;             v_i <- v_i - τ_v u_i, kept in a ball
    G = grad_x F_S - (1/I) sum_S d2_xy g_i v_i,    z <- (1 - β) (z - G(old)) + G(new),    x <- x - η z
v1 steps every y_i in every round; v2 steps the sampled ones, once for each round that they missed. An f_i that reads the y of other blocks
couples them; then all blocks have to be taken in every step (I = m), for else grad F_S is not what F's would be in the mean.
Source: BSVRB, Hu, Qiu, Guo, Zhang and Yang, ICML 2023 (arXiv:2305.18730). Only the sums of f_i over other blocks' y are ours.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Rows = Tensor  # (B,) int64, which samples


class AbstractBilevel(abc.ABC):
    """`blocks` lower problems over `samples` samples each; losses are means over the rows that they are given, differentiable twice."""

    blocks: int
    samples: int

    @abc.abstractmethod
    def upper(self, x: Tensor, y: Sequence[Tensor], i: int, rows: Rows) -> Tensor:
        """f_i, a scalar; y holds every block's."""

    @abc.abstractmethod
    def lower(self, x: Tensor, y: Tensor, i: int, rows: Rows) -> Tensor:
        """g_i of y_i alone, a scalar, strongly convex in it."""


@dataclass(frozen=True)
class Settings:
    """Raises ValueError for values that cannot be."""

    version: Literal[1, 2] = 2  # 1 holds a matrix for each block, 2 vectors only
    blocks: int = 1  # I, a step
    batch: int = 32  # B, samples of each block's lower and of its upper loss
    steps: int = 1000
    alpha: float = 0.9  # how fast s, H and u forget
    beta: float = 0.9  # how fast z forgets
    gamma: float | None = (
        None  # how much of a change they follow; None: 1 - α, as where all blocks are taken; in theory + (m - I) / (I (1 - α))
    )
    tau: float = 0.5  # steps of y, of v, of x
    tau_v: float = 0.5
    eta: float = 1e-2
    bound: float = 1e-3  # of the eigenvalues of g_i's Hessian, from below
    radius: float = 1e3  # of v

    def __post_init__(self) -> None:
        wrong = [name for name in ("alpha", "beta") if not 0 < getattr(self, name) <= 1]
        wrong += [name for name in ("tau", "tau_v", "bound", "radius") if not getattr(self, name) > 0]
        wrong += [name for name in ("blocks", "batch", "steps") if getattr(self, name) < 1]
        wrong += ["eta"] * (not self.eta >= 0) + ["version"] * (self.version not in (1, 2))
        if wrong:
            given = ", ".join(f"{name}={getattr(self, name)}" for name in wrong)
            raise ValueError(f"{given}; alpha and beta lie in (0, 1], the others above 0 (eta at 0 or above), version is 1 or 2")


@dataclass(frozen=True)
class Solved:
    """Where the descent ended, and what each step saw."""

    x: Tensor
    y: tuple[Tensor, ...]
    slope: Tensor  # z, the estimate of F's gradient
    trace: tuple[tuple[float, float], ...] = field(repr=False)  # (F_S on its batch, |z|), a step each


@dataclass(frozen=True)
class _State:
    x: Tensor
    y: tuple[Tensor, ...]
    curve: tuple[Tensor, ...]  # v1: H_i (k, k); v2: v_i like y_i


@dataclass(frozen=True)
class _Look:
    """What a batch shows at a state."""

    value: float  # F_S
    slope: Tensor  # G
    lower: dict[int, Tensor]  # grad_y g_i, of the sampled blocks, as the next
    errors: dict[int, Tensor]  # (Hessian of g_i) v_i - I grad_yi F_S


@dataclass(frozen=True)
class _Batch:
    blocks: list[int]
    lower: list[Rows]
    upper: list[Rows]


def solve(problem: AbstractBilevel, x: Tensor, y: Sequence[Tensor], settings: Settings, rng: torch.Generator) -> Solved:
    """Descends from x and a start of each y_i. Raises ValueError where blocks do not fit, or where a step is no longer finite."""
    if not len(y) == problem.blocks >= settings.blocks:
        raise ValueError(f"{len(y)} starts, {settings.blocks} blocks a step; there are {problem.blocks} blocks, each with one start")
    run = _Run(problem, settings)
    x, y = x.detach(), tuple(part.detach() for part in y)
    everything = _drawn(problem, replace(settings, blocks=problem.blocks), rng)
    now = _State(x, y, tuple(run.start(x, y[i], i, rows) for i, rows in enumerate(everything.lower)))
    first = run.look(now, everything)
    slopes, errors = first.lower, first.errors
    old, missed, z = now, [1] * problem.blocks, None
    trace = []
    for step in range(settings.steps):
        batch = _drawn(problem, settings, rng)
        fresh, stale = run.look(now, batch), run.look(old, batch)
        z = fresh.slope if z is None else (1 - settings.beta) * (z - stale.slope) + fresh.slope
        if not bool(torch.isfinite(z).all()):
            raise ValueError(f"step {step}: the hypergradient is not finite; take a smaller eta, tau or tau_v, or a larger bound")
        slopes |= {i: run.follow(slopes[i], fresh.lower[i], stale.lower[i]) for i in batch.blocks}
        errors |= {i: run.follow(errors[i], fresh.errors[i], stale.errors[i]) for i in batch.blocks}
        curve = run.curved(now, old, batch, errors)
        lag = [missed[i] if settings.version == 2 else 1 for i in range(problem.blocks)]
        stepped = batch.blocks if settings.version == 2 else range(problem.blocks)
        after = tuple(part - settings.tau * lag[i] * slopes[i] if i in stepped else part for i, part in enumerate(now.y))
        missed = [1 if i in batch.blocks else rounds + 1 for i, rounds in enumerate(missed)]
        old, now = now, _State(now.x - settings.eta * z, after, curve)
        trace.append((fresh.value, float(z.norm())))
    assert z is not None
    return Solved(now.x, now.y, z, tuple(trace))


def _drawn(problem: AbstractBilevel, settings: Settings, rng: torch.Generator) -> _Batch:
    """All blocks or rows in order where all are asked for."""

    def some(of: int, count: int) -> Tensor:
        return torch.arange(of) if count >= of else torch.randperm(of, generator=rng)[:count].sort().values

    blocks = some(problem.blocks, settings.blocks).tolist()
    lower, upper = ([some(problem.samples, settings.batch) for _ in blocks] for _ in range(2))
    return _Batch(blocks, lower, upper)


class _Run:
    """The derivatives, by autograd."""

    def __init__(self, problem: AbstractBilevel, settings: Settings) -> None:
        self.problem, self.settings = problem, settings
        self.gamma = 1 - settings.alpha if settings.gamma is None else settings.gamma

    def follow(self, estimate: Tensor, new: Tensor, old: Tensor) -> Tensor:
        """MSVR's rule."""
        return (1 - self.settings.alpha) * estimate + (self.settings.alpha + self.gamma) * new - self.gamma * old

    def hessian(self, x: Tensor, y: Tensor, i: int, rows: Rows) -> Tensor:
        """(k, k) in y_i as a vector."""
        y, k = y.detach().requires_grad_(), y.numel()
        (slope,) = torch.autograd.grad(self.problem.lower(x, y, i, rows), y, create_graph=True)
        units = torch.eye(k, dtype=y.dtype).view(k, *y.shape)
        return torch.autograd.grad(slope, y, units, is_grads_batched=True)[0].reshape(k, k)

    def along(self, x: Tensor, y: Tensor, v: Tensor, i: int, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """(grad_y g_i like y, d2_xy g_i v like x, d2_yy g_i v like y)."""
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.problem.lower(x, y, i, rows), y, create_graph=True)
        mixed, own = torch.autograd.grad((slope * v).sum(), (x, y), allow_unused=True)
        return slope.detach(), torch.zeros_like(x) if mixed is None else mixed, own

    def start(self, x: Tensor, y: Tensor, i: int, rows: Rows) -> Tensor:
        """H_i, or v_i = 0."""
        return self.bounded(self.hessian(x, y, i, rows)) if self.settings.version == 1 else torch.zeros_like(y)

    def bounded(self, h: Tensor) -> Tensor:
        """The nearest symmetric matrix whose eigenvalues are no less than the bound."""
        values, vectors = torch.linalg.eigh((h + h.T) / 2)
        return torch.as_tensor((vectors * values.clamp_min(self.settings.bound)) @ vectors.T)

    def upper_slopes(self, at: _State, batch: _Batch) -> tuple[float, Tensor, dict[int, Tensor]]:
        """F_S, its gradient in x, and I times that in each sampled y_i."""
        x, y = at.x.detach().requires_grad_(), [part.detach().requires_grad_() for part in at.y]
        terms = [self.problem.upper(x, y, i, rows) for i, rows in zip(batch.blocks, batch.upper, strict=True)]
        value = torch.stack(terms).mean()
        in_x, *in_y = torch.autograd.grad(value, (x, *y), allow_unused=True)
        stray = [i for i, slope in enumerate(in_y) if slope is not None and i not in batch.blocks]
        if stray:
            raise ValueError(f"upper losses of blocks {batch.blocks} read y of block {stray[0]}: take all {len(y)} blocks in a step")
        found = {i: torch.zeros_like(y[i]) if (slope := in_y[i]) is None else len(terms) * slope for i in batch.blocks}
        return float(value.detach()), torch.zeros_like(x) if in_x is None else in_x, found

    def look(self, at: _State, batch: _Batch) -> _Look:
        value, found, slopes = self.upper_slopes(at, batch)
        lower, errors = {}, {}
        for i, rows in zip(batch.blocks, batch.lower, strict=True):
            v = at.curve[i]
            if self.settings.version == 1:
                v = torch.linalg.solve(at.curve[i], slopes[i].flatten()).view_as(slopes[i])
            lower[i], mixed, own = self.along(at.x, at.y[i], v, i, rows)
            found, errors[i] = found - mixed / len(batch.blocks), own - slopes[i]
        return _Look(value, found, lower, errors)

    def curved(self, now: _State, old: _State, batch: _Batch, errors: dict[int, Tensor]) -> tuple[Tensor, ...]:
        """The next H_i, or v_i from the `errors` u."""
        curve = list(now.curve)
        for i, rows in zip(batch.blocks, batch.lower, strict=True):
            if self.settings.version == 1:
                curve[i] = self.bounded(self.follow(curve[i], *(self.hessian(at.x, at.y[i], i, rows) for at in (now, old))))
            else:
                moved = curve[i] - self.settings.tau_v * errors[i]
                curve[i] = moved * min(1.0, self.settings.radius / max(float(moved.norm()), torch.finfo(moved.dtype).tiny))
        return tuple(curve)
