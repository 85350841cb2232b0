"""Adapters: listed, so that nothing in a model goes unsaid, even where no pass takes them yet."""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.graph import Graph, Node, Place, Site, Value
from rewriter.passes.detect.linear import unique
from rewriter.passes.detect.spellings import Spelling, read

NO_PASS = "no pass for it yet"


def detect(graph: Graph) -> Iterator[Site]:
    """Low-rank branches beside a linear."""
    taken: set[str] = set()
    for node in graph.nodes():
        if graph.op(node) == "add" and _is_adapter(graph, node):
            y = graph.outputs(node)[0]
            name = unique(f"{graph.scope(node) or graph.name(y)} (adapter)", taken)
            x = next((v for v in graph.inputs(node) if v is not None), None)
            yield Site(name, name, "adapter", None, graph.dtype(y), (Place((node,), x, y),), reason=NO_PASS)


def _is_adapter(graph: Graph, node: Node) -> bool:
    """base(x) + scale * up(down(x)) with a down-projection that is thin beside the base."""
    a, b = (list(graph.inputs(node)) + [None, None])[:2]
    return _branch(graph, a, b) or _branch(graph, b, a)


def _branch(graph: Graph, base: Value | None, low: Value | None) -> bool:
    first, up = _linear_behind(graph, base), _linear_behind(graph, low)
    down = _linear_behind(graph, up.place.x) if up else None
    if first is None or up is None or down is None:
        return False
    thin = 4 * down.shape[0] <= min(first.shape)
    return thin and first.shape == (up.shape[0], down.shape[1]) and _origin(graph, first.place.x) is _origin(graph, down.place.x)


def _origin(graph: Graph, value: Value) -> Value:
    """The value before casts and dropouts."""
    node = graph.producer(value)
    while node is not None and graph.op(node) in ("cast", "identity"):
        value = next(v for v in graph.inputs(node) if v is not None)
        node = graph.producer(value)
    return value


def _linear_behind(graph: Graph, value: Value | None) -> Spelling | None:
    """The product that a value comes from, scalings and casts looked through."""
    for _ in range(4):
        node = graph.producer(value) if value is not None else None
        if node is None:
            return None
        found = read(graph, node)
        if found is not None:
            return found
        if graph.op(node) not in ("mul", "cast", "identity", "add"):
            return None
        value = next((v for v in graph.inputs(node) if v is not None and not graph.is_const(v)), None)
    return None
