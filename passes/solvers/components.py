"""The connected components of a weight's bipartite graph, rows and columns joined by nonzeros: blocks up to permutations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor


@dataclass(frozen=True)
class Component:
    """Rows and columns that see only each other, ascending."""

    rows: Tensor  # (p,) int64
    columns: Tensor  # (q,) int64


def components(weight: Tensor) -> list[Component]:
    """Components with at least one nonzero, in the order of their first row; zero rows and columns are in none. weight (m, n)."""
    nonzero = np.asarray((weight != 0).numpy(), dtype=np.bool_)
    m, n = nonzero.shape
    if nonzero.all(1).any() or nonzero.all(0).any():  # a full row or column connects everything that lives
        return [_component(np.flatnonzero(nonzero.any(1)), np.flatnonzero(nonzero.any(0)))]
    rows, columns = np.nonzero(nonzero)
    sparse: Any = scipy.sparse  # untyped
    graph = sparse.coo_array((np.ones(len(rows), dtype=np.int8), (rows, columns + m)), shape=(m + n, m + n))
    labels = connected_components(graph, directed=False)[1]
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    found = [_component(part[part < m], part[part >= m] - m) for part in parts if len(part) > 1]
    return sorted(found, key=lambda c: int(c.rows[0]))


def _component(rows: np.ndarray, columns: np.ndarray) -> Component:
    return Component(torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(columns.astype(np.int64)))


def adopt_zeros(parts: list[Component], shape: tuple[int, int]) -> list[Component]:
    """The same components, each zero row and column given to the component of the nearest live one before it (else after it)."""
    rows = _nearest([p.rows for p in parts], shape[0])
    columns = _nearest([p.columns for p in parts], shape[1])
    return [Component((rows == i).nonzero().flatten(), (columns == i).nonzero().flatten()) for i in range(len(parts))]


def _nearest(members: list[Tensor], length: int) -> Tensor:
    owner = torch.full((length,), -1)
    for i, index in enumerate(members):
        owner[index] = i
    live = (owner >= 0).nonzero().flatten()
    return owner[live[(torch.searchsorted(live, torch.arange(length), right=True) - 1).clamp_min(0)]]
