"""Recurrences of an ONNX graph: Scan and Loop, read as a loop; slices and stacks, from which an unrolled one is known."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rewriter.backends.onnx.counted import Const, axes, counted, is_read, rank
from rewriter.graph import Carry, Loop, Slice


def loop(node: ir.Node, const: Const) -> Loop | str:
    """See rewriter.graph.Graph.loop."""
    return _scan(node) if node.op_type == "Scan" else counted(node, const)


def _ints(node: ir.Node, name: str, count: int) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else [0] * count


def _scan(node: ir.Node) -> Loop | str:
    body, count = node.attributes["body"].as_graph(), node.attributes["num_scan_inputs"].as_int()
    states = len(node.inputs) - count
    outs = len(node.outputs) - states
    if any(_ints(node, "scan_input_directions", count)) or any(_ints(node, "scan_output_directions", outs)):
        return "a Scan that runs backwards"
    if any(v is None for v in node.inputs):
        return "a Scan that lacks an input"
    inputs = [v for v in node.inputs if v is not None]
    carries = [
        Carry(b, e, i, o if is_read(o) else None)
        for b, e, i, o in zip(body.inputs[:states], body.outputs[:states], inputs[:states], node.outputs[:states], strict=True)
    ]
    taken = zip(body.inputs[states:], inputs[states:], _ints(node, "scan_input_axes", count), strict=True)
    xs = [Slice(inner, outer, axis % rank(outer)) for inner, outer, axis in taken]
    given = zip(body.outputs[states:], node.outputs[states:], _ints(node, "scan_output_axes", outs), strict=True)
    ys = [Slice(inner, outer, axis % rank(outer)) for inner, outer, axis in given if is_read(outer)]
    return Loop((node,), tuple(carries), tuple(xs), tuple(ys))


def sliced(value: ir.Value, const: Const) -> tuple[ir.Value, int, int, bool] | None:
    """See rewriter.graph.Graph.sliced."""
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    if node.op_type == "Gather" and node.inputs[1] is not None:
        index = const(node.inputs[1])
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if index is not None and index.numel() == 1 and index.dim() <= 1:
            return (source, *_positive(source, axis, int(index)), index.dim() == 1)
    if node.op_type == "Slice" and len(node.inputs) >= 4:
        given = [None if v is None else const(v) for v in node.inputs[1:]]
        if all(g is not None and g.numel() == 1 for g in given):
            start, end, axis, *step = (int(g) for g in given if g is not None)
            if end - start == 1 and step in ([], [1]):
                return (source, *_positive(source, axis, start), True)
    if node.op_type == "Split":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        axis %= rank(source)
        if all(v.shape is not None and v.shape[axis] == 1 for v in node.outputs):
            return source, axis, node.outputs.index(value), True
    return None


def _positive(source: ir.Value, axis: int, index: int) -> tuple[int, int]:
    axis %= rank(source)
    size = source.shape[axis] if source.shape is not None else None
    return axis, index % size if isinstance(size, int) and size else index


def stacked(node: ir.Node, const: Const) -> tuple[Sequence[ir.Value], int, bool] | None:
    """See rewriter.graph.Graph.stacked."""
    if node.op_type != "Concat" or any(v is None for v in node.inputs):
        return None
    pieces, axis = [v for v in node.inputs if v is not None], node.attributes["axis"].as_int() % rank(node.outputs[0])
    bare = [n.inputs[0] for v in pieces if (n := v.producer()) is not None and n.op_type == "Unsqueeze" and axes(n, const) == [axis]]
    return ([v for v in bare if v is not None], axis, False) if len(bare) == len(pieces) else (pieces, axis, True)
