"""Reads S' = P S + N, o = scale S'^T q as linear attention or a delta rule: by behaviour, so that every spelling is one.

The state's transition P and shift N are probed; which sequences P, N and o depend on gives them their roles (q: o alone; v: N alone; k and
beta: P and N; a decay: P alone). The assignment is then checked against the operator's own step on random numbers in float64: two maps that
are polynomial in their inputs and agree there are equal with probability one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product

import torch
from torch import Tensor

from rewriter.graph import Port, Region, Value
from rewriter.passes.detect.reading import Reading, arranged, final_port, orders, result_port, sequence_port, state_port, zero
from rewriter.passes.detect.step import Step, close
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.passes.structures.retention import Retention
from rewriter.registry import eager_ops
from rewriter.structure import NoMatch

NEITHER = "a linear state, but no linear attention and no delta rule"
POSITIVE = ("exp", "sigmoid")
WIDTHS = "a linear state, but its sequences have other widths than a delta rule's"


@dataclass(frozen=True)
class _View:
    """How the state's axes mean (batch, heads, key, width)."""

    lone: bool
    heads: int
    key: int
    width: int
    order: tuple[int, ...]  # of the state's axes

    def state(self, value: Tensor) -> Tensor:
        return value.permute(*self.order).reshape(-1 if not self.lone else 1, self.heads, self.key, self.width)


def read_matrix_state(step: Step, rng: torch.Generator) -> Reading | NoMatch:
    """The recurrence as LinearAttention, or why it is none."""
    if len(step.state) != 1 or len(step.ys) != 1:
        return NoMatch(f"{len(step.state)} states and {len(step.ys)} results; one of each can be read")
    (state,) = step.state.values()
    if state.dim() not in (2, 3, 4) or (state.dim() == 2 and step.batched):
        return NoMatch(f"a state of rank {state.dim()}")
    roles = _Roles.of(step, rng)
    refusals = []
    for view in _views(state):
        for reading in _readings(step, view, roles):
            if isinstance(reading, Reading):
                return reading
            refusals.append(reading)
    told = [r for r in refusals if r.reason not in (NEITHER, WIDTHS)]  # of an assignment that fits further
    return [*told, *refusals, NoMatch(NEITHER)][0]


def _views(state: Tensor) -> Iterator[_View]:
    """Both ways round: S as (key, width) and as (width, key)."""
    lone = state.dim() == 2
    heads = state.shape[1] if state.dim() == 4 else 1
    lead = tuple(range(state.dim() - 2))
    a, b = state.dim() - 2, state.dim() - 1
    yield _View(lone, heads, state.shape[a], state.shape[b], (*lead, a, b))
    yield _View(lone, heads, state.shape[b], state.shape[a], (*lead, b, a))


