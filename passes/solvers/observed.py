"""Numbers at the observed entries of an (m, n) matrix, and their products with thin factors: O(|W| r).

By whole matrices where most entries are observed, by sampled products that touch no other entry where few are.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

DENSE = 0.2  # of the entries: where more are observed, products of whole matrices are as fast as sampled ones


@dataclass(frozen=True)
class Whole:
    """Every entry (m, n); what stands where nothing is observed is to be given no weight."""

    def values(self, matrix: Tensor) -> Tensor:
        """The observed numbers of (m, n)."""
        return matrix

    def matrix(self, values: Tensor) -> Tensor:
        """(m, n), zero where nothing is observed."""
        return values

    def image(self, left: Tensor, right: Tensor) -> Tensor:
        """left right^T at the entries, for (m, r) and (n, r)."""
        return left @ right.T

    def onto_left(self, values: Tensor, right: Tensor) -> Tensor:
        """(m, r) values right."""
        return values @ right

    def onto_right(self, values: Tensor, left: Tensor) -> Tensor:
        """(n, r) values^T left."""
        return values.T @ left


@dataclass(frozen=True)
class Sampled:
    """The entries row by row; `turn` puts them column by column."""

    rows: Tensor  # (entries,)
    columns: Tensor  # (entries,)
    turn: Tensor  # (entries,)
    by_row: tuple[Tensor, Tensor]  # where each row begins, and the columns in it
    by_column: tuple[Tensor, Tensor]
    shape: tuple[int, int]

    @classmethod
    def of(cls, mask: Tensor) -> Self:
        rows, columns = mask.nonzero(as_tuple=True)
        turn = columns.argsort(stable=True)
        m, n = mask.shape
        return cls(rows, columns, turn, (_begins(rows, m), columns), (_begins(columns, n), rows[turn]), (m, n))

    def values(self, matrix: Tensor) -> Tensor:
        return matrix[self.rows, self.columns]

    def matrix(self, values: Tensor) -> Tensor:
        found = torch.zeros(self.shape, dtype=values.dtype)
        found[self.rows, self.columns] = values
        return found

    def image(self, left: Tensor, right: Tensor) -> Tensor:
        zeros = _compressed(self.by_row, torch.zeros(len(self.rows), dtype=left.dtype), self.shape)
        found: Tensor = torch.sparse.sampled_addmm(zeros, left, right.T).values()
        return found

    def onto_left(self, values: Tensor, right: Tensor) -> Tensor:
        product: Tensor = _compressed(self.by_row, values, self.shape) @ right
        return product

    def onto_right(self, values: Tensor, left: Tensor) -> Tensor:
        product: Tensor = _compressed(self.by_column, values[self.turn], self.shape[::-1]) @ left
        return product


def observed(mask: Tensor) -> Whole | Sampled:
    """The faster of the two for such a mask (m, n)."""
    return Sampled.of(mask) if 0 < float(mask.double().mean()) < DENSE else Whole()


def _begins(rows: Tensor, count: int) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=count).cumsum(0)])


def _compressed(pattern: tuple[Tensor, Tensor], values: Tensor, shape: tuple[int, ...]) -> Any:
    """The CSR matrix."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(*pattern, values, shape, check_invariants=False)
