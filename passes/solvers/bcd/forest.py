"""H d = r where the graph of H's off-diagonal entries is a forest, by passing messages to the roots and back: linear in its edges.

    to the parent p of i:  h_pp -= h_ip^2 / h_ii,  r_p -= h_ip r_i / h_ii        back:  d_i = (r_i - h_ip d_p) / h_ii

Source: JMLR 23(131), 2022, section 5 (Gaussian belief propagation, exact on trees; sparse elimination in a perfect order).
"""

from __future__ import annotations

import networkx
import torch
from torch import Tensor


def graph_of(h: Tensor) -> networkx.Graph:
    """The graph of a symmetric matrix (n, n): an edge for each pair that is not zero."""
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(h)))
    graph.add_edges_from(torch.triu(h, 1).nonzero().tolist())
    return graph


def solve_forest(h: Tensor, r: Tensor) -> Tensor:
    """(b,) solution for h (b, b) positive definite. Raises ValueError where its graph has a cycle."""
    graph = graph_of(h)
    if len(graph) and not networkx.is_forest(graph):
        raise ValueError("the block's graph has a cycle, so messages do not solve it; take blocks that are forests")
    pivots, sums = h.diagonal().tolist(), r.tolist()
    edges = [
        (child, parent, float(h[child, parent]))
        for tree in networkx.connected_components(graph)
        for parent, child in networkx.bfs_edges(graph, min(tree))
    ]
    for child, parent, weight in reversed(edges):
        pivots[parent] -= weight * weight / pivots[child]
        sums[parent] -= weight * sums[child] / pivots[child]
    found = [s / p for s, p in zip(sums, pivots, strict=True)]  # right at the roots
    for child, parent, weight in edges:
        found[child] = (sums[child] - weight * found[parent]) / pivots[child]
    return torch.tensor(found, dtype=r.dtype)