@dataclass(frozen=True)
class _Roles:
    """Which of the step's roots the transition, the shift and the readout depend on."""

    transition: tuple[Value, ...]  # P alone
    both: tuple[Value, ...]
    shift: tuple[Value, ...]  # N alone
    readout: tuple[Value, ...]

    @classmethod
    def of(cls, step: Step, rng: torch.Generator) -> _Roles:
        zero = {v: torch.zeros_like(s) for v, s in step.state.items()}

        def parts(edge: Mapping[Value, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            (full,), (y,) = step.run(step.state, edge)
            (shift,), _ = step.run(zero, edge)
            return full - shift, shift, y

        base = parts(step.edge)
        groups: dict[tuple[bool, bool], list[Value]] = {}
        for root, value in step.edge.items():
            other = parts({**step.edge, root: torch.rand(value.shape, generator=rng, dtype=value.dtype) + 0.1})
            moved = tuple(not close(a, b) for a, b in zip(other, base, strict=True))
            groups.setdefault((moved[0], moved[1]), []).append(root)
        found = (tuple(groups.get(key, ())) for key in ((True, False), (True, True), (False, True), (False, False)))
        return cls(*found)


def _readings(step: Step, view: _View, roles: _Roles) -> Iterator[Reading | NoMatch]:
    if len(roles.readout) > 1:
        yield NoMatch(f"its result is read by {len(roles.readout)} sequences; a query is one")
        return
    if len(roles.transition) > 1:
        yield NoMatch("its transition is of several sequences; a decay is one, and several factors are stacked along an axis of one")
        return
    decay = roles.transition[0] if roles.transition else None
    rates = None if decay is not None else _rates(step, view, (*roles.both, *roles.shift))
    if isinstance(rates, NoMatch):
        yield rates
        return
    if len(roles.both) == 1 and len(roles.shift) == 1:
        yield NoMatch("a delta rule whose beta is no sequence of its own")
    if roles.both:
        written = [(key, value, beta) for key, beta in permutations(roles.both, 2) for value in roles.shift]
    else:
        written = [(key, value, None) for key, value in permutations(roles.shift, 2)]
    for query in roles.readout or (*roles.both, *roles.shift):  # what is read with is what was written with, where nothing else is
        for key, value, beta in written:
            yield from _tries(step, view, {"query": query, "key": key, "value": value, "decay": decay, "beta": beta}, rates)


def _rates(step: Step, view: _View, written: Sequence[Value]) -> Tensor | NoMatch | None:
    """The logarithm of a decay that every step has, (heads,) or (heads*key,), seen where nothing is written; None where it is 1."""
    edge = {root: torch.zeros_like(x) if root in written else x for root, x in step.edge.items()}
    (end,), _ = step.run(step.state, edge)
    (begin,) = step.state.values()
    decay = view.state(end) / view.state(begin)
    if close(decay, torch.ones_like(decay)):
        return None
    for rows in (decay[0, :, :1, :1], decay[0, :, :, :1]):
        if close(rows.expand_as(decay[0])[None].expand_as(decay), decay):
            gone = NoMatch(NEITHER if not bool(rows.any()) else "a fixed decay that is not positive")
            return rows.log().flatten() if bool((rows > 0).all()) else gone
    return NoMatch(NEITHER)


def _tries(step: Step, view: _View, named: Mapping[str, Value | None], rates: Tensor | None) -> Iterator[Reading | NoMatch]:
    """The assignment with every order of the sequences' axes."""
    roots = {name: root for name, root in named.items() if root is not None}
    form = _form(step, view, roots, rates)
    if isinstance(form, NoMatch):
        yield form
        return
    spaces = [orders(step.edge[root].dim(), view.lone) for root in roots.values()]
    for choice in product(*spaces):
        found = _match(step, view, form, roots, dict(zip(roots, choice, strict=True)))
        if found is not None:
            yield found
            return
    yield NoMatch(NEITHER)


def _form(step: Step, view: _View, roots: Mapping[str, Value], rates: Tensor | None) -> LinearAttention | NoMatch:
    """The operator whose widths fit."""
    batch = 1 if view.lone else next(iter(step.state.values())).shape[0]
    sizes = {name: step.edge[root].numel() / batch for name, root in roots.items()}
    factors = sizes["value"] / (view.heads * view.width)
    queries, keys = sizes["query"] / view.key, sizes["key"] / view.key / max(factors, 1)
    width = sizes.get("decay", 0.0 if rates is None else float(rates.numel()))
    decay = {0.0: "", float(view.heads): "head", float(view.heads * view.key): "key"}.get(width, "?")
    whole = [n for n in (factors, queries, keys) if n >= 1 and n == int(n)]
    fits = len(whole) == 3 and view.heads % keys == 0 and (view.heads % queries == 0 or queries % view.heads == 0)
    if not fits or decay == "?" or sizes.get("beta", factors * view.heads) != factors * view.heads:
        return NoMatch(WIDTHS)
    rule = "delta" if "beta" in roots else "plain"
    form = LinearAttention(view.heads, view.key, view.width, int(queries), int(keys), int(factors), rule, decay)
    return form if rates is None else Retention.of(form, rates)


def _match(
    step: Step, view: _View, form: LinearAttention, roots: Mapping[str, Value], order: Mapping[str, Sequence[int]]
) -> Reading | NoMatch | None:
    """The reading where one step of the operator equals the body's; None where it does not."""
    xs = [arranged(step.edge[root], order[name], view.lone) for name, root in roots.items()]
    names = list(roots)
    if "decay" in roots:
        xs[names.index("decay")] = xs[names.index("decay")].log()
    (begin,) = step.state.values()
    (end,), (y,) = step.run(step.state, step.edge)
    (new,), (out,) = form.step(eager_ops(), [view.state(begin)], xs)
    if not close(new, view.state(end)):
        return None
    scale = _scale(out, y)
    form, out = replace(form, scale=scale), out * scale
    heads = form.heads * form.group
    result = result_port(step.y, y, out, (heads, form.width), view.lone)
    if isinstance(result, NoMatch):
        return None
    return _reading(step, view, form, roots, order, result)


def _scale(out: Tensor, y: Tensor) -> float:
    """The factor between two arrangements of the same numbers; 1 where it is so up to rounding."""
    scale = float((y.abs().sum() / out.abs().sum()).item()) if out.abs().sum() > 0 else 1.0
    return 1.0 if math.isclose(scale, 1.0, rel_tol=1e-9) else scale


def _reading(
    step: Step, view: _View, form: LinearAttention, roots: Mapping[str, Value], order: Mapping[str, Sequence[int]], result: Port
) -> Reading | NoMatch:
    ports: list[Port] = []
    for name, root in roots.items():
        log = name == "decay"
        if log:
            node, made = step.maker(root)
            if made == "exp" and root not in step.x:
                (root,), log = [v for v in step.graph.inputs(node) if v is not None], False
            elif made not in POSITIVE:
                return NoMatch("a decay that may be negative; one made by exp or sigmoid is read")
        port = sequence_port(step, root, order[name], view.lone, log)
        if isinstance(port, NoMatch):
            return port
        ports.append(port)
    (carry,) = step.loop.carries
    carried = not zero(step, carry.initial)
    sizes = (form.heads, form.key, form.width)
    if carried:
        ports.append(state_port(carry.initial, view.order, sizes, view.lone))
    shape = list(next(iter(step.state.values())).shape)
    final = final_port(carry.final, view.order, shape, 3, view.lone)
    region = Region(step.loop.nodes, tuple(ports), (result, final))
    dtype = step.graph.dtype(carry.initial)
    form = replace(form, carried=carried)
    return Reading(form if dtype is None else form.to(dtype), region, describe(form))


def describe(form: LinearAttention) -> str:
    """For the report."""
    kind = {"delta": "delta rule", "plain": "linear attention"}[form.rule]
    kind = f"product of {form.factors} Householder factors" if form.factors > 1 else kind
    gate = {"": "", "head": "gated ", "key": "gated (per key entry) "}[form.decay]
    gate = "fixed-decay " if isinstance(form, Retention) else gate
    return f"{gate}{kind}, {form.heads} heads of {form.key} x {form.width}"
