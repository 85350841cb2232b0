"""Of a rank-r matrix A (m, r) with independent columns, r rows P with  A = C A_P  and |C| <= 5: a well-conditioned row basis.

Elimination with row pivoting chooses; where its coefficients exceed the bound, rows are exchanged, each exchange multiplying |det A_P|
by at least the bound, so that they end (maximal volume: Goreinov et al. 2010; Gu and Eisenstat 1996). Pivoted QR takes fifteen times
as long for coefficients of the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUND = 5.0  # less costs exchanges and gains no digit
EXCHANGES = 500


def row_basis(basis: Tensor, bound: float = BOUND) -> tuple[Tensor, Tensor, float]:
    """(m, r) -> (pivots (r,), coefficients (m, r) with basis = coefficients @ basis[pivots], largest coefficient).

    basis needs full column rank; m >= r.
    """
    a = basis.double()
    pivots = _eliminated(a)
    coefficients = _solve(a, pivots)
    for _ in range(EXCHANGES):
        row, column = divmod(int(coefficients.abs().argmax()), a.shape[1])
        value = coefficients[row, column].clone()
        if not value.abs() > bound:
            break
        change = coefficients[row].clone()
        change[column] -= 1
        coefficients = coefficients - torch.outer(coefficients[:, column] / value, change)
        pivots[column] = row
    coefficients = _solve(a, pivots)
    return pivots, coefficients, float(coefficients.abs().max())


def row_window(basis: Tensor, windows: int = 33) -> tuple[int, Tensor, float]:
    """(m, r) -> (start, coefficients (m, r), largest): of some windows of r neighbouring rows, the one whose coefficients are least.

    A window needs no permutation when it is put back; on trained weights its coefficients are about twice the best rows' ones.
    """
    a, (m, r) = basis.double(), basis.shape
    starts = sorted({round(i * (m - r) / max(windows - 1, 1)) for i in range(windows)})
    best, best_largest = starts[0], float("inf")
    for start in starts:
        solved, singular = torch.linalg.solve_ex(a[start : start + r].T, a.T)
        largest = float(solved.abs().max())
        if not int(singular) and largest < best_largest:
            best, best_largest = start, largest
    if best_largest == float("inf"):
        return best, torch.zeros_like(a), best_largest
    return best, _solve(a, torch.arange(best, best + r)), best_largest


def _eliminated(a: Tensor) -> Tensor:
    """The rows that elimination with partial pivoting brings to the top."""
    order = list(range(len(a)))
    for i, swap in enumerate(torch.linalg.lu_factor_ex(a).pivots.tolist()):
        order[i], order[swap - 1] = order[swap - 1], order[i]
    return torch.tensor(order[: a.shape[1]])


def _solve(a: Tensor, pivots: Tensor) -> Tensor:
    """C with C a[pivots] = a."""
    solved: Tensor = torch.linalg.solve(a[pivots].T, a.T).T
    return solved.contiguous()
