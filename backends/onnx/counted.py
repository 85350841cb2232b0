"""ONNX's Loop, read as a loop over sequences: it gathers from them by its step's number, and runs as many steps as they are long.

As torch writes a while_loop it counts for itself, i = 0; while i < len(x): ...; i + 1, and puts its results into what it carries by
ScatterND.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir
from torch import Tensor

from rewriter.graph import Carry, Loop, Slice

Const = Callable[[ir.Value], Tensor | None]
_THROUGH = {"Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape"}


def is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def rank(value: ir.Value) -> int:
    return len(value.shape) if value.shape is not None else 8


def counted(node: ir.Node, const: Const) -> Loop | str:
    """The loop, or what of it is none."""
    body = node.attributes["body"].as_graph()
    step, going, *begins = body.inputs
    again, *results = body.outputs
    trips, start, *initial = node.inputs
    ends, ys = results[: len(begins)], results[len(begins) :]
    if not _always(again, going, const):
        return _counting(node, const)
    if start is not None and ((held := const(start)) is None or not bool(held)):
        return "a Loop that may not start"
    if trips is None or any(v is None for v in initial):
        return "a Loop without a count of steps"
    xs = list(_sequences(step, body, const))
    if not xs:
        return "a Loop that reads no sequence by the number of its step"
    if (other := next((x for x in xs if not _as_long(trips, x, const)), None)) is not None:
        return f"a Loop that may run another number of steps than {other.outer.name} has"
    outs = node.outputs
    carries = [Carry(b, e, i, o if is_read(o) else None) for b, e, i, o in zip(begins, ends, initial, outs, strict=False) if i is not None]
    given = [Slice(y, o, 0) for y, o in zip(ys, outs[len(begins) :], strict=True) if is_read(o)]
    return Loop((node,), tuple(carries), tuple(xs), tuple(given))


def _always(again: ir.Value, going: ir.Value, const: Const) -> bool:
    while (node := again.producer()) is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        again = node.inputs[0]
    if again is going:
        return True
    held = const(again)
    return held is not None and bool(held)


def _counting(node: ir.Node, const: Const) -> Loop | str:
    """A Loop that goes on while a number of its own stays below the length of its sequences."""
    body = node.attributes["body"].as_graph()
    begins, (again, *ends), (trips, start, *initial) = body.inputs[2:], body.outputs, node.inputs
    places = range(len(begins) if trips is None and len(ends) == len(begins) else 0)
    counts = (k for k in places if _plus_one(ends[k], begins[k], const) and _zero(initial[k], const) and not is_read(node.outputs[k]))
    number = next(counts, None)
    limit = None if number is None else _limit(again, ends[number], const)
    if number is None or limit is None or (first := _limit(start, initial[number], const, limit)) is None:
        return "a Loop that may stop early"
    xs = list(_sequences(begins[number], body, const))
    written = {k: row for k in places if (row := _written(begins[k], ends[k], node.outputs[k], begins[number])) is not None}
    if any(user.op_type not in ("Shape", "Transpose", "ScatterND") for k in written for user in begins[k].consumers()):
        return "a Loop that reads what it has written"
    known = [*_gathers(begins[number], body), *(_scatter(ends[k]) for k in written), ends[number].producer()]
    users = [user for value in _same(begins[number]) for user in value.consumers() if user.op_type not in _THROUGH and user not in known]
    if users:
        return f"a Loop that uses its counter in {users[0].outputs[0].name}"
    ys = [row for row in written.values() if is_read(row.outer)]
    if not xs or not all(_as_long(n, s, const) for n in (first, limit) for s in (*xs, *ys)):
        return "a Loop whose count is not the length of its sequences"
    states = [(k, v) for k, v in enumerate(initial) if v is not None and k != number and k not in written]
    outs = [o if is_read(o) else None for o in node.outputs]
    return Loop((node,), tuple(Carry(begins[k], ends[k], v, outs[k]) for k, v in states), tuple(xs), tuple(ys))


def _plus_one(end: ir.Value, begin: ir.Value, const: Const) -> bool:
    node = end.producer()
    if node is None or node.op_type != "Add" or node.inputs[0] is not begin or node.inputs[1] is None:
        return False
    held = const(node.inputs[1])
    return held is not None and held.numel() == 1 and int(held) == 1


def _zero(value: ir.Value | None, const: Const) -> bool:
    held = None if value is None else const(value)
    return held is not None and held.numel() == 1 and int(held) == 0


def _limit(condition: ir.Value | None, number: ir.Value | None, const: Const, known: ir.Value | None = None) -> ir.Value | None:
    """What the number is below; the known one where it is a constant and the condition holds."""
    node = None if condition is None else condition.producer()
    if node is not None and node.op_type == "Less" and node.inputs[0] is number:
        return node.inputs[1]
    held, most = (None if v is None else const(v) for v in (condition, known))
    return known if held is not None and bool(held) and most is not None and int(most) > 0 else None


def _written(begin: ir.Value, end: ir.Value, outer: ir.Value, number: ir.Value) -> Slice | None:
    """The row that a result gets at the step's number, with its axis, which is moved to the front and back."""
    node = _scatter(end)
    index = None if node is None else node.inputs[1]
    if node is None or index not in _same(number) or index.shape is None or len(index.shape) != 2 or "reduction" in node.attributes:
        return None
    data, row = node.inputs[0], node.inputs[2]
    if data is begin and row is not None:
        return Slice(row, outer, 0, kept=True)
    first, moved = (None if v is None else v.producer() for v in (data, row))
    if first is None or moved is None or first.inputs[0] is not begin or moved.inputs[0] is None:
        return None
    there, alike, back = (_order(n) for n in (first, moved, end.producer()))
    undone = there and back and [there[axis] for axis in back] == list(range(len(there)))
    return Slice(moved.inputs[0], outer, there[0], kept=True) if undone and there == alike and there[1:] == sorted(there[1:]) else None


