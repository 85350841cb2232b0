"""Every spelling of y = W x: which operand is the stored matrix, how it is turned, and how the features lie in x and y.

linear, addmm, matmul (either side, the weight repeated for each item or not), Gemm with all its flags, einsum over one stored operand, 1x1
convolutions. A product with a stored matrix that has no structured form yet is read all the same, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from string import ascii_letters
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
    through: tuple[Node, ...] = ()  # nodes that repeat the weight for every item


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


def _unrepeated(graph: Graph, value: Value | None) -> tuple[Value | None, tuple[Node, ...]]:
    """A constant that is repeated along leading axes for every item, and the node that repeats it."""
    node = graph.producer(value) if value is not None and not graph.is_const(value) else None
    if node is None or graph.op(node) != "expand":
        return value, ()
    inner = next(iter(graph.inputs(node)))
    sizes, repeated = _sizes(graph, inner), graph.shape(value)
    if sizes is None or repeated is None or len(sizes) < 2 or sizes[-2:] != repeated[-2:] or any(s != 1 for s in sizes[:-2]):
        return value, ()
    return inner, (node,)


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
    rank = len(graph.shape(a) or ())
    if rank == 2:
        return _gemm_like(graph, node, a, b, c, options["alpha"], options["beta"], False, False)
    found = _matmul_of(graph, node, a, b)
    if found is None or found.weight is a:
        return found and replace(found, reason=found.reason or "a term is added to a product whose weight stands on the left")
    place = replace(found.place, bias=c if options["beta"] != 0 else None, bias_scale=options["beta"])
    return replace(found, place=place, scale=options["alpha"])


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
    return _matmul_of(graph, node, a, b)


def _matmul_of(graph: Graph, node: Node, a: Value, b: Value) -> Spelling | None:
    (left, by), (right, via) = _unrepeated(graph, a), _unrepeated(graph, b)
    if _sizes(graph, right) is not None and _varies(graph, a):
        return _as_batched(graph, _matmul_right(graph, node, a, right), b, via)
    if _sizes(graph, left) is not None and _varies(graph, b):
        return _as_batched(graph, _matmul_left(graph, node, left, b), a, by)
    return None


def _as_batched(graph: Graph, found: Spelling | None, repeated: Value, through: tuple[Node, ...]) -> Spelling | None:
    """A repeated weight is one matrix where it is repeated just as often as the input has items."""
    if found is None or not through:
        return found
    items, copies = graph.shape(found.place.x), graph.shape(repeated)
    same = items is not None and copies is not None and items[:-2] == copies[:-2]
    reason = "" if same else "its weight is repeated along an axis that its input lacks"
    if len(graph.users(repeated)) > 1:
        return replace(found, reason=found.reason or reason)  # what repeats it has to stay, and so counts as another user
    return replace(found, through=through, reason=found.reason or reason)


def _batched(sizes: Sequence[int]) -> str:
    return "" if all(s == 1 for s in sizes[:-2]) else f"batched weights {list(sizes)}: one matrix for each item, no structured form yet"


def _matmul_right(graph: Graph, node: Node, x: Value, w: Value) -> Spelling | None:
    sizes = _sizes(graph, w)
    if sizes is None or len(sizes) < 2 or sizes[-2] == 1:
        return None  # a dot product or an outer product
    n, m = sizes[-2:]
    rank = len(sizes)
    axes = (*range(rank - 2), rank - 1, rank - 2)
    reason = _batched(sizes)
    if not reason and rank > max(len(graph.shape(x) or ()), 2):
        reason = "the weight has more axes than its input"
    return Spelling(_plain(graph, node, x), w, (m, n), axes, reason=reason)


def _matmul_left(graph: Graph, node: Node, w: Value, x: Value) -> Spelling | None:
    sizes, shape = _sizes(graph, w), graph.shape(x)
    if sizes is None or len(sizes) < 2 or shape is None or sizes[-1] == 1:
        return None
    m, n = sizes[-2:]
    if len(shape) == 1:
        reason = "" if len(sizes) == 2 else _batched(sizes) or "the weight has more axes than its input"
        return Spelling(_plain(graph, node, x), w, (m, n), reason=reason)
    rank = len(shape)
    swap = (*range(rank - 2), rank - 1, rank - 2)
    reason = _batched(sizes)
    if not reason and len(sizes) > rank:
        reason = "the weight has more axes than its input"
    return Spelling(_plain(graph, node, x, layout=Layout(before=swap, after=swap)), w, (m, n), reason=reason)


def _einsum(graph: Graph, node: Node) -> Spelling | None:
    operands = list(graph.inputs(node))
    stored = [i for i, value in enumerate(operands) if _sizes(graph, value) is not None]
    if not stored or len(stored) == len(operands):
        return None
    ranks = [len(graph.shape(v) or ()) for v in operands]
    terms, out = letters(str(graph.attributes(node)["equation"]), ranks)
    if len(operands) != 2:
        return _of_many(graph, node, [(operands[i], terms[i]) for i in stored], out)
    which = stored[-1]
    return _contraction(graph, node, operands[1 - which], operands[which], terms[1 - which], terms[which], out)


def letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The operands' and the output's letters; an ellipsis becomes letters of its own, an implicit output is written out."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = "".join(c for c in ascii_letters if c not in equation)
    covered = [rank - len(term.replace(".", "")) if "." in term else 0 for term, rank in zip(terms, ranks, strict=True)]
    named = free[: max(covered)]
    terms = [term.replace("...", named[len(named) - count :]) for term, count in zip(terms, covered, strict=True)]
    if arrow:
        return terms, out.replace("...", named)
    once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
    return terms, named + "".join(once)


def _of_many(graph: Graph, node: Node, stored: list[tuple[Value, str]], out: str) -> Spelling | None:
    """Listed by the first stored matrix in it."""
    for w, own in stored:
        sizes = dict(zip(own, _sizes(graph, w) or (), strict=False))
        m, n = (prod(size for c, size in sizes.items() if (c in out) == wanted) for wanted in (True, False))
        if m > 1 and n > 1:
            operands = graph.inputs(node)
            x = next(v for v in operands if _varies(graph, v))
            axes = tuple(own.index(c) for c in sorted(own, key=lambda c: c not in out))
            reason = f"an einsum of {len(operands)} operands: no structured form yet"
            return Spelling(_plain(graph, node, x), w, (m, n), axes, reason=reason)
    return None


def _contraction(graph: Graph, node: Node, x: Value, w: Value, ins: str, own: str, out: str) -> Spelling | None:
    """Letters of x and the weight that the output lacks are the features, those of the weight alone are made; the others are the batch."""
    size = dict(zip(own, _sizes(graph, w) or (), strict=True))
    features = [c for c in ins if c in own and c not in out]
    outputs = [c for c in out if c in own and c not in ins]
    batch = [c for c in ins if c not in features]
    m, n = prod(size[c] for c in outputs), prod(size[c] for c in features)
    if not features or not outputs or n == 1:
        return None
    rest = [c for c in own if c not in features and c not in outputs]
    axes = tuple(own.index(c) for c in [*rest, *outputs, *features])
    axes = () if axes == tuple(range(len(axes))) else axes
    reason = _why_no_product(graph.shape(x), ins, own, out, size)
    if reason:
        return Spelling(_plain(graph, node, x), w, (m, n), axes, reason=reason)
    before = tuple(ins.index(c) for c in [*batch, *features])
    after = tuple([*batch, *outputs].index(c) for c in out)
    layout = Layout(
        before=() if before == tuple(range(len(before))) else before,
        join=len(features),
        spread=tuple(size[c] for c in outputs) if len(outputs) > 1 else (),
        after=() if after == tuple(range(len(after))) else after,
    )
    return Spelling(_plain(graph, node, x, layout=layout), w, (m, n), axes)


def _why_no_product(shape: tuple[int | str, ...] | None, ins: str, own: str, out: str, size: dict[str, int]) -> str:
    """Why an equation is no product of the features with one matrix, "" where it is one."""
    if len(set(ins)) < len(ins) or len(set(own)) < len(own):
        return "an einsum that takes a diagonal: no structured form yet"
    if any(c in ins and c in out for c in own):
        return f"batched weights {list(size.values())}: one matrix for each item, no structured form yet"
    if any(c not in out for c in {*ins} ^ {*own}):
        return "an einsum that sums over an axis of one operand alone: no structured form yet"
    if shape is None or any(size.get(c, length) != length for c, length in zip(ins, shape, strict=True)):
        return "an einsum that repeats an axis of length 1: no structured form yet"
    return ""


def _conv(graph: Graph, node: Node) -> Spelling | None:
    x, w, *rest = graph.inputs(node)
    sizes, options = _sizes(graph, w), graph.attributes(node)
    if sizes is None or not _varies(graph, x) or any(s != 1 for s in sizes[2:]) or options["groups"] != 1:
        return None
    items = len(graph.shape(x) or sizes) - len(sizes) + 1  # 0 where the input is a single item
    last = items + len(sizes) - 2
    layout = Layout(before=(*range(items), *range(items + 1, last + 1), items), after=(*range(items), last, *range(items, last)))
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
    if place.bias is not None or place.layout != PLAIN or spelling.reason or len(users) != 1 or graph.op(users[0]) != "add":
        return spelling
    if graph.attributes(users[0]).get("alpha", 1) != 1 or graph.body(users[0]) != graph.body(place.nodes[0]):
        return spelling
    a, b = graph.inputs(users[0])[:2]
    bias = b if a is place.y else a
    if bias is place.y or _sizes(graph, bias) != (spelling.shape[0],):
        return spelling
    joined: dict[str, Any] = {"nodes": (*place.nodes, users[0]), "y": graph.outputs(users[0])[0], "bias": bias}
    return replace(spelling, place=replace(place, **joined))
