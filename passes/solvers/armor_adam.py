"""The same model and loss as `armor`, its factors by gradient: one joint step of Adam on A, B and W', then one group in every tile.

    (A, B, W') <- Adam of L / sum_ij Wbar_ij^2 d_j        M, W' of one group a tile <- the best support, taken where L falls

Adam may rise, so the best factors seen are given back: its start is NoWag-P, and L never exceeds that.
Source: ARMOR (arXiv:2510.05528), as it is run there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.passes.solvers.armor import ArmorProblem, Pattern, Wrapped, draw, wrapped

STEPS, RATE = 1000, 1e-3  # the paper's rate of 1e-4 wants its 20,000 steps


def armor_adam(
    weight: Tensor, diagonal: Tensor, block: int, pattern: Pattern, rng: torch.Generator, steps: int = STEPS, rate: float = RATE
) -> Wrapped:
    """As `armor` fits; `losses` are the least L so far, at the start and after each step. Raises ValueError as `armor` does."""
    fit = ArmorProblem.of(weight, diagonal, block, pattern)
    factors = [fit.left.requires_grad_(), fit.core.requires_grad_(), fit.right.requires_grad_()]
    fit.left, fit.core, fit.right = (f.detach() for f in factors)  # the same numbers: who moves one moves the other
    whole = (fit.given.core.square() * fit.weights).sum().clamp_min(torch.finfo(fit.weights.dtype).tiny)
    adam = torch.optim.Adam(factors, rate)
    best, losses = factors, list[float]()
    for step in range(steps + 1):
        adam.zero_grad()
        loss = (_gap(fit, factors).square() * fit.weights).sum()
        if not losses or loss.item() < losses[-1]:
            best = [f.detach().clone() for f in factors]
        losses.append(min([loss.item(), *losses[-1:]]))
        if step < steps:
            (loss / whole).backward()
            adam.step()
            _move_groups(fit, rng)
    return fit.folded(best[0], best[1], best[2], losses)


def _move_groups(fit: ArmorProblem, rng: torch.Generator) -> None:
    fit.core.mul_(fit.mask)  # a group that moved leaves momentum behind
    fit.refresh()
    chosen = draw(fit, rng)
    move = fit.move_groups(chosen)
    if move.change <= 0:
        fit.apply(chosen, move)


def _gap(fit: ArmorProblem, factors: list[Tensor]) -> Tensor:
    left, core, right = factors
    return fit.given.core - wrapped(left, core * fit.mask, right)
