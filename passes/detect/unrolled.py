"""Re-rolls a recurrence that an exporter unrolled: T isomorphic steps, step t reads slice t of the sequences and the states of step t - 1.

The level of a value is the last slice that it depends on. What level t + 1 reads of level t crosses; a crossing value that is one older
value times constants gives way to that one, so the states are the ones that the model names. Steps are compared pairwise from their results
back to slices, states and constants; what differs in one step is no recurrence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import networkx
import torch

from rewriter.graph import Carry, Graph, Loop, Node, Slice, Value

LEAST_STEPS = 3


def unrolled(graph: Graph) -> Iterator[Loop]:
    """Every unrolled recurrence of the main body: of each length, a slice for every step at least."""
    lengths: dict[int, set[int]] = {}
    for node in graph.nodes():
        for value in graph.outputs(node):
            found = graph.sliced(value)
            if found is not None and graph.body(node) == "":
                source, axis, index, _ = found
                size = (graph.shape(source) or ())[axis : axis + 1]
                if size and isinstance(size[0], int) and size[0] >= LEAST_STEPS:
                    lengths.setdefault(size[0], set()).add(index)
    for length, indices in lengths.items():
        if len(indices) >= length:
            yield from _Chain(graph, length).loops()


@dataclass
class _Chain:
    """All that is unrolled over one length."""

    graph: Graph
    length: int
    level: dict[int, int] = field(default_factory=dict)  # by id of the value; -1 and absent: outside
    slices: dict[int, Slice] = field(default_factory=dict)  # by id of the inner value
    index: dict[int, int] = field(default_factory=dict)  # of slices
    rows: list[tuple[Node, Sequence[Value], int, bool]] = field(default_factory=list)  # stacks of one piece a step
    values: dict[int, Value] = field(default_factory=dict)
    cross: list[list[Value]] = field(default_factory=list)

    def loops(self) -> Iterator[Loop]:
        self._levels()
        for far in (True, False):
            self.cross = self._crossings(far)
            if not self.cross[0] or len({len(c) for c in self.cross}) > 1:
                continue
            walk = _Walk(self)
            if all(walk.step(t) for t in range(2, self.length)) and walk.step(1):
                yield from self._components(walk)
                return

    def _levels(self) -> None:
        for node in self.graph.nodes():
            if self.graph.body(node) != "":
                continue
            inherited = max((self.level.get(id(v), -1) for v in self.graph.inputs(node) if v is not None), default=-1)
            row = self.graph.stacked(node)
            if row is not None and self._in_row([self.level.get(id(p), -1) for p in row[0]]):
                self.rows.append((node, *row))
                inherited = -1
            for value in self.graph.outputs(node):
                self.values[id(value)] = value
                self.level[id(value)] = self._sliced(value, inherited)

    def _in_row(self, levels: Sequence[int]) -> bool:
        """One piece a step, of the step itself or of the state before it."""
        return list(levels) in (list(range(self.length)), list(range(-1, self.length - 1)))

    def _sliced(self, value: Value, inherited: int) -> int:
        found = self.graph.sliced(value)
        if found is None:
            return inherited
        source, axis, index, kept = found
        if (self.graph.shape(source) or ())[axis : axis + 1] != (self.length,) or self.level.get(id(source), -1) >= 0:
            return inherited
        self.slices[id(value)] = Slice(value, source, axis, kept)
        self.index[id(value)] = index
        return index

    def _crossings(self, far: bool) -> list[list[Value]]:
        """What step t + 1 reads of step t, for each t."""
        found = [dict[int, Value]() for _ in range(self.length - 1)]
        for value in self.values.values():
            node, t = self.graph.producer(value), self.level[id(value)] - 1
            if 0 <= t < len(found) and node is not None and id(value) not in self.slices:
                operands = [v for v in self.graph.inputs(node) if v is not None and id(v) not in self.slices]
                found[t].update({id(v): v for v in operands if self.level.get(id(v), -1) == t})
        return [
            list({id(v): v for v in (self._retreat(c, t, far) for c in crossing.values())}.values()) for t, crossing in enumerate(found)
        ]

    def _retreat(self, value: Value, t: int, far: bool) -> Value:
        """The state that a step begins with: before what the next step alone does to it, less `far` where the first step does less."""
        came: Value | None = None
        while True:
            node = self.graph.producer(value)
            later = [v for user in self.graph.users(value) for v in self._results(user) if not far or v is not came]
            if node is None or any(self.level.get(id(v), -1) != t + 1 for v in later):
                return value
            varying = list(dict.fromkeys(v for v in self.graph.inputs(node) if v is not None and not self.graph.is_const(v)))
            if len(varying) != 1 or self.level.get(id(varying[0]), -1) != t or id(varying[0]) in self.slices:
                return value
            came, value = value, varying[0]

    def _results(self, node: Node) -> Sequence[Value]:
        return [v for v in self.graph.outputs(node) if id(v) in self.values]

    def _components(self, walk: _Walk) -> Iterator[Loop]:
        """Layers over sequences of one length are recurrences of their own: states that no result joins."""
        carries = {id(begin): (begin, end) for begin, end in zip(self.cross[0], walk.ordered(1), strict=True)}
        results = [*(end for _, end in carries.values()), *(row[1][1] for row in self.rows)]
        groups = networkx.Graph()
        groups.add_nodes_from(carries)
        for result in results:
            joined = [i for i in self._reached(result) if i in carries] + [i for i in carries if carries[i][1] is result]
            groups.add_edges_from(pairwise(joined))
        for group in networkx.connected_components(groups):
            loop = self._loop(walk, [pair for i, pair in carries.items() if i in group])
            if loop.nodes:
                yield loop

    def _reached(self, result: Value) -> dict[int, None]:
        """Ids of the states and slices that a result of step 1 is computed from."""
        found, seen, stack = dict[int, None](), set[int](), [result]
        while stack:
            value = stack.pop()
            node = self.graph.producer(value)
            if id(value) in seen:
                continue
            seen.add(id(value))
            if any(value is c for c in self.cross[0]) or id(value) in self.slices:
                found[id(value)] = None
            elif node is not None and self.level.get(id(value), -1) >= 0:
                stack.extend(v for v in self.graph.inputs(node) if v is not None)
        return found

    def _loop(self, walk: _Walk, states: Sequence[tuple[Value, Value]]) -> Loop:
        after = {id(c): walk.last(c) for c in self.cross[-1]}
        begins = {id(begin) for begin, _ in states}
        rows = [row for row in self.rows if begins & self._reached(row[1][1]).keys()]
        reached = [self._reached(v) for v in [*(end for _, end in states), *(row[1][1] for row in rows)]]
        xs = [self.slices[i] for i in dict.fromkeys(i for part in reached for i in part) if i in self.slices]
        last = [after[id(walk.at(begin, self.length - 2))] for begin, _ in states]
        nodes = self._inside([*(v for v in last if v is not None), *(self.graph.outputs(row[0])[0] for row in rows)])
        finals = [v if v is not None and any(user not in nodes for user in self.graph.users(v)) else None for v in last]
        carries = [Carry(begin, end, walk.initial[id(begin)], final) for (begin, end), final in zip(states, finals, strict=True)]
        ys = [Slice(pieces[1], self.graph.outputs(node)[0], axis, kept) for node, pieces, axis, kept in rows]
        return Loop(tuple(nodes), tuple(carries), tuple(xs), tuple(ys))

    def _inside(self, results: Sequence[Value]) -> dict[Node, None]:
        """The nodes of all steps behind some results, in the graph's order."""
        found, stack = set[Node](), list(results)
        while stack:
            value = stack.pop()
            node = self.graph.producer(value)
            if node is None or node in found:
                continue
            found.add(node)
            inputs = () if id(value) in self.slices else self.graph.inputs(node)
            stack.extend(v for v in inputs if v is not None and (self.level.get(id(v), -1) >= 0 or id(v) in self.slices))
        return {node: None for node in self.graph.nodes() if node in found}


