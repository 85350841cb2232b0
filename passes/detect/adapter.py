"""Adapters: a thin branch beside a linear, y = rest + scale * U (D x) (+ b), where `rest` is W x for the same x, or a sum that W x is in.

Scalings, casts and sums between may be spelled in any order. A branch that cannot be merged is listed with the reason; where its region is
given it is U D x all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rewriter.graph import PLAIN, Graph, Node, Place, Port, Region, Site, Value, WeightRef, is_turned
from rewriter.passes.detect.linear import alike, site_name, unique
from rewriter.passes.detect.spellings import Spelling, read, with_following_bias

THIN = 4  # times as narrow as its base has rows and columns, or narrower
MOST = 64  # operations that are looked at behind a sum


@dataclass(frozen=True)
class Term:
    """A product as it stands in a sum."""

    product: Spelling
    scale: float
    path: tuple[Value, ...]  # from what is summed back to what the product gives


def detect(graph: Graph) -> Iterator[Site]:
    """Every branch, once."""
    taken: set[str] = set()
    for node in graph.nodes():
        if graph.op(node) == "add" and graph.attributes(node).get("alpha", 1) == 1:
            a, b = (list(graph.inputs(node)) + [None, None])[:2]
            site = _site(graph, node, a, b, taken) or _site(graph, node, b, a, taken)
            if site is not None:
                yield site


def _site(graph: Graph, node: Node, rest: Value | None, low: Value | None, taken: set[str]) -> Site | None:
    up = _term(graph, low)
    down = _term(graph, up.product.place.x) if up is not None else None
    if rest is None or up is None or down is None:
        return None
    base = next((term for term in _terms(graph, rest) if _fits(graph, term.product, down.product, up.product)), None)
    if base is None:
        return None
    (m, n), y = base.product.shape, graph.outputs(node)[0]
    name = unique(f"{site_name(graph, base.product)} (adapter)", taken)
    ahead = _origin(graph, down.product.place.x)[1] / _origin(graph, base.product.place.x)[1]
    scaled = replace(up.product, scale=up.product.scale * up.scale * down.scale * ahead)
    parts = {"base": base.product, "down": down.product, "up": scaled}
    weights = {key: WeightRef(graph.stored_name(s.weight), s.weight, s.axes, s.scale) for key, s in parts.items()}
    if (bias := up.product.place.bias) is not None:
        weights["bias"] = WeightRef(graph.stored_name(bias), bias, (), up.scale * up.product.place.bias_scale)
    place = Place((*base.product.place.nodes, node), base.product.place.x, y, base.product.place.layout)
    unread = _unread(base, down, up)
    inside = (*down.product.place.nodes, *up.product.place.nodes, node)
    region = None if unread else Region(inside, (Port(place.x), Port(rest), Port(low)), (Port(y),))
    reason = unread or _reason(graph, base, up)
    return Site(name, name, "adapter", (m, n), graph.dtype(base.product.weight), (place,), weights, reason=reason, region=region)


def _fits(graph: Graph, base: Spelling, down: Spelling, up: Spelling) -> bool:
    thin = THIN * down.shape[0] <= min(base.shape)
    if not thin or base.shape != (up.shape[0], down.shape[1]):
        return False
    (x, scale), (other, _) = _origin(graph, base.place.x), _origin(graph, down.place.x)
    return scale != 0 and (x is other or alike(graph, x, other))


def _origin(graph: Graph, value: Value) -> tuple[Value, float]:
    """The value before casts, dropouts and numbers that it is multiplied by, and those numbers' product."""
    scale = 1.0
    while (node := graph.producer(value)) is not None and graph.op(node) != "add":
        varying = [v for v in graph.inputs(node) if v is not None and not graph.is_const(v)]
        number = _factor(graph, node, len(varying)) if len(varying) == 1 else None
        if number is None:
            break
        value, scale = varying[0], scale * number
    return value, scale


