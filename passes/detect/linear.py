"""Linear sites: one for each stored matrix, with every place that multiplies by it.

A weight used at several places (tied layers) is one site, rewritten once; a weight that something else needs too (an embedding table) is listed
and kept, because the dense matrix would have to stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from rewriter.graph import Graph, Site, WeightRef
from rewriter.passes.detect.spellings import Spelling, read, with_following_bias

_OPAQUE = re.compile(r"(val_\d+|onnx::\w+_\d+|_?\d+|t_\d+|\w*[Tt]ranspose\w*|const\w*)(\D?_?\d*)$")
_SUFFIX = re.compile(r"\.(weight|kernel)$|[._](weight|kernel)(_transposed|\.T)?$")


def detect(graph: Graph) -> Iterator[Site]:
    """Every dense linear, rewritable or not."""
    groups: dict[object, list[Spelling]] = {}
    for node in graph.nodes():
        spelling = read(graph, node)
        if spelling is not None:
            groups.setdefault(_key(graph, spelling), []).append(with_following_bias(graph, spelling))
    taken: set[str] = set()
    for group in groups.values():
        for same in _split(graph, group):
            yield _site(graph, same, taken)


def _key(graph: Graph, spelling: Spelling) -> object:
    users = frozenset(id(node) for node, _ in graph.storage_users(spelling.weight))
    return users, spelling.axes, spelling.shape, spelling.scale


def _split(graph: Graph, group: list[Spelling]) -> list[list[Spelling]]:
    """Spellings on one storage that read the same numbers belong together; slices of a packed weight do not."""
    sets: list[list[Spelling]] = []
    for spelling in group:
        for members in sets:
            if _equal(graph, members[0], spelling):
                members.append(spelling)
                break
        else:
            sets.append([spelling])
    return sets


def _equal(graph: Graph, a: Spelling, b: Spelling) -> bool:
    if a.weight is b.weight:
        return True
    left, right = graph.const(a.weight), graph.const(b.weight)
    assert left is not None and right is not None
    return (left.data_ptr() == right.data_ptr() and left.stride() == right.stride()) or torch.equal(left, right)


def _site(graph: Graph, group: list[Spelling], taken: set[str]) -> Site:
    first = group[0]
    nodes = {id(s.place.nodes[0]) for s in group}
    others = [(node, operand) for node, operand in graph.storage_users(first.weight) if id(node) not in nodes]
    shared = tuple(sorted({graph.scope(node) or graph.op(node) for node, _ in others}))
    linear = all(read(graph, node) is not None for node, _ in others)
    name = unique(site_name(graph, first), taken)
    stored = graph.stored_name(first.weight)
    ref = WeightRef(stored, first.weight, first.axes, first.scale, shared)
    reason = first.reason or next((why for s in group if (why := graph.can_splice(s.place))), "")
    if others and not linear:
        reason = reason or f"its weight is tied to {', '.join(shared)}: the dense matrix has to stay, a second form would only add to it"
    site = Site(name, name, "linear", first.shape, graph.dtype(first.weight), tuple(s.place for s in group), {"weight": ref}, None, reason)
    return site


def site_name(graph: Graph, spelling: Spelling) -> str:
    """The module path where one is known, else the parameter's name, else the result's."""
    stored = graph.stored_name(spelling.weight)
    if not _OPAQUE.match(stored):
        return _SUFFIX.sub("", stored)
    return graph.scope(spelling.place.nodes[0]) or graph.name(spelling.place.y)


def unique(name: str, taken: set[str]) -> str:
    """The name, with [2], [3] … behind where it is taken; marks it as taken."""
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}[{number}]"
    taken.add(candidate)
    return candidate


