"""Recurrences: scans, loops, unrolled loops and recurrent layers, each listed with what it was read as or why it was not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch

from rewriter.errors import RewriteError
from rewriter.graph import Graph, Loop, Node, Place, Region, Site
from rewriter.operator import AbstractRecurrence
from rewriter.passes.detect.gated_state import read_gated
from rewriter.passes.detect.linear import unique
from rewriter.passes.detect.matrix_state import describe, read_matrix_state
from rewriter.passes.detect.reading import Reading, finished
from rewriter.passes.detect.recurrent_layer import LAYERS, kind_of, matrices, read_identity_rnn
from rewriter.passes.detect.recurrent_node import read_linear_attention
from rewriter.passes.detect.step import Step, close, step_of
from rewriter.passes.detect.unrolled import unrolled
from rewriter.passes.detect.vector_state import CHANGES, read_time_invariant
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.structure import NoMatch

READ = "raise-recurrence makes it one node"
UNPROBED = "a linear state, but its sequences and results lie in no order that is read"


def detect(graph: Graph) -> Iterator[Site]:
    """Every recurrence, read or not."""
    taken: set[str] = set()
    listed: set[str] = set()  # stored matrices
    for node in graph.nodes():
        op = graph.op(node)
        if op in LAYERS:
            linear = read_identity_rnn(graph, node) if op == "rnn" else None
            reason = f"{LAYERS[op]}: {kind_of(graph, node)}, kept as the one operator that it is"
            yield _listed(graph, (node,), reason, taken) if linear is None else _found(graph, linear, (node,), taken)
            yield from matrices(graph, node, listed) if linear is None else ()
        elif op in ("scan", "loop"):
            loop = graph.loop(node)
            yield _listed(graph, (node,), loop, taken) if isinstance(loop, str) else _site(graph, loop, taken)
        elif op == "linear_attention":
            named = read_linear_attention(graph, node)
            yield _listed(graph, (node,), named.reason, taken) if isinstance(named, NoMatch) else _found(graph, named, (node,), taken)
        elif op == "structured" and isinstance(operator := graph.operator(node), AbstractRecurrence):
            yield _raised(graph, node, operator, taken)
    for loop in unrolled(graph):
        yield _site(graph, loop, taken)


def _site(graph: Graph, loop: Loop, taken: set[str]) -> Site:
    reading = read(graph, loop)
    if isinstance(reading, NoMatch):
        return _listed(graph, loop.nodes, reading.reason, taken)
    return _found(graph, reading, loop.nodes, taken)


def _found(graph: Graph, reading: Reading, nodes: Sequence[Node], taken: set[str]) -> Site:
    refused = _mixed(graph, reading.region) or _entangled(graph, reading.region) or graph.can_splice(reading.region)
    if refused:
        return _listed(graph, nodes, f"{reading.said}; {refused}", taken)
    return _listed(graph, nodes, f"{reading.said}: {READ}", taken, reading.region, reading.form)


def read(graph: Graph, loop: Loop) -> Reading | NoMatch:
    """What the loop computes."""
    rng = torch.Generator().manual_seed(0)
    if not loop.carries:
        return NoMatch("a loop without a state")
    step = step_of(graph, loop, rng)
    if isinstance(step, NoMatch):
        return step
    found = _read(step, rng)
    if isinstance(found, Reading):
        return found
    for other in chain(step.otherwise(), (other for cut in step.cuts() for other in (cut, *cut.otherwise()))):
        again = _read(other, rng)
        if isinstance(again, Reading) and (whole := finished(other, again)) is not None:
            return whole
    return found


def _read(step: Step, rng: torch.Generator) -> Reading | NoMatch:
    if op := step.beyond(step.edge):
        return NoMatch(f"non-linear in its state, or not known to be linear: {op} lies on its way")
    if not _affine(step, rng):
        return NoMatch("non-linear in its state")
    (state, *_) = step.state.values()
    readers: list[Callable[[Step, torch.Generator], Reading | NoMatch]] = [read_gated, read_matrix_state]
    if state.dim() <= 2:
        readers = [read_time_invariant, read_gated, read_matrix_state]
    refusals = []
    for reader in readers:
        try:
            found = reader(step, rng)
        except (RewriteError, RuntimeError, ArithmeticError, IndexError, TypeError, ValueError):
            found = NoMatch(UNPROBED)
        if isinstance(found, Reading):
            return found
        refusals.append(found)
    if state.dim() > 2:
        return refusals[-1]
    first, second = refusals[:2]
    return second if first.reason in (CHANGES, UNPROBED) else first


def _affine(step: Step, rng: torch.Generator) -> bool:
    """F(s + t) - F(s) - F(t) + F(0) = 0 for the states and the results."""
    other = {v: torch.randn(s.shape, generator=rng, dtype=s.dtype) for v, s in step.state.items()}
    total = {v: s + other[v] for v, s in step.state.items()}
    zero = {v: torch.zeros_like(s) for v, s in step.state.items()}
    a, b, both, none = ([*ends, *ys] for ends, ys in (step.run(s, step.edge) for s in (step.state, other, total, zero)))
    return all(close(p + q, r + o) for p, q, r, o in zip(a, b, both, none, strict=True))


def _mixed(graph: Graph, region: Region) -> str:
    """Why it cannot be one operator: it has one type."""
    types = {graph.dtype(p.after[0] if p.after else p.value) for p in (*region.inputs, *region.outputs) if p is not None}
    names = sorted(str(t).removeprefix("torch.") for t in types)
    return f"its sequences, state and results are of types {', '.join(names)}; one type can be raised" if len(types) > 1 else ""


def _entangled(graph: Graph, region: Region) -> str:
    """Why the nodes cannot go: something else needs a value inside."""
    inside = set(region.nodes)
    given = [p.value for p in region.outputs if p is not None]
    for node in region.nodes:
        for value in graph.outputs(node):
            if not any(value is v for v in given) and any(user not in inside for user in graph.users(value)):
                return f"a value inside of it ({graph.name(value)}) is used elsewhere"
    return ""


def _raised(graph: Graph, node: Node, operator: AbstractRecurrence, taken: set[str]) -> Site:
    said = describe(operator) if isinstance(operator, LinearAttention) else type(operator).__name__
    return _listed(graph, (node,), f"{said}: raised to one node before the model was exported", taken, None, operator, True)


def _listed(
    graph: Graph,
    nodes: Sequence[Node],
    reason: str,
    taken: set[str],
    region: Region | None = None,
    form: AbstractRecurrence | None = None,
    stands: bool = False,
) -> Site:
    last = nodes[-1]
    y = graph.outputs(last)[0]
    name = unique(f"{graph.scope(last) or graph.name(y)} (recurrence)", taken)
    x = next((v for v in graph.inputs(nodes[0]) if v is not None), None)
    place = Place(tuple(nodes), x, y)
    return Site(name, name, "recurrence", None, graph.dtype(y), (place,), {}, form if stands else None, reason, region, form)
