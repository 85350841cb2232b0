"""Every spelling of y = W x: which operand is the stored matrix, how it is turned, and how the features lie in x and y.

linear, addmm, matmul (either side), Gemm with all its flags, einsum over one stored operand, 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rewriter.graph import PLAIN, Graph, Layout, Node, Place, Value


@dataclass(frozen=True)
class Spelling:
    """One node read as a product with a stored matrix scale * permute(weight, axes).reshape(shape)."""

    place: Place
    weight: Value
    shape: tuple[int, int]  # (m, n)
    axes: tuple[int, ...] = ()
    scale: float = 1.0
    reason: str = ""


def read(graph: Graph, node: Node) -> Spelling | None:
    """The node as a product with a stored matrix, or None when it is none."""
    reader = _READERS.get(graph.op(node))
    return reader(graph, node) if reader else None


def _sizes(graph: Graph, value: Value | None) -> tuple[int, ...] | None:
    """A constant's shape."""
    if value is None or not graph.is_const(value):
        return None
    shape = graph.shape(value)
    return tuple(int(s) for s in shape) if shape is not None and all(isinstance(s, int) for s in shape) else None


def _varies(graph: Graph, value: Value | None) -> bool:
    return value is not None and not graph.is_const(value)


def _plain(graph: Graph, node: Node, x: Value, bias: Value | None = None, scale: float = 1.0, layout: Layout = PLAIN) -> Place:
    return Place((node,), x, graph.outputs(node)[0], layout, bias, scale)


def _linear(graph: Graph, node: Node) -> Spelling | None:
    x, w, *rest = graph.inputs(node)
    sizes = _sizes(graph, w)
    if sizes is None or len(sizes) != 2 or not _varies(graph, x):
        return None
    return Spelling(_plain(graph, node, x, rest[0] if rest else None), w, (sizes[0], sizes[1]))


def _addmm(graph: Graph, node: Node) -> Spelling | None:
    c, a, b = graph.inputs(node)
    options = graph.attributes(node)
    return _gemm_like(graph, node, a, b, c, options["alpha"], options["beta"], False, False)


def _gemm(graph: Graph, node: Node) -> Spelling | None:
    a, b, *rest = graph.inputs(node)
    options = graph.attributes(node)
    c = rest[0] if rest else None
    return _gemm_like(graph, node, a, b, c, options["alpha"], options["beta"], bool(options["trans_a"]), bool(options["trans_b"]))


def _gemm_like(
    graph: Graph, node: Node, a: Value, b: Value, c: Value | None, alpha: float, beta: float, trans_a: bool, trans_b: bool
) -> Spelling | None:
    """alpha * A' B' + beta * C with either operand stored; a stored A sees features along the first axis."""
    left, right = _sizes(graph, a), _sizes(graph, b)
    if right is not None and len(right) == 2 and _varies(graph, a):
        m, n = right if trans_b else (right[1], right[0])
        layout = Layout(before=(1, 0)) if trans_a else PLAIN
        return Spelling(_plain(graph, node, a, c, beta, layout), b, (m, n), () if trans_b else (1, 0), alpha)
    if left is not None and len(left) == 2 and _varies(graph, b):
        m, n = (left[1], left[0]) if trans_a else left
        layout = Layout(before=() if trans_b else (1, 0), after=(1, 0))
        reason = "" if c is None or beta == 0 else "a term is added to a product whose weight stands on the left"
        return Spelling(_plain(graph, node, b, None, 1.0, layout), a, (m, n), (1, 0) if trans_a else (), alpha, reason)
    return None


def _matmul(graph: Graph, node: Node) -> Spelling | None:
    a, b = graph.inputs(node)[:2]
    left, right = _sizes(graph, a), _sizes(graph, b)
    if right is not None and _varies(graph, a):
        return _matmul_right(graph, node, a, b, right)
    if left is not None and _varies(graph, b):
        return _matmul_left(graph, node, a, b, left)
    return None


def _matmul_right(graph: Graph, node: Node, x: Value, w: Value, sizes: tuple[int, ...]) -> Spelling | None:
    if len(sizes) < 2 or sizes[-2] == 1:
        return None  # a dot product or an outer product
    n, m = sizes[-2:]
    rank = len(sizes)
    axes = (*range(rank - 2), rank - 1, rank - 2)
    reason = "" if all(s == 1 for s in sizes[:-2]) else f"batched weights {list(sizes)}: one matrix for each item, no structured form yet"
    if not reason and rank > len(graph.shape(x) or ()):
        reason = "the weight has more axes than its input"
    return Spelling(_plain(graph, node, x), w, (m, n), axes, reason=reason)


