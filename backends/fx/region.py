"""A map takes the place of a region: layout changes at its ports, one `structured::map` node, and one getitem for each output."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from rewriter.backends.fx import edit
from rewriter.backends.fx.custom_op import MAP
from rewriter.graph import Port, Region
from rewriter.order import in_order

aten = torch.ops.aten


def refusal(region: Region) -> str:
    """ "" where the map's node has a place after all inputs and before all readers of the outputs."""
    order = {node: i for i, node in enumerate(region.nodes[-1].graph.nodes)}
    if any(v not in order for v in [*region.sources, *(p.value for p in region.outputs if p is not None)]):
        return "its inputs and outputs lie in different bodies"
    if _last_input(region, order) >= min((order[u] for u in readers(region)), default=len(order)):
        return "some of its results are used before all of its inputs are there"
    return ""


def readers(region: Region) -> list[Node]:
    """What uses the outputs from outside."""
    inside = set(region.nodes)
    return [u for p in region.outputs if p is not None for u in p.value.users if u not in inside]


def _last_input(region: Region, order: dict[Node, int]) -> int:
    return max(order[v] for v in region.sources)


def stand_in(
    region: Region, current: Callable[[Node], Node], mode: FakeTensorMode, factors: Sequence[Node], spec: str, site: str
) -> list[tuple[Node, Node]]:
    """(original output, its stand-in) for each output that is read."""
    like = region.nodes[-1]
    graph = like.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    after = max([*map(current, region.sources), *factors], key=order.__getitem__)
    while after.next.op == "placeholder":
        after = after.next

    def call(target: Any, *args: Any, **kwargs: Any) -> Node:
        return edit.call(graph, mode, target, *args, like=like, **kwargs)

    with graph.inserting_before(after.next):
        taken = [_taken(call, _hoisted(call, p, current), p) for p in region.inputs]
        node = call(MAP, taken, list(factors), spec, site)
        pairs = []
        for i, port in enumerate(region.outputs):
            if port is not None:
                given = _given(call, call(operator.getitem, node, i), port)
                pairs.append((port.value, given if port.after is None else _finished(call, given, port, port.after, current)))
    return pairs


def _hoisted(call: Callable[..., Node], port: Port, current: Callable[[Node], Node]) -> Node:
    """What one step computes elementwise, or row by row, computed for all steps at once."""
    whole = {inner: current(outer) for inner, outer in port.hoist.items()}
    if port.rows:
        value = _by_row(call, port.value, whole, current)
    else:
        value = _replayed(call, port.value, whole, current) if whole else current(port.value)
    value = call(aten.logical_not.default, value) if port.negated else value
    return call(aten.log.default, value) if port.log else value


def _finished(call: Callable[..., Node], given: Node, port: Port, after: tuple[Node, Node], current: Callable[[Node], Node]) -> Node:
    """What a step does to its result afterwards."""
    whole = {inner: current(outer) for inner, outer in port.hoist.items()}
    return _by_row(call, after[1], {after[0]: given, **whole}, current)


def _by_row(call: Callable[..., Node], value: Node, whole: Mapping[Node, Node], current: Callable[[Node], Node]) -> Node:
    """A value from sequences whose first two axes are one meanwhile."""
    lead = next(iter(whole.values()))
    rows = {inner: call(aten.flatten.using_ints, outer, 0, 1) for inner, outer in whole.items()}
    found = _replayed(call, value, rows, current)
    return call(aten.unflatten.int, found, 0, [call(aten.sym_size.int, lead, 0), call(aten.sym_size.int, lead, 1)])


def _replayed(call: Callable[..., Node], value: Node, given: Mapping[Node, Node], current: Callable[[Node], Node]) -> Node:
    known = dict(given)
    for node in in_order(value, lambda n: n.all_input_nodes, known):
        known[node] = current(node) if node.op in ("placeholder", "get_attr") else _whole(call, node, known)
    return known[value]


def _whole(call: Callable[..., Node], value: Node, known: Mapping[Node, Node]) -> Node:
    """One value of a step for all steps, from what its operands are for all steps."""
    args, kwargs = torch.fx.node.map_arg((value.args, value.kwargs), known.__getitem__)
    return call(value.target, *args, **kwargs)


def _taken(call: Callable[..., Node], value: Node, port: Port) -> Node:
    layout = port.layout
    if layout.before:
        value = call(aten.permute.default, value, list(layout.before))
    if layout.join == 0:
        value = call(aten.unsqueeze.default, value, -1)
    if layout.join > 1:
        value = call(aten.flatten.using_ints, value, -layout.join, -1)
    if layout.spread:
        value = call(aten.unflatten.int, value, -1, list(layout.spread))
    if layout.after:
        value = call(aten.permute.default, value, list(layout.after))
    return call(aten.unsqueeze.default, value, 0) if port.lone else value


def _given(call: Callable[..., Node], value: Node, port: Port) -> Node:
    layout = port.layout
    if port.lone:
        value = call(aten.squeeze.dim, value, 0)
    if layout.before:
        value = call(aten.permute.default, value, list(layout.before))
    if layout.join == 0:
        value = call(aten.squeeze.dim, value, -1)
    if layout.join > 1:
        value = call(aten.flatten.using_ints, value, -layout.join, -1)
    if layout.spread:
        value = call(aten.unflatten.int, value, -1, list(layout.spread))
    return call(aten.permute.default, value, list(layout.after)) if layout.after else value