def _order(node: ir.Node | None) -> list[int]:
    return list(node.attributes["perm"].as_ints()) if node is not None and node.op_type == "Transpose" and "perm" in node.attributes else []


def _scatter(end: ir.Value) -> ir.Node | None:
    """The ScatterND that makes it, through a Transpose."""
    node = end.producer()
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "ScatterND" else None


def _same(number: ir.Value) -> list[ir.Value]:
    """The number in other shapes and types, itself first."""
    found = [number]
    for value in found:
        found += [user.outputs[0] for user, place in value.uses() if user.op_type in _THROUGH and place == 0]
    return found


def _gathers(step: ir.Value, body: ir.Graph) -> list[ir.Node]:
    """Which read something from outside of the body at the step's number."""
    uses = [use for number in _same(step) for use in number.uses()]
    return [n for n, place in uses if n.op_type == "Gather" and place == 1 and n.inputs[0] is not None and n.inputs[0].graph is not body]


def _sequences(step: ir.Value, body: ir.Graph, const: Const) -> Iterator[Slice]:
    """What those give: one step without its axis, or with it."""
    for node in _gathers(step, body):
        outer, index = node.inputs[:2]
        assert outer is not None and index is not None
        axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % rank(outer)
        kept = index.shape is not None and len(index.shape) == 1
        users = node.outputs[0].consumers()
        bare = [n for n in users if kept and n.op_type == "Squeeze" and axes(n, const) in ([axis], [axis - rank(outer)])]
        yield from (Slice(n.outputs[0], outer, axis) for n in bare)
        if not bare or len(bare) < len(users):
            yield Slice(node.outputs[0], outer, axis, kept)


def axes(node: ir.Node, const: Const) -> list[int]:
    """Of a Squeeze or an Unsqueeze."""
    held = const(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return [] if held is None else [int(axis) for axis in held.flatten()]


def _as_long(count: ir.Value, x: Slice, const: Const) -> bool:
    """Whether a number is the length of the sequence."""
    size = x.outer.shape[x.axis] if x.outer.shape is not None else None
    held = const(count)
    if held is not None:
        return isinstance(size, int) and int(held) == size
    source, axis = _length(count, const)
    if source is None or source is x.outer:
        return source is not None and axis == x.axis
    return source.shape is not None and str(source.shape[axis]) == str(size) != "None"


def _length(number: ir.Value, const: Const) -> tuple[ir.Value | None, int]:
    """The value and the axis whose length a number is; None where it is no length."""
    node, index = number.producer(), 0
    while node is not None and node.op_type in _THROUGH and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is not None and node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[1] is not None:
        held = const(node.inputs[1])
        if held is None or held.numel() != 1:
            return None, 0
        node, index = node.inputs[0].producer(), int(held)
    if node is None or node.op_type != "Shape" or node.inputs[0] is None:
        return None, 0
    source = node.inputs[0]
    begin, end = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
    axes = range(rank(source))[begin:end]
    return (source, axes[index]) if -len(axes) <= index < len(axes) else (None, 0)
