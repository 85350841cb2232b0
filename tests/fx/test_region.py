"""What a step computes elementwise is computed for all steps at once, in its order, however long the chain is."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from rewriter.backends.fx import region
from rewriter.graph import Port

aten = torch.ops.aten


def hoisted(graph: Graph, value: Node, inner: Node, outer: Node) -> list[Node]:
    """What is added to the graph for a step's value, `inner` being a slice of `outer`."""
    before = len(graph.nodes)

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return graph.call_function(target, args, kwargs)

    region._hoisted(call, Port(value, hoist={inner: outer}), lambda v: v)
    return list(graph.nodes)[before:]


def test_every_value_once_operands_first() -> None:
    graph = Graph()
    x, t, w = (graph.placeholder(name) for name in "xtw")
    exp, neg = graph.call_function(aten.exp.default, (t,)), graph.call_function(aten.neg.default, (t,))
    product = graph.call_function(aten.mul.Tensor, (neg, exp))
    total = graph.call_function(aten.add.Tensor, (product, w), {"alpha": 2})
    last = graph.call_function(aten.sub.Tensor, (total, neg))
    a, b, c, d, e = hoisted(graph, last, t, x)
    assert [n.target for n in (a, b, c, d, e)] == [neg.target, exp.target, product.target, total.target, last.target]
    assert [n.args for n in (a, b, c, d, e)] == [(x,), (x,), (a, b), (c, w), (d, a)]
    assert d.kwargs == {"alpha": 2}


def test_a_long_chain() -> None:
    graph = Graph()
    x, t = graph.placeholder("x"), graph.placeholder("t")
    value = t
    for _ in range(5_000):
        value = graph.call_function(aten.neg.default, (value,))
    made = hoisted(graph, value, t, x)
    assert [n.args for n in made] == [(n,) for n in [x, *made[:-1]]] and len(made) == 5_000
