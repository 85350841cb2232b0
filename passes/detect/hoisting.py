"""What a step computes of its inputs before its state, and of its result after it, done for all steps at once.

Elementwise it is done on whole sequences as they are; row by row of the batch, with the batch and the time axis made one.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.graph import Graph, Slice, Value
from rewriter.passes.detect.step import Step, close

UNARY = {"cast", "exp", "log", "neg", "sigmoid", "tanh", "relu", "silu", "softplus", "sqrt", "abs", "reciprocal"}
ELEMENTWISE = {"add", "sub", "mul", "div", *UNARY}
BODIES = ("cond", "if", "loop", "scan")
NOTHING: Mapping[Value, Tensor] = {}


def sources(step: Step, value: Value) -> dict[Value, Value] | None:
    """The whole sequences that a value is computed from elementwise, by their slices; None where it is computed otherwise."""
    found, stack, seen, constants = dict[Value, Value](), [value], set[Value](), list[Value]()
    outer = {x.inner: x for x in step.loop.xs}
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        node = step.graph.producer(value)
        if value in outer:
            found[value] = outer[value].outer
        elif step.graph.is_const(value):
            constants.append(value)
        elif node is None or step.graph.op(node) not in ELEMENTWISE:
            return None
        else:
            stack.extend(v for v in step.graph.inputs(node) if v is not None)
    alike = {(outer[v].axis, outer[v].kept, tuple(step.x[v].shape)) for v in found}
    if len(alike) != 1 or not all(_stays(step.graph, outer[next(iter(found))], c) for c in constants):
        return None
    return found


def rowwise(step: Step, value: Value, given: Mapping[Value, Tensor] = NOTHING) -> dict[Value, Value] | None:
    """The same where rows of the batch, of which there may be any number, are computed each by itself; None where they are not.

    What is given besides the sequences is no sequence.
    """
    found, seen, stack = dict[Value, Value](), set[Value](given), [value]
    outer = {x.inner: x for x in step.loop.xs}
    while stack:
        here = stack.pop()
        if here in seen or step.graph.is_const(here):
            continue
        seen.add(here)
        node = step.graph.producer(here)
        if here in outer:
            found[here] = outer[here].outer
        elif node is None or len(step.graph.outputs(node)) != 1 or step.graph.op(node) in BODIES:
            return None
        else:
            stack.extend(v for v in step.graph.inputs(node) if v is not None)
    if len({outer[v].axis for v in found}) > 1 or any(outer[v].kept or outer[v].axis > 1 for v in found):
        return None
    examples = {**{v: step.x[v] for v in found}, **given}
    if not examples:
        return None
    last = next(iter(examples.values())).shape[0] - 1
    rows = [last, 0, last]
    try:
        (whole,), (part,) = (step.graph.compute([value], x) for x in (examples, {v: x[rows] for v, x in examples.items()}))
    except RewriteError:  # of one batch size
        return None
    return found if len(part) == len(rows) and close(part, whole[rows]) else None


def _stays(graph: Graph, x: Slice, constant: Value) -> bool:
    """Whether the constant meets the same axes of a whole sequence as of one step: all behind the time axis."""
    shape = list(graph.shape(constant) or ())
    while shape and shape[0] == 1:
        shape.pop(0)
    return bool(x.kept or len(shape) < len(graph.shape(x.outer) or ()) - x.axis)
