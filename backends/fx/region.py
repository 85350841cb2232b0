"""A map takes the place of a region: layout changes at its ports, one `structured::map` node, and one getitem for each output."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from rewriter.backends.fx import edit
from rewriter.backends.fx.custom_op import MAP
from rewriter.graph import Port, Region

aten = torch.ops.aten


def refusal(region: Region) -> str:
    """ "" where the map's node has a place after all inputs and before all readers of the outputs."""
    order = {node: i for i, node in enumerate(region.nodes[-1].graph.nodes)}
    if any(p is not None and p.value not in order for p in (*region.inputs, *region.outputs)):
        return "its inputs and outputs lie in different bodies"
    if _last_input(region, order) >= min((order[u] for u in readers(region)), default=len(order)):
        return "some of its results are used before all of its inputs are there"
    return ""


def readers(region: Region) -> list[Node]:
    """What uses the outputs from outside."""
    inside = set(region.nodes)
    return [u for p in region.outputs if p is not None for u in p.value.users if u not in inside]


def _last_input(region: Region, order: dict[Node, int]) -> int:
    return max(order[p.value] for p in region.inputs)


def stand_in(
    region: Region, current: Callable[[Node], Node], mode: FakeTensorMode, factors: Sequence[Node], spec: str, site: str
) -> list[tuple[Node, Node]]:
    """(original output, its stand-in) for each output that is read."""
    like = region.nodes[-1]
    graph = like.graph
    values = [current(p.value) for p in region.inputs]
    order = {node: i for i, node in enumerate(graph.nodes)}
    after = max([*values, *factors], key=order.__getitem__)
    while after.next.op == "placeholder":
        after = after.next

    def call(target: Any, *args: Any) -> Node:
        return edit.call(graph, mode, target, *args, like=like)

    with graph.inserting_before(after.next):
        taken = [_taken(call, value, port) for value, port in zip(values, region.inputs, strict=True)]
        node = call(MAP, taken, list(factors), spec, site)
        pairs = []
        for i, port in enumerate(region.outputs):
            if port is not None:
                pairs.append((port.value, _given(call, call(operator.getitem, node, i), port)))
    return pairs


def _taken(call: Callable[..., Node], value: Node, port: Port) -> Node:
    layout = port.layout
    if layout.before:
        value = call(aten.permute.default, value, list(layout.before))
    if layout.join > 1:
        value = call(aten.flatten.using_ints, value, -layout.join, -1)
    return call(aten.unsqueeze.default, value, 0) if port.lone else value


def _given(call: Callable[..., Node], value: Node, port: Port) -> Node:
    layout = port.layout
    if port.lone:
        value = call(aten.squeeze.dim, value, 0)
    if layout.spread:
        value = call(aten.unflatten.int, value, -1, list(layout.spread))
    return call(aten.permute.default, value, list(layout.after)) if layout.after else value
