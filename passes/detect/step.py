"""One step of a recurrence as a function of numbers: what a loop's body computes, evaluated in float64.

Its boundary is what the state-dependent part reads of the rest of the step; the rest needs no recurrence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.graph import Graph, Loop, Node, Slice, Value
from rewriter.structure import NoMatch
from rewriter.tolerances import EQUAL

BATCH = 7  # what a size that varies becomes; few axes of a model are as long
DTYPE = torch.float64
LAYOUT = {"reshape", "transpose", "unsqueeze", "squeeze", "expand", "identity", "select", "slice", "getitem", "unbind", "split"}
UNARY = {"cast", "exp", "log", "neg", "sigmoid", "tanh", "relu", "silu", "softplus", "sqrt", "abs", "reciprocal"}
ELEMENTWISE = {"add", "sub", "mul", "div", *UNARY}
# Of numbers from anywhere these are sums and products, so what agrees on random ones agrees on all; a clamp agrees only where it is idle.
SUMS = {"aten.sum", "aten.mean", "ReduceSum", "ReduceMean", "add", "sub", "rsub", "neg", "concat", "stack", "repeat", "repeat_interleave"}
PRODUCTS = {"mul", "matmul", "linear", "addmm", "gemm", "einsum", "outer", "conv", "aten.dot", "aten.addcmul"}
BODIES = ("cond", "if", "loop", "scan")
POLYNOMIAL = LAYOUT | SUMS | PRODUCTS | {"aten.flip", "aten.roll"}


@dataclass
class Step:
    """A loop's body with examples: `x` and `state` hold values in which every entry is its own random number."""

    graph: Graph
    loop: Loop
    state: dict[Value, Tensor] = field(default_factory=dict)  # by begin
    x: dict[Value, Tensor] = field(default_factory=dict)  # by inner value
    edge: dict[Value, Tensor] = field(default_factory=dict)  # the boundary, seen through layout, at x
    batched: bool = False  # the first axis of the state varies
    _depends: dict[Value, bool] = field(default_factory=dict)

    @property
    def ends(self) -> list[Value]:
        return [self._itself(c.end) for c in self.loop.carries]

    @property
    def ys(self) -> list[Value]:
        return [self._itself(y.inner) for y in self.loop.ys]

    def _itself(self, value: Value) -> Value:
        """Before copies."""
        while (node := self.graph.producer(value)) is not None and self.graph.op(node) == "identity":
            value = next(v for v in self.graph.inputs(node) if v is not None)
        return value

    def run(self, state: Mapping[Value, Tensor], given: Mapping[Value, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(new states, ys) from states and the boundary, or the x's."""
        found = self.graph.compute([*self.ends, *self.ys], {**state, **given})
        return found[: len(self.ends)], found[len(self.ends) :]

    def depends(self, value: Value) -> bool:
        """On a state."""
        stack = [value]
        while stack:
            top = stack[-1]
            if top in self._depends:
                stack.pop()
                continue
            node = None if top in self.x else self.graph.producer(top)
            if top in self.state:
                self._depends[top] = True
                continue
            inputs = [] if node is None or self.graph.is_const(top) else [v for v in self.graph.inputs(node) if v is not None]
            missing = [v for v in inputs if v not in self._depends]
            if missing:
                stack.extend(missing)
            else:
                self._depends[top] = any(self._depends[v] for v in inputs)
        return self._depends[value]

    def beyond(self, inputs: Mapping[Value, Tensor]) -> str:
        """The first operation on the way from a state or from `inputs` that is no sum or product of what varies; "" without one."""
        seen, stack = set[Value](), [*self.ends, *self.ys]
        while stack:
            value = stack.pop()
            if value in seen or value in inputs or value in self.state or self.graph.is_const(value):
                continue
            seen.add(value)
            node = self.graph.producer(value)
            if node is None or self.graph.op(node) in ("fill", "zeros"):
                continue
            if not self._polynomial(node, value, inputs):
                return self.graph.op(node)
            stack.extend(v for v in self.graph.inputs(node) if v is not None)
        return ""

    def _polynomial(self, node: Node, value: Value, inputs: Mapping[Value, Tensor]) -> bool:
        op, given = self.graph.op(node), self.graph.inputs(node)
        if op == "cast":
            return all(v is not None and _float(self.graph, v) for v in (given[0], value))
        if op == "div":
            return given[1] is None or self.graph.is_const(given[1]) or (inputs is self.edge and not self.depends(given[1]))
        return op in POLYNOMIAL or self.graph.sliced(value) is not None

    def _factors(self, root: Value) -> list[Value]:
        """The two that an outer product as large as a state is made of."""
        node = None if root in self.x else self.graph.producer(root)
        if node is None or self.graph.op(node) not in ("mul", "matmul", "einsum", "outer"):
            return []
        operands = [v for v in self.graph.inputs(node) if v is not None and not self.graph.is_const(v)]
        whole, *sizes = (t.numel() for t in self.graph.compute([root, *operands], self.x))
        return operands if len(sizes) == 2 and all(1 < size < whole for size in sizes) else []

    def root(self, value: Value) -> Value:
        """What a value is but a rearrangement of."""
        while value not in self.x and (node := self.graph.producer(value)) is not None:
            if self.graph.op(node) not in LAYOUT and self.graph.sliced(value) is None:
                break
            varying = [v for v in self.graph.inputs(node) if v is not None and not self.graph.is_const(v)]
            if len(varying) != 1:
                break
            value = varying[0]
        return value

    def maker(self, root: Value) -> tuple[Node | None, str]:
        """What computes a value's numbers, in the step or before the loop, and the name of that operation."""
        outer = next((x.outer for x in self.loop.xs if x.inner == root), root)
        node = self.graph.producer(self.root(outer))
        return node, "" if node is None else self.graph.op(node)

    def sources(self, value: Value) -> dict[Value, Value] | None:
        """The whole sequences that a value is computed from elementwise, by their slices; None where it is computed otherwise."""
        found, stack, seen, constants = dict[Value, Value](), [value], set[Value](), list[Value]()
        outer = {x.inner: x for x in self.loop.xs}
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            node = self.graph.producer(value)
            if value in outer:
                found[value] = outer[value].outer
            elif self.graph.is_const(value):
                constants.append(value)
            elif node is None or self.graph.op(node) not in ELEMENTWISE:
                return None
            else:
                stack.extend(v for v in self.graph.inputs(node) if v is not None)
        alike = {(outer[v].axis, outer[v].kept, tuple(self.x[v].shape)) for v in found}
        if len(alike) != 1 or not all(self._stays(outer[next(iter(found))], c) for c in constants):
            return None
        return found

    def rowwise(self, value: Value) -> dict[Value, Value] | None:
        """The same where rows of the batch, of which there may be any number, are computed each by itself; None where they are not."""
        found, seen, stack = dict[Value, Value](), set[Value](), [value]
        outer = {x.inner: x for x in self.loop.xs}
        while stack:
            here = stack.pop()
            if here in seen or self.graph.is_const(here):
                continue
            seen.add(here)
            node = self.graph.producer(here)
            if here in outer:
                found[here] = outer[here].outer
            elif node is None or len(self.graph.outputs(node)) != 1 or self.graph.op(node) in BODIES:
                return None
            else:
                stack.extend(v for v in self.graph.inputs(node) if v is not None)
        if len({outer[v].axis for v in found}) != 1 or any(outer[v].kept or outer[v].axis > 1 for v in found):
            return None
        last = self.x[next(iter(found))].shape[0] - 1
        rows = [last, 0, last]
        try:
            (whole,), (part,) = (self.graph.compute([value], x) for x in (self.x, {v: x[rows] for v, x in self.x.items()}))
        except RewriteError:  # of one batch size
            return None
        return found if len(part) == len(rows) and close(part, whole[rows]) else None

    def _stays(self, x: Slice, constant: Value) -> bool:
        """Whether the constant meets the same axes of a whole sequence as of one step: all behind the time axis."""
        shape = list(self.graph.shape(constant) or ())
        while shape and shape[0] == 1:
            shape.pop(0)
        return bool(x.kept or len(shape) < len(self.graph.shape(x.outer) or ()) - x.axis)

    def _edges(self, apart: bool = True) -> list[Value]:
        """What the state-dependent part reads of the rest; an outer product as large as a state is its two sequences where `apart`."""
        found, seen, stack = dict[Value, None](), set[Value](), list(reversed([*self.ends, *self.ys]))
        while stack:
            value = stack.pop()
            if value in seen or value in self.state:
                continue
            seen.add(value)
            if not self.depends(value):
                if not self.graph.is_const(value):
                    root = self.root(value)
                    factors = self._factors(root) if apart else []
                    stack.extend(factors)
                    found.update({} if factors else {root: None})
                continue
            node = self.graph.producer(value)
            stack.extend(v for v in reversed(self.graph.inputs(node)) if v is not None)
        return list(found)

    def otherwise(self) -> Iterator[Step]:
        """The same reading more of the step, beta and k for beta k, or less, an outer product for its two sequences."""
        for edges in (self._finer(), self._edges(apart=False)):
            if set(edges) != set(self.edge) and all(_float(self.graph, v) for v in edges):
                yield replace(self, edge=dict(zip(edges, self.graph.compute(edges, self.x), strict=True)))

    def _finer(self) -> list[Value]:
        found = dict[Value, None]()
        for root in self.edge:
            node = None if root in self.x else self.graph.producer(root)
            operands = [v for v in self.graph.inputs(node) if v is not None] if node is not None and self.graph.op(node) == "mul" else []
            apart = len(operands) == 2 and not any(map(self.graph.is_const, operands))
            found.update(dict.fromkeys([self.root(v) for v in operands] if apart else [root]))
        return list(found)


def step_of(graph: Graph, loop: Loop, rng: torch.Generator) -> Step | NoMatch:
    """The step with examples, or why it cannot be evaluated."""
    step = Step(graph, loop)
    for carry in loop.carries:
        shape = numbers(graph.shape(carry.initial))
        if shape is None or not _float(graph, carry.initial):
            return NoMatch("a state that is no float tensor of known rank")
        varying = [axis for axis, n in enumerate(graph.shape(carry.initial) or ()) if not isinstance(n, int)]
        if varying and (varying != [0] or len(shape) == 1):
            return NoMatch("a state whose sizes vary; the first of several axes may, the batch")
        step.batched = step.batched or bool(varying)
        step.state[carry.begin] = torch.randn(shape, generator=rng, dtype=DTYPE)
    for x in loop.xs:
        shape = numbers(graph.shape(x.outer))
        if shape is None or not _float(graph, x.outer):
            return NoMatch("a sequence that is no float tensor of known rank")
        if x.kept and x.axis == 0 and len(shape) > 1:
            return NoMatch("a sequence whose steps keep their time axis in front")
        shape[x.axis : x.axis + 1] = [1] if x.kept else []
        step.x[x.inner] = torch.rand(shape, generator=rng, dtype=DTYPE) + 0.1
    try:
        edges = step._edges()
        step.edge = dict(zip(edges, graph.compute(edges, step.x), strict=True)) if edges else {}
        ends, _ = step.run(step.state, step.edge)
    except RewriteError as problem:
        return NoMatch(f"its step cannot be evaluated: {problem}")
    if (other := next((v for v, x in step.edge.items() if not x.is_floating_point()), None)) is not None:
        return NoMatch(f"its step reads {graph.name(other)}, which is no float")
    if any(e.shape != s.shape for e, s in zip(ends, step.state.values(), strict=True)):
        return NoMatch("a state whose shape changes from step to step")
    return step


def numbers(shape: Sequence[int | str] | None) -> list[int] | None:
    """The shape with BATCH for what varies."""
    return None if shape is None else [n if isinstance(n, int) else BATCH for n in shape]


def _float(graph: Graph, value: Value) -> bool:
    dtype = graph.dtype(value)
    return dtype is not None and dtype.is_floating_point


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, as two ways to compute one product are."""
    rtol, atol = EQUAL[DTYPE]
    return a.shape == b.shape and torch.allclose(a, b, rtol=rtol, atol=atol * max(1.0, float(b.abs().max()) if b.numel() else 1.0))
