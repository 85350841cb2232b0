"""Blocks of a model: every path from what lies before a cut to the outputs goes through it, checked by taking it away."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from rewriter.cuts import cuts
from rewriter.graph import Graph
from tests.engine.nets import Mlp, Net, graph, linear, normal, sites

WIDTH = 16
TAPE = f"x:float32[batch,seq,{WIDTH}]"


class Residual(nn.Module):
    """x + b(relu(a(x))), with a norm before or behind, `depth` times."""

    def __init__(self, depth: int, behind: bool) -> None:
        super().__init__()
        self.a = nn.ModuleList(linear(normal(24, WIDTH, seed=i), normal(24, seed=i)) for i in range(depth))
        self.b = nn.ModuleList(linear(normal(WIDTH, 24, seed=i + 9), normal(WIDTH, seed=i)) for i in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        for a, b, norm in zip(self.a, self.b, self.norms, strict=True):
            x = norm(x + b(torch.relu(a(x)))) if self.behind else x + b(torch.relu(a(norm(x))))
        return x


def _branches() -> nn.Module:
    """Two sites beside each other, and one behind both."""
    parts = {name: linear(normal(WIDTH, WIDTH, seed=i)) for i, name in enumerate(("left", "right", "last"))}
    return Net(lambda n, x: n.last(torch.relu(n.left(x) + n.right(torch.sin(x)))), **parts)


MODELS = {"before": Residual(3, False), "behind": Residual(3, True), "branches": _branches()}


def _paths(g: Graph) -> nx.DiGraph:
    found = nx.DiGraph()
    for node in g.nodes():
        for value in g.outputs(node):
            found.add_edges_from((node, user) for user in g.users(value))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_without_a_cut_nothing_before_it_reaches_the_outputs(name: str) -> None:
    g = graph(MODELS[name], TAPE)
    blocks = cuts(g, sites(g))
    paths = _paths(g)
    outputs = [node for node in paths if not paths.out_degree(node) and "assert" not in g.op(node)]
    before = []
    for value, own in blocks:
        before += own
        left = paths.copy()
        left.remove_node(g.producer(value))
        for site in before:
            assert not any(nx.has_path(left, g.producer(site.places[-1].y), end) for end in outputs)


@pytest.mark.parametrize("behind", [False, True])
def test_residual_blocks_end_where_the_next_one_begins(behind: bool) -> None:
    g = graph(Residual(3, behind), TAPE)
    blocks = cuts(g, sites(g))
    assert [[s.name for s in own] for _, own in blocks][-2:] == [["a.1", "b.1"], ["a.2", "b.2"]]
    ends = [g.op(g.producer(value)) for value, own in blocks if own[-1].name.startswith("b")]
    assert ends == ["layer_norm" if behind else "add"] * 3


def test_sites_beside_each_other_are_one_block() -> None:
    g = graph(_branches(), TAPE)
    first, *_ = cuts(g, sites(g))
    assert {s.name for s in first[1]} == {"left", "right"} and g.op(g.producer(first[0])) == "relu"


def test_a_site_that_is_the_output_ends_no_block() -> None:
    g = graph(Mlp())
    assert [[s.name for s in own] for _, own in cuts(g, sites(g))] == [["first"]]


def test_no_sites_no_blocks() -> None:
    assert cuts(graph(Mlp()), []) == []
