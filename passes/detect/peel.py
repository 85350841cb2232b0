"""The value to take as an operand: the product's own, or one before it that the nodes between only lay out anew, scale or repeat.

Each node that is looked through is one that nothing needs any more, each step of a port's layout is a new one: fewest nodes win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewriter.graph import Graph, Port, Value
from rewriter.passes.detect import axes as layouts
from rewriter.passes.detect.axes import Axes, Frame, Group, layout, steps
from rewriter.passes.detect.scores import Operand, readers, scaled

MOVES = ("transpose", "reshape", "unsqueeze", "squeeze", "expand", "repeat", "repeat_interleave", "concat", "mul", "div")


@dataclass(frozen=True)
class State:
    """A value that the operand is computed from, times `factor`, and how many nodes lie between."""

    value: Value
    axes: Axes
    factor: float = 1.0
    count: int = 0


def peeled(graph: Graph, frame: Frame, at: Operand, factors: bool = False) -> list[State]:
    """The operand itself, then what lies behind it, one node at a time."""
    states = [State(at.value, at.axes)]
    while True:
        last = states[-1]
        node = graph.producer(last.value)
        if node is None or graph.is_const(last.value):
            return states
        factor, found = 1.0, layouts.before(graph, frame, node, last.axes)
        if found is None and factors and (times := scaled(graph, node)) is not None:
            found, factor = (times[0], last.axes), times[1]
        if found is None:
            return states
        states.append(State(*found, last.factor * factor, last.count + (graph.op(node) in MOVES)))


def followed(graph: Graph, frame: Frame, at: Operand) -> list[State]:
    """The result itself, then what its only reader lays out anew."""
    states = [State(at.value, at.axes)]
    while True:
        last, users = states[-1], readers(graph, states[-1].value)
        if len(users) != 1 or graph.op(users[0]) == "output":
            return states
        made = layouts.after(graph, frame, users[0], last.axes)
        if made is None:
            return states
        states.append(State(graph.outputs(users[0])[0], made, 1.0, last.count + (graph.op(users[0]) in MOVES)))


def taken(frame: Frame, states: Sequence[State], want: Axes, given: bool = False) -> tuple[Port, State] | None:
    """The port that gives these axes (`given`: that is given them) in the fewest nodes; without a batch it may stand alone."""
    found: list[tuple[int, int, int, Port, State]] = []
    for state in states:
        have = frame.axes(state.axes)
        for lone in (False, True)[: 1 + (not want[0])]:
            axes = want[1:] if lone else want
            how = layout(axes, have) if given else layout(have, axes)
            if how is not None:
                found.append((steps(how) + lone - state.count, steps(how), len(found), Port(state.value, how, lone), state))
    if not found:
        return None
    *_, port, state = min(found, key=lambda entry: entry[:3])
    return port, state


def broadcast(frame: Frame, states: Sequence[State], groups: Sequence[Group]) -> tuple[Port, State, tuple[bool, ...]] | None:
    """A port for a mask, which has some of the groups, and which ones those are."""
    found: list[tuple[int, int, Port, State, tuple[bool, ...]]] = []
    for state in states:
        atoms = {a for group in frame.axes(state.axes) for a in group}
        has = tuple(bool(group) and set(group) <= atoms for group in groups)
        best = taken(frame, [state], tuple(g if h else () for g, h in zip(groups, has, strict=True)))
        if best is not None:
            port = best[0]
            found.append((steps(port.layout) + port.lone - state.count, len(found), port, state, has))
    if not found:
        return None
    *_, port, state, has = min(found, key=lambda entry: entry[:2])
    return port, state, has
