"""Attention that is one operation, aten's, ONNX's or com.microsoft's, read as softmax(scale Q K^T, masks) V with an axis for each part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rewriter.graph import Graph, Node, Value
from rewriter.passes.detect.axes import Frame, Group, Size, fresh
from rewriter.passes.detect.scores import Core, Operand, Scores


def of_operation(graph: Graph, node: Node) -> Core | str:
    """Its operands, or why it is more than attention."""
    given = graph.attributes(node)
    query, key, value, mask = [*graph.inputs(node), None][:4]
    shapes = [graph.shape(v) if v is not None else None for v in (query, key, value)]
    if given["beyond"] or any(s is None or len(s) not in (3, 4) or len(s) != len(shapes[0] or ()) for s in shapes):
        return given["beyond"] or "the shapes of its inputs are unknown or of different ranks"
    if given["causal"] and mask is not None:
        return "it is causal and has a mask, too"
    frame, (q, k, v) = Frame(), [s or () for s in shapes]
    together = len(q) == 3  # heads and features lie in one axis
    heads, shared = (given.get("heads") or 1, given.get("shared") or 1) if together else (q[1], k[1])
    sizes = [_part(q[-1], heads if together else 1), _part(v[-1], shared if together else 1)]
    batch, time, keys, depth, width, head = (group for (group,) in map(fresh, ([q[0]], [q[-2]], [k[-2]], *([n] for n in sizes), [heads])))
    groups = _groups(frame, head, heads, shared)
    if groups is None or not isinstance(sizes[0], int):
        return "its heads cannot be told"

    def placed(at: Value, *parts: Group) -> Operand:
        b, h, t, d = parts
        return Operand(at, (b, t, (*h, *d)) if together else (b, h, t, d))

    own, scale = () if k[0] == 1 else batch, given["scale"] if given["scale"] is not None else sizes[0] ** -0.5
    operands = placed(query, batch, head, time, depth), placed(key, own, groups, keys, depth), placed(value, own, groups, keys, width)
    out, outer, zero = placed(graph.outputs(node)[0], batch, head, time, width), (batch, head, time), given["empty"] == "zero"
    core = Core(frame, *operands, out, scale, outer, keys, depth, width, causal=given["causal"], zero=zero)
    aligned = (batch, head, time, keys) if given.get("heads") or not together else (batch, time, keys)
    return core if mask is None else _masked(graph, core, mask, aligned)


def _part(size: Size, heads: Size) -> Size:
    return size // heads if isinstance(size, int) and isinstance(heads, int) else size


def _groups(frame: Frame, head: Group, heads: Size, shared: Size) -> Group | None:
    """The heads of keys and values: neighbours among the queries' share one."""
    if heads == shared:
        return head
    if shared == 1:
        return ()
    if not isinstance(heads, int) or not isinstance(shared, int) or heads % shared:
        return None
    return (frame.cut(head[0], (shared, heads // shared))[0],)


def _masked(graph: Graph, core: Core, mask: Value, axes: Sequence[Group]) -> Core | str:
    scores = Scores(core.frame)
    said = scores.mask(graph, mask, tuple(axes), graph.dtype(mask) == torch.bool)
    return said or replace(core, masks=tuple(scores.masks))
