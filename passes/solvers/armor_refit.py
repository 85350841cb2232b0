"""Given A, B and the mask, W' again under all second moments H: min tr((W - A S B) H (W - A S B)^T) over S on its support.

    P S Q = G on the support,   P = A^T A,   Q = B H B^T,   G = A^T W H B^T

`armor` sees the diagonal of H alone, so that its tiles are apart; what inputs tell of one another is won back here, by conjugate gradients
from where it ended. The weighted error never rises; ARMOR's proxy loss may.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rewriter.passes.solvers.armor import Wrapped, by_left, by_right
from rewriter.passes.solvers.bcd.update import conjugate

STEPS = 15


def repruned(pruned: Tensor, weight: Tensor, second: Tensor) -> Tensor:
    """A pruned weight with its kept values refitted: wrappers of ones."""
    left, right = (pruned.new_ones(size, 1, 1) for size in pruned.shape)
    return refitted(Wrapped(left, pruned, right, ()), weight, second).core


def refitted(found: Wrapped, weight: Tensor, second: Tensor, steps: int = STEPS) -> Wrapped:
    """The same wrappers and mask around other values, for a (rows, columns) weight and second moments (columns, columns)."""
    work = found.core.dtype
    mask, h = found.core != 0, second.to(work)
    along = by_right(by_right(h, found.right.mT).T, found.right.mT)  # Q
    gap = weight.to(work) - found.dense()

    def apart(matrix: Tensor) -> Tensor:
        return matrix.view(len(found.left), -1)  # the rows of one block of A are a system of their own

    def times(v: Tensor) -> Tensor:
        inner = by_left(found.left, v.view(mask.shape))
        return apart(mask * (by_left(found.left.mT, inner) @ along))

    right = apart(mask * by_right(by_left(found.left.mT, gap @ h), found.right.mT))
    scale = apart(torch.outer(found.left.square().sum(1).flatten(), along.diagonal()))
    step = conjugate(times, right, torch.where(scale > 0, 1 / scale, 0.0), steps)
    return replace(found, core=found.core + step.view(mask.shape))
