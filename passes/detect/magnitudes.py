"""Numbers in a graph: values that are one number whatever the input, and bounds on how large any entry of a value can be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.graph import Graph, Node, Value

MANY = 64  # nodes behind one number
DEEP = 200  # nodes behind a mask
_CHANCE = ("rand", "bernoulli", "multinomial", "normal")  # in the names of operations that give another result each time


def sources(graph: Graph, wanted: Value, known: Sequence[Value], many: int = 100_000) -> list[Value] | None:
    """The values whose sizes alone `wanted` takes besides the known and the stored ones; None where it takes any other.

    A value whose size is taken and which itself is computed from the known ones needs no number of its own.
    """
    names = {id(v) for v in known}
    found: dict[int, Value] = {}
    seen: set[int] = set()
    stack = [wanted]
    while stack:
        value = stack.pop()
        if id(value) in seen or id(value) in names or graph.is_const(value):
            continue
        seen.add(id(value))
        node = graph.producer(value)
        if node is None or len(seen) > many or any(word in graph.op(node).lower() for word in _CHANCE):
            return None
        operands = [v for v in graph.inputs(node) if v is not None]
        if graph.op(node) == "shape" and not _computed(graph, operands[0], names):
            found[id(operands[0])] = operands[0]
        else:
            stack += operands
    return list(found.values())


def _computed(graph: Graph, value: Value, names: set[int]) -> bool:
    """Whether a known value goes into it."""
    seen: set[int] = set()
    stack = [value] if names else []
    while stack:
        v = stack.pop()
        if id(v) in names:
            return True
        node = graph.producer(v)
        if id(v) not in seen and node is not None and not graph.is_const(v):
            seen.add(id(v))
            stack += [x for x in graph.inputs(node) if x is not None]
    return False


def sized(graph: Graph, value: Value, sizes: Mapping[str, int], other: int) -> Tensor:
    """Zeros of the value's shape, names replaced by numbers."""
    shape = [n if isinstance(n, int) else sizes.get(n, other) for n in graph.shape(value) or ()]
    return torch.zeros(shape, dtype=graph.dtype(value) or torch.float32)


def operand(graph: Graph, node: Node, which: int) -> float | None:
    """What one operand of an elementwise operation is, where that is one number."""
    value = [*graph.inputs(node), None, None, None][which]
    return number(graph, value) if value is not None else [*graph.attributes(node).get("scalars", ()), None, None, None][which]


def number(graph: Graph, value: Value) -> float | None:
    """What every entry of the value is, where that does not depend on the model's input."""
    node = graph.producer(value)
    if node is not None and graph.op(node) in ("fill", "zeros"):
        filled: float | None = graph.attributes(node).get("scalar")
        return filled
    found = fixed(graph, value, MANY)
    if not found or any(not t.numel() or t.dtype == torch.bool for t in found):
        return None
    first = found[0].reshape(-1)[0]
    return float(first) if all(bool((t == first).all()) for t in found) else None


def fixed(graph: Graph, value: Value, many: int = 100_000) -> list[Tensor]:
    """The value, where it depends on stored tensors and on sizes alone, for several choices of the sizes; [] where on more."""
    stored = graph.const(value)
    if stored is not None:
        return [stored]
    behind = sources(graph, value, (), many)
    if behind is None:
        return []
    names = dict.fromkeys(n for v in behind for n in graph.shape(v) or () if isinstance(n, str))
    choices = [{n: (2, 5, 3)[(i + k) % 3] for i, n in enumerate(names)} for k in range(3)] if names else [{}]
    try:
        found = [graph.compute([value], {v: sized(graph, v, sizes, 2).double() for v in behind})[0] for sizes in choices]
    except RewriteError:
        return []
    return found if all(isinstance(t, Tensor) for t in found) else []


_FIRST = {
    "cast", "reshape", "transpose", "expand", "unsqueeze", "squeeze", "slice", "gather", "embedding", "split", "repeat", "identity",
    "select", "repeat_interleave", "getitem", "neg", "abs", "relu", "unbind",
}  # fmt: skip
_ANY = {"concat", "stack", "where", "masked_fill"}


def fits(most: float, dtype: torch.dtype) -> bool:
    """Whether a number is rounded to a finite one."""
    return most < torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4)


def bound(graph: Graph, value: Value, depth: int = DEEP, known: dict[int, float] | None = None) -> float:
    """An upper bound of |entries|; inf where none is known."""
    known = {} if known is None else known
    if id(value) not in known:
        known[id(value)] = math.inf  # until it is computed
        known[id(value)] = _of_value(graph, value, depth, known)
    return known[id(value)]


def _of_value(graph: Graph, value: Value, depth: int, known: dict[int, float]) -> float:
    dtype, node = graph.dtype(value), graph.producer(value)
    if dtype == torch.bool:
        return 1.0
    if graph.is_const(value):
        tensor = graph.const(value)
        most = float(tensor.abs().max()) if tensor is not None and tensor.numel() else 0.0
        return most if most == most else math.inf
    if node is None or dtype is None or not dtype.is_floating_point or depth == 0:
        return math.inf
    most = _of_node(graph, node, depth - 1, known)
    return most if fits(most, dtype) else math.inf  # what overflows on the way is infinite for good


def _of_node(graph: Graph, node: Node, depth: int, known: dict[int, float]) -> float:
    op, given, operands = graph.op(node), graph.attributes(node), list(graph.inputs(node))
    if op in ("softmax", "sigmoid", "tanh"):
        return 1.0
    if op in ("fill", "zeros"):
        return abs(float(given.get("scalar", math.inf)))
    if op in ("where", "masked_fill"):
        operands.pop(0 if op == "where" else 1)
    parts = [bound(graph, v, depth, known) for v in operands[: 1 if op in _FIRST else None] if v is not None]
    parts += [abs(n) for n in given.get("scalars", ()) if n is not None]
    if op in _FIRST | _ANY:
        return max(parts, default=math.inf)
    if op in ("add", "sub", "rsub") and given.get("alpha", 1) == 1:
        return sum(parts)
    if op == "mul":
        return math.prod(parts) if 0 not in parts else 0.0
    if op == "div" and operands[0] is not None and (by := operand(graph, node, 1)):
        return parts[0] / abs(by)
    return math.inf
