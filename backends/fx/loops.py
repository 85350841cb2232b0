"""Recurrences of an fx graph: torch's scan and while_loop, read as loops; slices and stacks, from which an unrolled one is known."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from rewriter.backends.fx.constants import Body
from rewriter.backends.fx.counted import counted
from rewriter.graph import Carry, Loop, Slice

aten = torch.ops.aten


def loop(node: Node, bodies: Mapping[Graph, Body], const: Callable[[Node], Tensor | None]) -> Loop | str:
    """See rewriter.graph.Graph.loop."""
    inside = [b for b in bodies.values() if b.call is node]
    if str(node.target) == "while_loop":
        cond, body = (next(b for b in inside if b.name.rpartition(".")[2] == part.target) for part in node.args[:2])  # type: ignore[union-attr]
        return counted(node, cond.module, body.module, const)
    _, initial, xs, _ = node.args
    assert isinstance(initial, Sequence) and isinstance(xs, Sequence)
    (body,) = inside
    formal = [n for n in body.module.graph.nodes if n.op == "placeholder"]
    (results,) = body.module.graph.output_node().args
    items: dict[Any, Node] = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if len(items) < len(node.users):
        return "its results are used as a whole"
    count = len(initial)
    assert isinstance(results, Sequence)
    ends, ys = results[:count], results[count:]
    if not all(isinstance(v, Node) for v in results):
        return "its body gives something that is no tensor"
    carries = [Carry(b, e, i, items.get(k)) for k, (b, e, i) in enumerate(zip(formal, ends, initial, strict=False))]
    taken = [Slice(inner, outer, 0) for inner, outer in zip(formal[count:], xs, strict=False)]
    given = [Slice(y, items[count + k], 0) for k, y in enumerate(ys) if count + k in items]
    return Loop((node, *items.values()), tuple(carries), tuple(taken), tuple(given))


def sliced(value: Node) -> tuple[Node, int, int, bool] | None:
    """See rewriter.graph.Graph.sliced."""
    if (found := _sliced(value)) is None:
        return None
    source, *rest = found
    while source.target is aten.slice.Tensor and _whole(*source.args):  # x[:, t] of a dynamic batch cuts all of axis 0 first
        source = source.args[0]
    return source, *rest


def _whole(_: Any, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> bool:
    return start in (None, 0) and (end is None or end == sys.maxsize) and step == 1


def _sliced(value: Node) -> tuple[Any, int, int, bool] | None:
    args: Any = (*value.args, None, None, None)
    if value.target is aten.select.int and isinstance(args[2], int):
        return (args[0], *_positive(args[0], args[1], args[2]), False)
    if value.target is aten.slice.Tensor:
        start, end = args[2] or 0, args[3]
        if isinstance(start, int) and isinstance(end, int) and end - start == 1 and args[4] in (None, 1):
            return (args[0], *_positive(args[0], args[1] or 0, start), True)
    if value.target is operator.getitem and isinstance(args[0], Node):
        cut: Any = args[0]
        if cut.target is aten.unbind.int:
            return (cut.args[0], *_positive(cut.args[0], cut.args[1] if len(cut.args) > 1 else 0, args[1]), False)
        if cut.target in (aten.split.Tensor, aten.chunk.default) and _rank_one(cut, value):
            return (cut.args[0], *_positive(cut.args[0], cut.args[2] if len(cut.args) > 2 else 0, args[1]), True)
    return None


def _rank_one(cut: Node, piece: Node) -> bool:
    """Pieces 1 long."""
    axis = cut.args[2] if len(cut.args) > 2 else 0
    return bool(piece.meta["val"].shape[axis] == 1)


def _positive(source: Node, axis: int, index: int) -> tuple[int, int]:
    shape = source.meta["val"].shape
    axis %= len(shape)
    return axis, index % shape[axis] if isinstance(shape[axis], int) else index


def stacked(node: Node) -> tuple[Sequence[Node], int, bool] | None:
    """See rewriter.graph.Graph.stacked."""
    if node.target not in (aten.stack.default, aten.cat.default):
        return None
    pieces: Any = node.args[0]
    axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return pieces, axis % len(node.meta["val"].shape), node.target is aten.cat.default