def _matmul_left(graph: Graph, node: Node, w: Value, x: Value, sizes: tuple[int, ...]) -> Spelling | None:
    shape = graph.shape(x)
    if len(sizes) < 2 or shape is None or sizes[-1] == 1:
        return None
    m, n = sizes[-2:]
    if len(shape) == 1:
        return Spelling(_plain(graph, node, x), w, (m, n)) if len(sizes) == 2 else None
    rank = len(shape)
    swap = (*range(rank - 2), rank - 1, rank - 2)
    reason = "" if all(s == 1 for s in sizes[:-2]) else f"batched weights {list(sizes)}: one matrix for each item, no structured form yet"
    if not reason and len(sizes) > rank:
        reason = "the weight has more axes than its input"
    return Spelling(_plain(graph, node, x, layout=Layout(before=swap, after=swap)), w, (m, n), reason=reason)


def _einsum(graph: Graph, node: Node) -> Spelling | None:
    operands = list(graph.inputs(node))
    equation = str(graph.attributes(node)["equation"]).replace(" ", "")
    if len(operands) != 2 or "." in equation:
        return None
    if "->" not in equation:
        letters = sorted(c for c in set(equation) if c.isalpha() and equation.count(c) == 1)
        equation += "->" + "".join(letters)
    left, out = equation.split("->")
    terms = left.split(",")
    which = 1 if _sizes(graph, operands[1]) is not None else 0
    sizes = _sizes(graph, operands[which])
    if sizes is None or not _varies(graph, operands[1 - which]):
        return None
    return _contraction(graph, node, operands[1 - which], operands[which], terms[1 - which], terms[which], out, sizes)


def _contraction(graph: Graph, node: Node, x: Value, w: Value, ins: str, own: str, out: str, sizes: tuple[int, ...]) -> Spelling | None:
    """x's letters not in the output are the features, the weight's letters in the output are the new ones; none may be shared by all three."""
    contracted = [c for c in own if c in ins and c not in out]
    made = [c for c in own if c in out and c not in ins]
    if len(contracted) + len(made) != len(own) or len(set(ins)) < len(ins) or any(c not in out and c not in own for c in ins):
        return None
    size = dict(zip(own, sizes, strict=True))
    features, outputs = [c for c in ins if c in contracted], [c for c in out if c in made]
    batch = [c for c in ins if c not in contracted]
    before = tuple(ins.index(c) for c in [*batch, *features])
    current = [*batch, *outputs]
    after = tuple(current.index(c) for c in out)
    m, n = _product(size, outputs), _product(size, features)
    if not features or not outputs or n == 1:
        return None
    layout = Layout(
        before=() if before == tuple(range(len(before))) else before,
        join=len(features),
        spread=tuple(size[c] for c in outputs) if len(outputs) > 1 else (),
        after=() if after == tuple(range(len(after))) else after,
    )
    axes = tuple(own.index(c) for c in [*outputs, *features])
    return Spelling(_plain(graph, node, x, layout=layout), w, (m, n), () if axes == tuple(range(len(axes))) else axes)


def _product(size: Mapping[str, int], letters: list[str]) -> int:
    total = 1
    for letter in letters:
        total *= size[letter]
    return total


def _conv(graph: Graph, node: Node) -> Spelling | None:
    x, w, *rest = graph.inputs(node)
    sizes, options = _sizes(graph, w), graph.attributes(node)
    if sizes is None or not _varies(graph, x) or any(s != 1 for s in sizes[2:]) or options["groups"] != 1:
        return None
    rank = len(sizes)
    layout = Layout(before=(0, *range(2, rank), 1), after=(0, rank - 1, *range(1, rank - 1)))
    reason = "" if all(s == 1 for s in options["strides"]) else f"a 1x1 convolution with strides {list(options['strides'])}"
    if any(p != 0 for p in options["pads"]):
        reason = "a 1x1 convolution with padding"
    return Spelling(_plain(graph, node, x, rest[0] if rest else None, 1.0, layout), w, (sizes[0], sizes[1]), reason=reason)


_READERS: dict[str, Callable[[Graph, Node], Spelling | None]] = {
    "linear": _linear,
    "addmm": _addmm,
    "gemm": _gemm,
    "matmul": _matmul,
    "einsum": _einsum,
    "conv": _conv,
}


def with_following_bias(graph: Graph, spelling: Spelling) -> Spelling:
    """A product followed by `+ constant (m,)` and nothing else takes the addition in, so that a shift costs no second one."""
    place = spelling.place
    users = graph.users(place.y)
    if place.bias is not None or place.layout != PLAIN or len(users) != 1 or graph.op(users[0]) != "add":
        return spelling
    if graph.attributes(users[0]).get("alpha", 1) != 1 or graph.body(users[0]) != graph.body(place.nodes[0]):
        return spelling
    a, b = graph.inputs(users[0])[:2]
    bias = b if a is place.y else a
    if bias is place.y or _sizes(graph, bias) != (spelling.shape[0],):
        return spelling
    joined: dict[str, Any] = {"nodes": (*place.nodes, users[0]), "y": graph.outputs(users[0])[0], "bias": bias}
    return replace(spelling, place=replace(place, **joined))
