"""One step of a recurrence as a function of numbers: what a loop's body computes, evaluated in float64.

Its boundary is what the state-dependent part reads of the rest of the step; the rest needs no recurrence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import networkx
import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.graph import Graph, Loop, Node, Slice, Value
from rewriter.structure import NoMatch
from rewriter.tolerances import EQUAL

BATCH = 7  # what a size that varies becomes; few axes of a model are as long
CUTS = 24  # operations on a result after its readout
STATE = "state"
DTYPE = torch.float64
LAYOUT = {"reshape", "transpose", "unsqueeze", "squeeze", "expand", "identity", "select", "slice", "getitem", "unbind", "split"}
# Of numbers from anywhere these are sums and products, so what agrees on random ones agrees on all; a clamp agrees only where it is idle.
SUMS = {"aten.sum", "aten.mean", "ReduceSum", "ReduceMean", "add", "sub", "rsub", "neg", "concat", "stack", "repeat", "repeat_interleave"}
PRODUCTS = {"mul", "matmul", "linear", "addmm", "gemm", "einsum", "outer", "conv", "aten.dot", "aten.addcmul"}
OUTER = {"mul", "matmul", "einsum", "outer"}
POLYNOMIAL = LAYOUT | SUMS | PRODUCTS | {"aten.flip", "aten.roll"}


@dataclass
class Step:
    """A loop's body with examples: `x` and `state` hold values in which every entry is its own random number."""

    graph: Graph
    loop: Loop
    state: dict[Value, Tensor] = field(default_factory=dict)  # by begin
    x: dict[Value, Tensor] = field(default_factory=dict)  # by inner value
    edge: dict[Value, Tensor] = field(default_factory=dict)  # the boundary, seen through layout, at x
    sizes: dict[Value, Tensor] = field(default_factory=dict)  # what reshapes read, at x
    batched: bool = False  # the first axis of the state varies
    cut: Value | None = None  # what stands for the result, which is computed from it row by row
    _depends: dict[Value, bool] = field(default_factory=dict)

    @property
    def ends(self) -> list[Value]:
        return [self._itself(c.end) for c in self.loop.carries]

    @property
    def ys(self) -> list[Value]:
        return [self.cut] if self.cut is not None else [self._itself(y.inner) for y in self.loop.ys]

    @property
    def y(self) -> Slice:
        """The one result."""
        (y,) = self.loop.ys
        return y if self.cut is None else Slice(self.cut, y.outer, y.axis)

    def _itself(self, value: Value) -> Value:
        """Before copies."""
        while (node := self.graph.producer(value)) is not None and self.graph.op(node) == "identity":
            value = next(v for v in self.graph.inputs(node) if v is not None)
        return value

    def run(self, state: Mapping[Value, Tensor], given: Mapping[Value, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(new states, ys) from states and the boundary, or the x's."""
        found = self.compute([*self.ends, *self.ys], {**state, **given})
        return found[: len(self.ends)], found[len(self.ends) :]

    def compute(self, wanted: Sequence[Value], given: Mapping[Value, Tensor]) -> list[Tensor]:
        """Of as many rows as the examples have."""
        return self.graph.compute(wanted, {**self.sizes, **given})

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
            if node is None or self.graph.op(node) in ("fill", "zeros", "shape"):
                continue
            if not self._polynomial(node, value, inputs) or self._by_size(node, value):
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

    def _by_size(self, node: Node, value: Value) -> bool:
        """Whether a size goes into numbers: the examples have one."""
        varying = (v for v in self.graph.inputs(node) if v is not None and not self.graph.is_const(v))
        return _float(self.graph, value) and self.graph.op(node) not in LAYOUT and not all(_float(self.graph, v) for v in varying)

    def _factors(self, root: Value) -> list[Value]:
        """The smaller values that it is sums and products of, as I - beta k k^T is of beta k and k; none where it is of others too."""
        ways = self._ways(root)
        size = {v: t.numel() for v, t in zip(ways, self.graph.compute(list(ways), self.x), strict=True)}
        found, seen, stack = dict[Value, None](), set[Value](), [root]
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            smaller = [v for v in ways[value] if size[v] < size[root]]
            times = value not in self.x and self.graph.op(self.graph.producer(value)) in OUTER
            outer = times and len(smaller) == 2 and all(size[v] > 1 for v in smaller)
            if (smaller and not times) or (len(smaller) == len(ways[value]) and not outer):
                return []
            found.update(dict.fromkeys(smaller))
            stack += reversed([v for v in ways[value] if v not in smaller])
        return list(found)

    def _ways(self, root: Value) -> dict[Value, list[Value]]:
        """What varies of the operands of a value, and of theirs, as long as they are sums and products."""
        found, stack = dict[Value, list[Value]](), [root]
        while stack:
            value = stack.pop()
            node = None if value in self.x or value in found else self.graph.producer(value)
            linear = node is not None and (self.graph.op(node) in POLYNOMIAL or self.graph.sliced(value) is not None)
            inputs = self.graph.inputs(node) if linear else ()
            found.setdefault(value, [v for v in inputs if v is not None and _float(self.graph, v) and not self.graph.is_const(v)])
            stack += [v for v in found[value] if v not in found]
        return found

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

    def _edges(self, apart: bool = True) -> list[Value]:
        """What the state-dependent part reads of the rest; an outer product as large as a state is its two sequences where `apart`."""
        found, seen, stack = dict[Value, None](), set[Value](), list(reversed([*self.ends, *self.ys]))
        while stack:
            value = stack.pop()
            if value in seen or value in self.state:
                continue
            seen.add(value)
            if self.depends(value):
                stack.extend(v for v in reversed(self.graph.inputs(self.graph.producer(value))) if v is not None)
            elif self._is_size(value):
                self.sizes.update(zip([value], self.graph.compute([value], self.x), strict=True))
            elif not self.graph.is_const(value):
                root = self.root(value)
                factors = self._factors(root) if apart else []
                stack.extend(factors)
                found.update({} if factors else {root: None})
        return list(found)

    def otherwise(self) -> Iterator[Step]:
        """The same reading more of the step, beta and k for beta k, or less, an outer product for its two sequences."""
        for edges in (self._finer(), self._edges(apart=False)):
            if set(edges) != set(self.edge):
                yield from self._reading(edges)

    def cuts(self) -> Iterator[Step]:
        """The same with its result nearer to the state: what is done to it afterwards, a skip, a gate, a norm, needs no recurrence.

        Every way from the result to a state leads through such a value: it dominates them.
        """
        if len(self.loop.ys) != 1:
            return
        (top,), ways, stack = self.ys, networkx.DiGraph(), self.ys
        while stack:
            value = stack.pop()
            node = None if value in self.state else self.graph.producer(value)
            before = [v for v in self.graph.inputs(node) if v is not None and self.depends(v)] if node is not None else []
            stack += [v for v in before if v not in ways]
            ways.add_edges_from((value, v) for v in before or [STATE])
        above = networkx.immediate_dominators(ways, top) if self.depends(top) else {}
        found = list[Value]()
        while (value := above.get(found[-1] if found else STATE, top)) is not top:
            found.append(value)
        for value in reversed(found[-CUTS:]):
            nearer = replace(self, cut=value)
            yield from nearer._reading(nearer._edges())

    def _reading(self, edges: Sequence[Value]) -> Iterator[Step]:
        """The same with other edges, where they are numbers."""
        if all(_float(self.graph, v) for v in edges):
            yield replace(self, edge=dict(zip(edges, self.graph.compute(edges, self.x), strict=True)) if edges else {})

    def _finer(self) -> list[Value]:
        found = dict[Value, None]()
        for root in self.edge:
            node = None if root in self.x else self.graph.producer(root)
            operands = [v for v in self.graph.inputs(node) if v is not None] if node is not None and self.graph.op(node) == "mul" else []
            apart = len(operands) == 2 and not any(map(self.graph.is_const, operands))
            found.update(dict.fromkeys([self.root(v) for v in operands] if apart else [root]))
        return list(found)

    def _is_size(self, value: Value) -> bool:
        """Whether it is no number of the model: shapes alone go into it."""
        met, seen, stack = False, set[Value](), [] if _float(self.graph, value) else [value]
        while stack:
            here = stack.pop()
            if here in seen or self.graph.is_const(here):
                continue
            seen.add(here)
            node = None if here in self.x or here in self.state else self.graph.producer(here)
            if node is None:
                return False
            met = met or self.graph.op(node) == "shape"
            stack.extend(v for v in self.graph.inputs(node) if v is not None and self.graph.op(node) != "shape")
        return met


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
