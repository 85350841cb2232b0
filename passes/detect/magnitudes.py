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
        if node is None or len(seen) > many:
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


def number(graph: Graph, value: Value | None, scalar: float | None = None) -> float | None:
    """What every entry of the value is, where that does not depend on the model's input; `scalar` stands for no value."""
    if value is None:
        return scalar
    if graph.is_const(value):
        tensor = graph.const(value)
    else:
        tensor = _evaluated(graph, value)
    if tensor is None or not tensor.numel() or tensor.dtype == torch.bool or not bool((tensor == tensor.reshape(-1)[0]).all()):
        return None
    return float(tensor.reshape(-1)[0])


def _evaluated(graph: Graph, value: Value) -> Tensor | None:
    """Computed from shapes alone, for two choices of the sizes that vary."""
    behind = sources(graph, value, (), MANY)
    if behind is None:
        return None
    try:
        first, second = ((graph.compute([value], {v: sized(graph, v, {}, n).double() for v in behind})[0]) for n in (2, 3))
    except RewriteError:
        return None
    same = isinstance(first, Tensor) and first.numel() and second.numel() and bool(first.reshape(-1)[0] == second.reshape(-1)[0])
    return first if same and bool((second == second.reshape(-1)[0]).all()) else None


_KEEP = {
    "cast", "identity", "reshape", "transpose", "expand", "unsqueeze", "squeeze", "slice", "gather", "embedding", "select", "concat", "split",
    "getitem", "neg", "abs", "relu", "repeat", "repeat_interleave", "stack", "where", "masked_fill", "fill", "unbind",
}  # fmt: skip


def bound(graph: Graph, value: Value, depth: int = DEEP) -> float:
    """An upper bound of |entries|; inf where none is known."""
    dtype = graph.dtype(value)
    if dtype == torch.bool:
        return 1.0
    node = graph.producer(value)
    if graph.is_const(value):
        tensor = graph.const(value)
        most = float(tensor.double().abs().max()) if tensor is not None and tensor.numel() else 0.0
        return most if most == most else math.inf
    if node is None or dtype is None or not dtype.is_floating_point or depth == 0:
        return math.inf
    most = _bound(graph, node, depth - 1)
    return most if most <= torch.finfo(dtype).max else math.inf


def _bound(graph: Graph, node: Node, depth: int) -> float:
    op, given = graph.op(node), graph.attributes(node)
    operands = list(graph.inputs(node))
    if op in ("softmax", "sigmoid", "tanh"):
        return 1.0
    if op in ("gather", "embedding"):
        operands = operands[:1]
    if op in ("where", "masked_fill"):
        operands.pop(0 if op == "where" else 1)
    if op in ("reshape", "expand", "slice", "transpose", "split", "repeat", "unsqueeze", "squeeze", "repeat_interleave", "cast"):
        operands = operands[:1]
    parts = [bound(graph, v, depth) for v in operands if v is not None]
    parts += [abs(given["scalar"])] if "scalar" in given else []
    if op in _KEEP:
        return max(parts, default=math.inf)
    if op in ("add", "sub") and given.get("alpha", 1) in (1, -1):
        return sum(parts)
    if op == "mul":
        return math.prod(parts) if 0 not in parts else 0.0
    if op == "div" and (by := number(graph, operands[1], given.get("scalar"))):
        return bound(graph, operands[0], depth) / abs(by) if operands[0] is not None else math.inf
    return math.inf
