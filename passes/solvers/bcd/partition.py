"""Fixed blocks of n coordinates: in order, by Lipschitz constant, tiles of a matrix, groups of M in a row, forests of a graph.

Sorting by L_i puts coordinates of one scale together, so that a block's bound is tight for all of them: of the partitions that the paper
compares it is the best for greedy rules (JMLR 23(131), 2022, figure 10).
"""

from __future__ import annotations

import networkx
import torch
from torch import Tensor


def in_order(n: int, size: int) -> list[Tensor]:
    """n / size blocks of neighbours; the last may be shorter."""
    return list(torch.arange(n).split(size))


def by_lipschitz(diagonal: Tensor, size: int) -> list[Tensor]:
    """Blocks of coordinates whose L_i (n,) are neighbours in size: the paper's Sort."""
    return list(diagonal.argsort(descending=True, stable=True).split(size))


def averaged(diagonal: Tensor, size: int) -> list[Tensor]:
    """Blocks whose sums of L_i (n,) are alike, each taking from every part of the order: the paper's Avg."""
    order = diagonal.argsort(descending=True, stable=True)
    count = -(-len(order) // size)
    return [order[i::count] for i in range(count)]


def tiles(rows: int, columns: int, height: int, width: int) -> list[Tensor]:
    """Blocks of a row-major (rows, columns) matrix that are height x width rectangles, smaller at the edges."""
    index = torch.arange(rows * columns).view(rows, columns)
    return [part.flatten() for band in index.split(height, 0) for part in band.split(width, 1)]


def nm_groups(rows: int, columns: int, m: int, shared: int = 1) -> list[Tensor]:
    """m neighbours in each of `shared` rows of a (rows, columns) matrix, whose mask is chosen together: N:M is shared = 1.

    Raises ValueError where m or shared do not divide.
    """
    if columns % m or rows % shared:
        raise ValueError(f"groups of {m} columns and {shared} rows of a {rows} x {columns} matrix; they have to divide it")
    return tiles(rows, columns, shared, m)


def forests(graph: networkx.Graph, scores: Tensor) -> list[Tensor]:
    """The nodes 0..n-1 dealt into induced forests, each grown greedily in falling order of the scores (n,)."""
    left = scores.argsort(descending=True, stable=True).tolist()
    found = []
    while left:
        forest = induced_forest(graph, left)
        found.append(torch.tensor(forest))
        taken = set(forest)
        left = [v for v in left if v not in taken]
    return found


def induced_forest(graph: networkx.Graph, order: list[int]) -> list[int]:
    """The nodes of `order` one by one, each left out that would close a cycle with those taken."""
    from scipy.cluster.hierarchy import DisjointSet

    trees = DisjointSet()
    for node in order:
        roots = [trees[near] for near in graph.adj[node] if near in trees]
        if len(set(roots)) == len(roots):
            trees.add(node)
            for root in roots:
                trees.merge(node, root)
    return list(trees)
