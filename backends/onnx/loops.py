"""Recurrences of an ONNX graph: Scan and Loop, read as a loop; slices and stacks, from which an unrolled one is known.

A Loop reads its sequences by Gather at the step's number, and must run as many steps as they are long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir
from torch import Tensor

from rewriter.graph import Carry, Loop, Slice

Const = Callable[[ir.Value], Tensor | None]
_THROUGH = {"Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape"}


def loop(node: ir.Node, const: Const) -> Loop | str:
    """See rewriter.graph.Graph.loop."""
    return _scan(node) if node.op_type == "Scan" else _loop(node, const)


def _ints(node: ir.Node, name: str, count: int) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else [0] * count


def _read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


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
        Carry(b, e, i, o if _read(o) else None)
        for b, e, i, o in zip(body.inputs[:states], body.outputs[:states], inputs[:states], node.outputs[:states], strict=True)
    ]
    axes = zip(body.inputs[states:], inputs[states:], _ints(node, "scan_input_axes", count), strict=True)
    xs = [Slice(inner, outer, axis % _rank(outer)) for inner, outer, axis in axes]
    given = zip(body.outputs[states:], node.outputs[states:], _ints(node, "scan_output_axes", outs), strict=True)
    ys = [Slice(inner, outer, axis % _rank(outer)) for inner, outer, axis in given if _read(outer)]
    return Loop((node,), tuple(carries), tuple(xs), tuple(ys))


def _rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 8


def _loop(node: ir.Node, const: Const) -> Loop | str:
    body = node.attributes["body"].as_graph()
    step, going, *begins = body.inputs
    again, *results = body.outputs
    trips, start, *initial = node.inputs
    ends, ys = results[: len(begins)], results[len(begins) :]
    if not _always(again, going, const):
        return "a Loop that may stop early"
    if start is not None and ((held := const(start)) is None or not bool(held)):
        return "a Loop that may not start"
    if trips is None or any(v is None for v in initial):
        return "a Loop without a count of steps"
    xs = list(_gathered(step, body))
    if not xs:
        return "a Loop that reads no sequence by the number of its step"
    if (other := next((x for x in xs if not _as_long(trips, x, const)), None)) is not None:
        return f"a Loop that may run another number of steps than {other.outer.name} has"
    outs = node.outputs
    carries = [Carry(b, e, i, o if _read(o) else None) for b, e, i, o in zip(begins, ends, initial, outs, strict=False) if i is not None]
    given = [Slice(y, o, 0) for y, o in zip(ys, outs[len(begins) :], strict=True) if _read(o)]
    return Loop((node,), tuple(carries), tuple(xs), tuple(given))


def _always(again: ir.Value, going: ir.Value, const: Const) -> bool:
    while (node := again.producer()) is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        again = node.inputs[0]
    if again is going:
        return True
    held = const(again)
    return held is not None and bool(held)


def _gathered(step: ir.Value, body: ir.Graph) -> Iterator[Slice]:
    """Gathers from outside of the body at the step's number."""
    numbers = [step]
    for number in numbers:
        for user, place in number.uses():
            if user.op_type in _THROUGH and place == 0:
                numbers.append(user.outputs[0])
            elif user.op_type == "Gather" and place == 1 and user.inputs[0] is not None and user.inputs[0].graph is not body:
                outer = user.inputs[0]
                axis = user.attributes["axis"].as_int() if "axis" in user.attributes else 0
                index = len(number.shape) if number.shape is not None else 0
                yield Slice(user.outputs[0], outer, axis % _rank(outer), kept=index == 1)


def _as_long(trips: ir.Value, x: Slice, const: Const) -> bool:
    """Whether the count of steps is the length of the sequence."""
    size = x.outer.shape[x.axis] if x.outer.shape is not None else None
    held = const(trips)
    if held is not None:
        return isinstance(size, int) and int(held) == size
    node = trips.producer()
    while node is not None and node.op_type in _THROUGH and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Gather" or node.inputs[0] is None or node.inputs[1] is None:
        return False
    shape, index = node.inputs[0].producer(), const(node.inputs[1])
    if shape is None or shape.op_type != "Shape" or shape.inputs[0] is None or index is None:
        return False
    source = shape.inputs[0]
    begin, end = (shape.attributes[name].as_int() if name in shape.attributes else None for name in ("start", "end"))
    axes = range(_rank(source))[begin:end]
    if not -len(axes) <= int(index) < len(axes):
        return False
    axis = axes[int(index)]
    if source is x.outer:
        return axis == x.axis
    return source.shape is not None and str(source.shape[axis]) == str(size) != "None"


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
        axis %= _rank(source)
        if all(v.shape is not None and v.shape[axis] == 1 for v in node.outputs):
            return source, axis, node.outputs.index(value), True
    return None


def _positive(source: ir.Value, axis: int, index: int) -> tuple[int, int]:
    axis %= _rank(source)
    size = source.shape[axis] if source.shape is not None else None
    return axis, index % size if isinstance(size, int) and size else index


def stacked(node: ir.Node) -> tuple[Sequence[ir.Value], int, bool] | None:
    """See rewriter.graph.Graph.stacked."""
    if node.op_type != "Concat" or any(v is None for v in node.inputs):
        return None
    return [v for v in node.inputs if v is not None], node.attributes["axis"].as_int() % _rank(node.outputs[0]), True
