"""What a recurrence was read as, and the ports between one step's values and whole sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from torch import Tensor

from rewriter.graph import PLAIN, Layout, Port, Region, Slice, Value
from rewriter.operator import AbstractRecurrence
from rewriter.passes.detect.hoisting import rowwise, sources
from rewriter.passes.detect.step import LAYOUT, Step, close
from rewriter.structure import NoMatch


@dataclass(frozen=True)
class Reading:
    """The operator that the region's nodes compute."""

    form: AbstractRecurrence
    region: Region
    said: str  # "gated delta rule, 4 heads of 64 x 64"


def orders(rank: int, lone: bool) -> Iterator[tuple[int, ...]]:
    """Orders of a step value's axes, the batch axis first, as it is before all others."""
    front = () if lone else (0,)
    return ((*front, *rest) for rest in permutations(range(len(front), rank)))


def arranged(value: Tensor, order: Sequence[int], lone: bool) -> Tensor:
    """(batch, n) from one step's value."""
    moved = value.permute(*order)
    return moved.reshape(1, -1) if lone else moved.reshape(moved.shape[0], -1)


def sequence_port(step: Step, root: Value, order: Sequence[int], lone: bool, log: bool = False) -> Port | NoMatch:
    """The whole sequences behind a step's value, features last: (batch, time, n)."""
    found = sources(step, root)
    rows = found is None and not lone
    found = rowwise(step, root) if rows else found
    if not found:
        return NoMatch("its step computes its inputs in a way that cannot be done for all steps at once, or for one batch size alone")
    x = next(x for x in step.loop.xs if x.inner in found)
    moved = [_outer_axis(x, axis) for axis in order if not (x.kept and axis == x.axis)]
    before = (x.axis, *moved) if lone else (moved[0], x.axis, *moved[1:])
    join = len(before) - (1 if lone else 2)
    layout = Layout(before if list(before) != sorted(before) else (), join)
    hoist = {} if root in found else found
    return Port(found.get(root, root), layout, lone, hoist, log, rows=rows)


def _outer_axis(x: Slice, axis: int) -> int:
    return axis if x.kept or axis < x.axis else axis + 1


def result_port(y: Slice, value: Tensor, flat: Tensor, sizes: Sequence[int], lone: bool) -> Port | NoMatch:
    """Where a map's (batch, time, n) goes so that one step gives `value`; `flat` (batch, n) is the map's, n unfolds to `sizes`."""
    value = value.squeeze(y.axis) if y.kept else value
    rank = value.dim()
    first = 0 if lone else 1
    whole = flat.reshape([*flat.shape[:first], *sizes])
    for order in permutations(range(first, whole.dim())):
        moved = whole.permute([*range(first), *order])
        if moved.numel() == value.numel() and close(moved.reshape(value.shape), value):
            return Port(y.outer, _given(y, order, list(value.shape[first:]), sizes, first), lone)
    return NoMatch(f"its result of rank {rank} is no rearrangement of what the state is read to")


def finished(step: Step, reading: Reading) -> Reading | None:
    """The reading with what the step does to its result afterwards, for all steps at once; None where that cannot be."""
    if step.cut is None:
        return reading
    (y,), (port, *states) = step.loop.ys, reading.region.outputs
    (cut,) = step.compute([step.cut], {**step.state, **step.x})
    found = rowwise(step, y.inner, {step.cut: cut})
    axes = {x.axis for x in step.loop.xs if found is not None and x.inner in found}
    if found is None or port is None or port.lone or y.kept or y.axis > 1 or axes - {y.axis}:
        return None
    result = replace(port, hoist=found, rows=True, after=(step.cut, y.inner))
    return replace(reading, region=replace(reading.region, outputs=(result, *states)))


def _given(y: Slice, order: Sequence[int], shape: list[int], sizes: Sequence[int], first: int) -> Layout:
    """(batch, time, n) -> the outer value's axes."""
    natural = list(order) == sorted(order)
    spread = tuple(shape) if natural else tuple(sizes)
    axes = [*range(first + 1, first + 1 + len(spread))] if natural else [i + 1 for i in order]
    placed = [0, *axes] if first else list(axes)
    placed.insert(y.axis, first)  # the time axis
    if natural and len(spread) == 1:
        spread = ()
    after = tuple(placed) if placed != sorted(placed) else ()
    return Layout(PLAIN.before, 1 if shape else 0, spread, after)


def zero(step: Step, initial: Value) -> bool:
    """Whether the first state is zero whatever the inputs are."""
    graph = step.graph
    while not graph.is_const(initial) and (node := graph.producer(initial)) is not None:
        if graph.op(node) == "zeros":
            return True
        operands = [v for v in graph.inputs(node) if v is not None]
        if graph.op(node) not in LAYOUT or not operands:
            return False
        initial = operands[0]
    held = graph.const(initial) if graph.is_const(initial) else None
    return held is not None and not bool(held.any())


def state_port(value: Value, order: Sequence[int], sizes: Sequence[int], lone: bool) -> Port:
    """A state (batch, *sizes) from an outer one whose axes lie in `order`."""
    join = len(order) - (0 if lone else 1)
    return Port(value, Layout(tuple(order) if list(order) != sorted(order) else (), join, tuple(sizes)), lone)


def final_port(value: Value | None, order: Sequence[int], shape: Sequence[int], count: int, lone: bool) -> Port | None:
    """The inverse: the map's state of `count` axes after the batch to an outer one of `shape`."""
    if value is None:
        return None
    first = 0 if lone else 1
    moved = [shape[axis] for axis in order]
    back = [list(order).index(axis) for axis in range(len(order))]
    return Port(value, Layout((), count, tuple(moved[first:]), tuple(back) if back != sorted(back) else ()), lone)
