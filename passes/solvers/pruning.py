"""n of every m inputs kept: by size, by size times what the input carries, by both after normalising, or with the others making up for it.

    magnitude |w|       Wanda |w| |x_j|       NoWag (w / column norm / row norm)^2 |x_j|^2       SparseGPT w^2 / u_jj^2, U = chol(H^-1)
SparseGPT takes groups from left to right, and what a column loses the columns to its right make up: w_k -= (w_j / u_jj) u_jk.
Sources: Wanda (arXiv:2306.11695) eq. 1; NoWag (arXiv:2504.14569); SparseGPT (arXiv:2301.00774) algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.passes.solvers.spectral import cholesky, ridged

DAMPING = 0.01  # of the mean of H's diagonal, as in SparseGPT


def kept(scores: Tensor, n: int, m: int) -> Tensor:
    """(rows, columns) bool: the n largest scores of every m neighbours in a row. Raises ValueError where m does not divide."""
    rows, columns = scores.shape
    if columns % m or not 0 < n < m:
        raise ValueError(f"{n}:{m} of {columns} columns; m has to divide them, and n to lie between 0 and m")
    groups = scores.reshape(rows, -1, m)
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, groups.topk(n, -1).indices, value=True).reshape(rows, columns)


def magnitude(weight: Tensor, n: int, m: int) -> Tensor:
    """The pruned (rows, columns) weight."""
    return weight * kept(weight.abs(), n, m)


def wanda(weight: Tensor, diagonal: Tensor, n: int, m: int) -> Tensor:
    """The pruned weight for inputs of second moments `diagonal` (columns,)."""
    return weight * kept(weight.abs() * diagonal.sqrt(), n, m)


@dataclass(frozen=True)
class Normalised:
    """W = diag(rows) core diag(columns) with columns of norm 1, then rows of norm 1; what is zero stays zero."""

    core: Tensor  # (m, n)
    rows: Tensor  # (m,)
    columns: Tensor  # (n,)

    @classmethod
    def of(cls, weight: Tensor) -> Normalised:
        columns = weight.norm(dim=0)
        core = weight / torch.where(columns > 0, columns, 1.0)
        rows = core.norm(dim=1)
        return cls(core / torch.where(rows > 0, rows, 1.0)[:, None], rows, columns)


def nowag(weight: Tensor, diagonal: Tensor, n: int, m: int) -> Tensor:
    """The pruned weight, chosen on the normalised one."""
    return weight * kept(Normalised.of(weight).core.square() * diagonal, n, m)


def sparsegpt(weight: Tensor, second: Tensor, n: int, m: int) -> Tensor:
    """The pruned weight for inputs of second moments (columns, columns), the kept numbers changed to make up for the others."""
    kept(weight, n, m)  # refuses what does not divide
    upper = torch.linalg.cholesky(torch.cholesky_inverse(cholesky(ridged(second, DAMPING), 0.0)), upper=True)
    w = weight.double().clone()
    for begin in range(0, w.shape[1], m):
        group = slice(begin, begin + m)
        keep = kept(w[:, group].square() / upper[group, group].diagonal().square(), n, m)
        for j in range(m):
            lost = torch.where(keep[:, j], 0.0, w[:, begin + j]) / upper[begin + j, begin + j]
            w[:, begin + j :] -= torch.outer(lost, upper[begin + j, begin + j :])
            w[:, begin + j] *= keep[:, j]  # rounding
    return w.to(weight.dtype)