def _unread(base: Term, down: Term, up: Term) -> str:
    """Why the branch is no U D of what its base reads, as it reads it; "" where it is."""
    products = (base.product, down.product, up.product)
    if reason := next((s.reason for s in products if s.reason), ""):
        return reason
    if down.product.place.bias is not None:
        return "something is added between its factors"
    alike = len({s.place.layout for s in products}) == 1 and not base.product.place.layout.spread
    return "" if alike else "its factors see the features in another order than its base"


def _reason(graph: Graph, base: Term, up: Term) -> str:
    """Why the branch cannot go into the base's weight; "" where it can."""
    product = base.product
    if base.scale != 1:
        return f"its base is multiplied by {base.scale:g} on its way to the sum"
    if any(len(graph.users(value)) != 1 for value in base.path):
        return "what its base gives is read besides, without the branch"
    if len(graph.storage_users(product.weight)) != 1 + len(product.through):
        return "its base's weight is used in other places too, or tied to another"
    if not is_turned(graph, product.weight):
        return "its base's weight is computed from what is stored"
    if product.scale == 0:
        return "its base is multiplied by zero"
    if (bias := up.product.place.bias) is not None and (
        product.place.layout != PLAIN or not graph.is_const(bias) or graph.producer(bias) is not None or len(graph.storage_users(bias)) != 1
    ):
        return "what is added to its product is not stored for it alone"
    return ""


def _term(graph: Graph, value: Value | None) -> Term | None:
    """The one product that a value is, but for numbers that it is multiplied by and a bias."""
    found = _terms(graph, value) if value is not None else []
    return found[0] if len(found) == 1 and found[0].path[0] is value and not _sums(graph, found[0]) else None


def _sums(graph: Graph, term: Term) -> bool:
    """Whether something is added on the way."""
    return any((node := graph.producer(value)) is not None and graph.op(node) == "add" for value in term.path[:-1])


def _terms(graph: Graph, value: Value) -> list[Term]:
    """The products in a sum, each with what it is multiplied by; nothing else of it is looked at."""
    found, waiting, seen = list[Term](), list[tuple[tuple[Value, ...], float]]([((value,), 1.0)]), 0
    while waiting and (seen := seen + 1) <= MOST:
        path, scale = waiting.pop()
        node = graph.producer(path[-1])
        if node is None:
            continue
        product = _product(graph, path[-1])
        if product is not None:
            found.append(Term(product, scale, path))
            continue
        varying = [v for v in graph.inputs(node) if v is not None and not graph.is_const(v)]
        number = _factor(graph, node, len(varying))
        if number is not None:
            waiting += [((*path, v), scale * number) for v in varying]
    return found


def _product(graph: Graph, value: Value) -> Spelling | None:
    """The product whose result, its bias added, the value is."""
    node = graph.producer(value)
    for candidate in (node, *(graph.producer(v) for v in graph.inputs(node) if v is not None and graph.op(node) == "add")):
        found = read(graph, candidate) if candidate is not None else None
        whole = with_following_bias(graph, found) if found is not None else None
        if whole is not None and whole.place.y is value:
            return whole
    return None


def _factor(graph: Graph, node: Node, varying: int) -> float | None:
    """What the node multiplies its operands by; None where it does anything else."""
    operation, options, first = graph.op(node), graph.attributes(node), next(iter(graph.inputs(node)), None)
    if operation in ("cast", "identity"):
        return 1.0
    if operation == "add":
        return 1.0 if options.get("alpha", 1) == 1 else None
    number = _number(graph, node) if operation in ("mul", "div") and varying == 1 else None
    if operation == "mul" or number is None:
        return number
    return 1 / number if number and first is not None and not graph.is_const(first) and "rounding" not in options else None


def _number(graph: Graph, node: Node) -> float | None:
    """The one number among a node's operands."""
    plain = [s for s in graph.attributes(node).get("scalars", ()) if s is not None]
    stored = [graph.const(v) for v in graph.inputs(node) if v is not None and graph.is_const(v)]
    numbers = plain + [float(t) for t in stored if t is not None and t.numel() == 1]
    return numbers[0] if len(numbers) == 1 and len(plain) + len(stored) == 1 else None
