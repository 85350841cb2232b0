"""Linear sites: one for each stored matrix, with every place that multiplies by it.

A weight used at several places (tied layers) is one site, rewritten once; a weight that something else needs too (an embedding table, a
place that reads it transposed) is listed with that as its reason, because the dense matrix would have to stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from rewriter.graph import Graph, Site, Value, WeightRef
from rewriter.passes.detect.spellings import Spelling, read, with_following_bias

_OPAQUE = re.compile(r"(val_\d+|onnx::\w+_\d+|_?\d+|t_\d+|\w*[Tt]ranspose\w*|const\w*)(\D?_?\d*)$")
_SUFFIX = re.compile(r"(\.parametrizations)?[._](weight|kernel)(_transposed|\.T|_[gv]|(\.original\d*)?)$")


def detect(graph: Graph) -> Iterator[Site]:
    """Every dense linear, rewritable or not."""
    groups: dict[object, list[Spelling]] = {}
    for node in graph.nodes():
        spelling = read(graph, node)
        if spelling is not None:
            groups.setdefault(_users(graph, spelling), []).append(with_following_bias(graph, spelling))
    taken: set[str] = set()
    for group in groups.values():
        sites = _split(graph, group)
        names = [unique(site_name(graph, same[0]), taken) for same in sites]
        repeats = {id(node) for spelling in group for node in spelling.through}
        for name, same in zip(names, sites, strict=True):
            crossing = [other for other, rest in zip(names, sites, strict=True) if rest is not same and _cross(graph, same[0], rest[0])]
            yield _site(graph, name, same, crossing, repeats)


def _users(graph: Graph, spelling: Spelling) -> object:
    """The same for everything that reads one stored tensor."""
    return frozenset(id(node) for node, _ in graph.storage_users(spelling.weight))


def _split(graph: Graph, group: list[Spelling]) -> list[list[Spelling]]:
    """Spellings on one storage that read the same matrix belong together; slices of a packed weight do not."""
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
    if (a.shape, a.scale) != (b.shape, b.scale):
        return False
    if a.axes == b.axes and alike(graph, a.weight, b.weight):
        return True
    left, right = _matrix(graph, a), _matrix(graph, b)
    if _address(left) == _address(right):
        return _start(left) == _start(right) and left.shape == right.shape
    return torch.equal(left, right)


def alike(graph: Graph, a: Value, b: Value) -> bool:
    """Computed by equal steps from one value: equal, without a look at the numbers."""
    seen, stack = set[tuple[Value, Value]](), [(a, b)]
    while stack:
        pair = stack.pop()
        if pair[0] is pair[1] or pair in seen:
            continue
        seen.add(pair)
        first, second = (graph.producer(v) for v in pair)
        if first is None or second is None or graph.op(first) != graph.op(second) or graph.attributes(first) != graph.attributes(second):
            return False
        left, right = graph.inputs(first), graph.inputs(second)
        if len(left) != len(right) or len(graph.outputs(first)) > 1:
            return False
        operands = [(p, q) for p, q in zip(left, right, strict=True) if p is not q]
        if any(p is None or q is None for p, q in operands):
            return False
        stack += [(p, q) for p, q in operands if p is not None and q is not None]
    return True


def _cross(graph: Graph, a: Spelling, b: Spelling) -> bool:
    """Whether two different matrices hold numbers of the stored tensor in common, as W and its transpose do."""
    if a.weight is b.weight:
        return True
    left, right = graph.const(a.weight), graph.const(b.weight)
    assert left is not None and right is not None
    if _address(left) != _address(right):
        return False
    gap = abs(_start(left)[0] - _start(right)[0])
    first = left if _start(left) < _start(right) else right
    return gap == 0 or (left.is_contiguous() and right.is_contiguous() and gap < first.numel())


def _matrix(graph: Graph, spelling: Spelling) -> torch.Tensor:
    """(m, n), or the stack of matrices that a batched weight is; a view of what is stored where that goes."""
    tensor = graph.const(spelling.weight)
    assert tensor is not None
    tensor = tensor.permute(spelling.axes) if spelling.axes else tensor
    m, n = spelling.shape
    return tensor.reshape(m, n) if tensor.numel() == m * n else tensor


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _start(tensor: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    return int(tensor.storage_offset()), tensor.stride()


def _site(graph: Graph, name: str, group: list[Spelling], crossing: list[str], repeats: set[int]) -> Site:
    first = group[0]
    nodes = {id(s.place.nodes[0]) for s in group} | repeats
    others = [node for node, _ in graph.storage_users(first.weight) if id(node) not in nodes]
    shared = tuple(sorted({graph.scope(node) or graph.op(node) for node in others}))
    reason = next((s.reason for s in group if s.reason), "") or next((why for s in group if (why := graph.can_splice(s.place))), "")
    stays = not reason and not crossing and any(read(graph, node) is None for node in others)
    if any(read(graph, node) is None for node in others):
        reason = reason or f"its weight is tied to {', '.join(shared)}: the dense matrix has to stay, a second form would only add to it"
    if crossing:
        reason = reason or f"{', '.join(crossing)} reads the same numbers in another way: the dense matrix has to stay for it"
    ref = WeightRef(graph.stored_name(first.weight), first.weight, first.axes, first.scale, shared)
    places, weights = tuple(s.place for s in group), {"weight": ref}
    return Site(name, name, "linear", first.shape, graph.dtype(first.weight), places, weights, reason=reason, stays=stays)


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
