"""Attention and adapters: listed by kind, so that nothing in a model goes unsaid, even where no pass takes them yet."""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.graph import Graph, Node, Place, Site, Value
from rewriter.passes.detect.linear import unique
from rewriter.passes.detect.spellings import Spelling, read

NO_PASS = "no pass for it yet"
_THROUGH = {"cast", "identity", "reshape", "expand", "mul", "div", "add", "slice", "getitem", "transpose", "unsqueeze", "squeeze"}


def detect(graph: Graph) -> Iterator[Site]:
    """Attention nodes, softmax between two products, and low-rank branches beside a linear."""
    taken: set[str] = set()
    for node in graph.nodes():
        kind = _kind(graph, node)
        if kind:
            scope = graph.scope(node) or graph.name(graph.outputs(node)[0])
            name = unique(f"{scope} ({kind})", taken)
            x = next((v for v in graph.inputs(node) if v is not None), None)
            y = graph.outputs(node)[0]
            yield Site(name, name, kind, None, graph.dtype(y), (Place((node,), x, y),), reason=NO_PASS)


def _kind(graph: Graph, node: Node) -> str:
    op = graph.op(node)
    if op == "attention" or (op == "softmax" and _between_products(graph, node)):
        return "attention"
    if op == "add" and _is_adapter(graph, node):
        return "adapter"
    return ""


def _between_products(graph: Graph, softmax: Node) -> bool:
    """softmax(… a @ b …) whose result is multiplied with a third value that varies."""
    ahead = _forward(graph, graph.outputs(softmax)[0], 4)
    behind = _back(graph, graph.inputs(softmax)[0], 6)
    return ahead is not None and behind is not None


def _product_of_two(graph: Graph, node: Node | None) -> bool:
    if node is None or graph.op(node) not in ("matmul", "einsum"):
        return False
    return read(graph, node) is None and all(v is not None and not graph.is_const(v) for v in graph.inputs(node)[:2])


def _forward(graph: Graph, value: Value, depth: int) -> Node | None:
    for user in graph.users(value):
        if _product_of_two(graph, user):
            return user
        if depth and graph.op(user) in _THROUGH:
            found = _forward(graph, graph.outputs(user)[0], depth - 1)
            if found is not None:
                return found
    return None


def _back(graph: Graph, value: Value | None, depth: int) -> Node | None:
    node = graph.producer(value) if value is not None else None
    if _product_of_two(graph, node):
        return node
    if node is None or not depth or graph.op(node) not in _THROUGH | {"where"}:
        return None
    for operand in graph.inputs(node):
        found = _back(graph, operand, depth - 1) if operand is not None else None
        if found is not None:
            return found
    return None


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