class _Walk:
    """Compares step t with step t - 1, from results back to where both begin."""

    def __init__(self, chain: _Chain) -> None:
        self.chain, self.graph = chain, chain.graph
        self.initial: dict[int, Value] = {}  # by id of the state that crosses from step 0 to step 1
        self.match: list[dict[int, Value]] = [{} for _ in range(chain.length)]  # state of step t - 1 that step t's is like
        self._order: dict[int, list[Value]] = {}

    def step(self, t: int) -> bool:
        """Whether every result of step t is computed like that of step t - 1."""
        chain = self.chain
        rows = all(self._alike(pieces[t], pieces[t - 1], t) for _, pieces, _, _ in chain.rows)
        if not rows or t >= len(chain.cross):
            return rows
        for now in chain.cross[t]:
            like = next((before for before in chain.cross[t - 1] if self._alike(now, before, t)), None)
            if like is None:
                return False
            self.match[t][id(now)] = like
        return len({id(v) for v in self.match[t].values()}) == len(chain.cross[t])

    def ordered(self, t: int) -> list[Value]:
        """The states after step t in the order of those after step 0."""
        back = {id(like): now for now in self.chain.cross[t] for like in [self.match[t][id(now)]]}
        return [back[id(v)] for v in self.chain.cross[t - 1]]

    def at(self, state: Value, t: int) -> Value:
        """A state after step 0, after step t."""
        for step in range(1, t + 1):
            state = next(now for now in self.chain.cross[step] if self.match[step][id(now)] is state)
        return state

    def last(self, state: Value) -> Value | None:
        """The same state one step later, after the last step."""
        t = self.chain.length - 1
        last = [v for v in self.chain.values.values() if self.chain.level[id(v)] == t and id(v) not in self.chain.slices]
        return next((v for v in last if self._alike(v, state, t)), None)

    def _alike(self, a: Value, b: Value, t: int) -> bool:
        """a of step t and b of step t - 1, computed by equal operations from what corresponds."""
        pending, seen, initial = [(a, b)], set[tuple[int, int]](), dict[int, Value]()
        while pending:
            a, b = pending.pop()
            if a is b or (id(a), id(b)) in seen or self._same_constant(a, b):
                continue
            seen.add((id(a), id(b)))
            if id(a) in self.chain.slices:
                if not self._same_slice(a, b, t):
                    return False
            elif any(a is c for c in self.chain.cross[t - 1]):
                if t == 1:
                    initial[id(a)] = b
                elif not any(b is c for c in self.chain.cross[t - 2]):
                    return False
            elif not self._same_operation(a, b, pending):
                return False
        if any(self.initial.get(k, v) is not v for k, v in initial.items()):
            return False
        self.initial.update(initial)
        return True

    def _same_constant(self, a: Value, b: Value) -> bool:
        if not (self.graph.is_const(a) and self.graph.is_const(b)):
            return False
        left, right = self.graph.const(a), self.graph.const(b)
        return left is not None and right is not None and torch.equal(left, right)

    def _same_slice(self, a: Value, b: Value, t: int) -> bool:
        first, second = self.chain.slices[id(a)], self.chain.slices.get(id(b))
        if second is None or (first.outer, first.axis, first.kept) != (second.outer, second.axis, second.kept):
            return False
        return (self.chain.index[id(a)], self.chain.index[id(b)]) == (t, t - 1)

    def _same_operation(self, a: Value, b: Value, pending: list[tuple[Value, Value]]) -> bool:
        first, second = self.graph.producer(a), self.graph.producer(b)
        if first is None or second is None or self.graph.op(first) != self.graph.op(second):
            return False
        left, right = self.graph.inputs(first), self.graph.inputs(second)
        outs = [id(v) for v in self.graph.outputs(first)].index(id(a)), [id(v) for v in self.graph.outputs(second)].index(id(b))
        if outs[0] != outs[1] or len(left) != len(right) or self.graph.attributes(first) != self.graph.attributes(second):
            return False
        if any((p is None) != (q is None) for p, q in zip(left, right, strict=True)):
            return False
        pending.extend((p, q) for p, q in zip(left, right, strict=True) if p is not None)
        return True
