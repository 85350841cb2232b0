"""Of a rank-r matrix A (m, r) with independent columns, r rows P with  A = C A_P  and |C| <= 2: a well-conditioned row basis.

Pivoted QR of A^T chooses; where its coefficients exceed the bound, rows are exchanged while that enlarges |det A_P| (Gu and Eisenstat 1996;
the maximal-volume algorithm of Goreinov et al. 2010), which ends because every exchange at least doubles the volume.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

BOUND = 2.0
EXCHANGES = 500


def row_basis(basis: Tensor, bound: float = BOUND) -> tuple[Tensor, Tensor, float]:
    """(m, r) -> (pivots (r,), coefficients (m, r) with basis = coefficients @ basis[pivots], largest coefficient).

    basis needs full column rank; m >= r.
    """
    a = basis.double().numpy()
    rank = a.shape[1]
    pivots = scipy.linalg.qr(a.T, mode="r", pivoting=True)[1][:rank].copy()
    coefficients = _solve(a, pivots)
    for _ in range(EXCHANGES):
        row, column = np.unravel_index(np.abs(coefficients).argmax(), coefficients.shape)
        if not abs(coefficients[row, column]) > bound:
            break
        change = coefficients[row].copy()
        change[column] -= 1
        coefficients -= np.outer(coefficients[:, column] / coefficients[row, column], change)
        pivots[column] = row
    coefficients = _solve(a, pivots)
    return torch.from_numpy(pivots.astype(np.int64)), torch.from_numpy(coefficients), float(np.abs(coefficients).max())


def _solve(a: np.ndarray, pivots: np.ndarray) -> np.ndarray:
    solved: np.ndarray = np.linalg.solve(a[pivots].T, a.T).T
    return np.ascontiguousarray(solved)
