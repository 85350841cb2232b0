"""A map takes the place of a region: layout changes at its ports and one opaque node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.tape import Tape

from rewriter.backends.onnx.constants import operands
from rewriter.backends.onnx.edit import ints
from rewriter.backends.onnx.names import SCOPES
from rewriter.backends.onnx.opaque import opaque
from rewriter.graph import Port, Region
from rewriter.order import in_order


def refusal(region: Region) -> str:
    """ "" where the map's node has a place after all inputs and before all readers of the outputs."""
    graph = region.nodes[-1].graph
    order = {node: i for i, node in enumerate(graph)}
    inside = set(region.nodes)
    made = [node for v in region.sources if (node := v.producer()) in order]
    uses = [node for p in region.outputs if p is not None for node, _ in p.value.uses() if node in order and node not in inside]
    if max((order[n] for n in made), default=-1) >= min((order[n] for n in uses), default=len(order)):
        return "some of its results are used before all of its inputs are there"
    return ""


def anchor(region: Region, current: Callable[[ir.Value], ir.Value]) -> ir.Node | None:
    """The last node of the region's body that makes an input; None where all are there from the start."""
    graph = region.nodes[-1].graph
    order = {node: i for i, node in enumerate(graph)}
    made = [node for v in region.sources if (node := current(v).producer()) in order]
    return max(made, key=order.__getitem__, default=None)


def stand_in(
    tape: Tape, region: Region, current: Callable[[ir.Value], ir.Value], factors: Sequence[ir.Value], spec: str, site: str
) -> list[tuple[ir.Value, ir.Value]]:
    """Emit the replacement onto the tape; (original output, its stand-in) for each output that is read."""
    taken = [_taken(tape, _hoisted(tape, p, current), p) for p in region.inputs]
    node = opaque(taken, factors, spec, site, 0, len(region.outputs))
    scopes = region.nodes[-1].metadata_props.get(SCOPES)
    if scopes:
        node.metadata_props[SCOPES] = scopes
    tape._nodes.append(node)  # a tape makes nodes, it cannot be handed one
    for value in node.outputs:
        value.type = taken[0].type
    read = [(p, _given(tape, v, p)) for p, v in zip(region.outputs, node.outputs, strict=True) if p is not None]
    return [(p.value, v if p.after is None else _finished(tape, v, p, p.after, current)) for p, v in read]


def _hoisted(tape: Tape, port: Port, current: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """What one step computes elementwise, or row by row, computed for all steps at once."""
    whole = {inner: current(outer) for inner, outer in port.hoist.items()}
    if port.rows:
        value = _by_row(tape, port.value, whole)
    else:
        value = _replayed(tape, port.value, whole, next(iter(whole.values())).shape) if whole else current(port.value)
    if not port.log and not port.negated:
        return value
    changed = tape.op("Log" if port.log else "Not", [value])
    changed.shape, changed.type = value.shape, value.type
    return changed


def _finished(
    tape: Tape, given: ir.Value, port: Port, after: tuple[ir.Value, ir.Value], current: Callable[[ir.Value], ir.Value]
) -> ir.Value:
    """What a step does to its result afterwards."""
    return _by_row(tape, after[1], {after[0]: given, **{inner: current(outer) for inner, outer in port.hoist.items()}})


def _by_row(tape: Tape, value: ir.Value, whole: Mapping[ir.Value, ir.Value]) -> ir.Value:
    """A value from sequences whose first two axes are one meanwhile."""
    lead = next(iter(whole.values()))
    rows = {inner: _reshaped(tape, outer, [ints(tape, -1)], outer, 2) for inner, outer in whole.items()}
    found = _replayed(tape, value, rows, None)
    return _reshaped(tape, found, [tape.op("Shape", [lead], {"start": 0, "end": 2})], found, 1)


def _replayed(tape: Tape, value: ir.Value, given: Mapping[ir.Value, ir.Value], shape: ir.Shape | None) -> ir.Value:
    """Of the shape that all have, or of the step's rank."""
    known = dict(given)
    for made in in_order(value, operands, known):
        known[made] = _whole(tape, made, known, shape)
    return known[value]


def _reshaped(tape: Tape, value: ir.Value, front: Sequence[ir.Value], like: ir.Value, start: int) -> ir.Value:
    """The value with other axes in front of those of `like` from `start` on."""
    made = tape.op("Reshape", [value, tape.op("Concat", [*front, tape.op("Shape", [like], {"start": start})], {"axis": 0})])
    made.type, made.shape = value.type, ir.Shape([None] * (len(value.shape or ()) + (1 if start == 1 else -1)))
    return made


def _whole(tape: Tape, value: ir.Value, known: Mapping[ir.Value, ir.Value], shape: ir.Shape | None) -> ir.Value:
    """One value of a step for all steps, from what its operands are for all steps."""
    node = value.producer()
    if node is None:
        return value
    made = tape.op(node.op_type, [None if v is None else known[v] for v in node.inputs], dict(node.attributes), domain=node.domain)
    made.type, made.shape = value.type, shape or ir.Shape([None] * len(value.shape or ()))
    return made


def _taken(tape: Tape, value: ir.Value, port: Port) -> ir.Value:
    layout, given = port.layout, value
    rank = len(value.shape or ())
    if layout.before:
        value = tape.op("Transpose", [value], {"perm": list(layout.before)})
    if layout.join == 0:
        value = tape.op("Unsqueeze", [value, ints(tape, -1)])
    if layout.join > 1:
        value = tape.op("Reshape", [value, ints(tape, *[0] * (rank - layout.join), -1)])
    if layout.spread:
        value = tape.op("Reshape", [value, ints(tape, *[0] * (rank - layout.join), *layout.spread)])
    if layout.after:
        value = tape.op("Transpose", [value], {"perm": list(layout.after)})
    if port.lone:
        value = tape.op("Unsqueeze", [value, ints(tape, 0)])
    value.type = given.type
    return value


def _given(tape: Tape, value: ir.Value, port: Port) -> ir.Value:
    layout, given = port.layout, value
    if port.lone:
        value = tape.op("Squeeze", [value, ints(tape, 0)])
    if layout.before:
        value = tape.op("Transpose", [value], {"perm": list(layout.before)})
    if layout.join == 0:
        value = tape.op("Squeeze", [value, ints(tape, -1)])
    if layout.spread or layout.join > 1:
        kept = 2 if port.after else len(port.value.shape or ()) - max(len(layout.spread), 1)
        value = tape.op("Reshape", [value, ints(tape, *[0] * kept, *(layout.spread or [-1]))])
    if layout.after:
        value = tape.op("Transpose", [value], {"perm": list(layout.after)})
    value.type = given.type
    return value
