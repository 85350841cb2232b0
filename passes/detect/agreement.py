"""Whether a region computes what a map says: both on the same random numbers, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, count

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.graph import Graph, Layout, Port, Region, Value
from rewriter.passes.detect.axes import Atom, Axes, Size
from rewriter.passes.detect.magnitudes import sized, sources
from rewriter.passes.structures.attention import Attention
from rewriter.registry import eager_ops
from rewriter.tolerances import EQUAL


class Sizes:
    """A number for every name, another for each; names may be products."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def of(self, size: Size) -> int:
        if isinstance(size, int):
            return size
        parts = size.replace(" ", "").split("*")
        if len(parts) > 1 and all(p.isdigit() or p.isidentifier() for p in parts):
            return math.prod(int(p) if p.isdigit() else self.of(p) for p in parts)
        if size not in self.known:
            self.known[size] = next(n for n in chain((2, 5, 7, 3), count(11)) if n not in self.known.values())
        return self.known[size]

    def shape(self, axes: Axes) -> list[int]:
        return [math.prod(self.of(a.size) for a in group) for group in axes]


def disagreement(graph: Graph, operator: Attention, region: Region, axes: Sequence[Axes], keys: Sequence[Atom], whole: bool) -> str:
    """ "" where they agree. `axes`: those of the inputs; `keys`: what a mask hides; `whole`: one operation, which may not be to be had in
    float64, or not at all."""
    sizes, given = Sizes(), dict[Value, Tensor]()
    for name, port, own in zip(operator.inputs(), region.inputs, axes, strict=True):
        if port.value not in given:
            given[port.value] = _example(graph, operator, name, port, sizes, own, keys)
    wanted = region.outputs[0]
    assert wanted is not None
    others = sources(graph, wanted.value, list(given))
    if others is None:
        return "it depends on more than its queries, keys, values and masks"
    zeros = {v: sized(graph, v, sizes.known, 2) for v in others}
    inputs = [placed(given[p.value], p) for p in region.inputs]
    (ours,) = operator.spelled(operator.forms()[0], eager_ops(), *inputs)
    try:
        (theirs,) = graph.compute([wanted.value], {**given, **zeros})
    except RewriteError as problem:
        return "" if whole else f"what it computes could not be checked: {problem}"
    rtol, atol = EQUAL[torch.float32 if whole else torch.float64]
    ours = arranged(ours.squeeze(0) if wanted.lone else ours, wanted.layout)
    same = ours.shape == theirs.shape and torch.allclose(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol, equal_nan=True)
    return "" if same else "it looks like attention and computes something else"


def _example(graph: Graph, operator: Attention, name: str, port: Port, sizes: Sizes, axes: Axes, keys: Sequence[Atom]) -> Tensor:
    """Random numbers, or what it is where it takes no input; a boolean mask hides a whole row."""
    behind = sources(graph, port.value, ())
    if behind is not None:
        (stored,) = graph.compute([port.value], {v: sized(graph, v, sizes.known, 2) for v in behind})
        return stored.double() if stored.is_floating_point() else stored
    rng = torch.Generator().manual_seed(len(sizes.known) + len(name))
    found = torch.randn(sizes.shape(axes), generator=rng, dtype=torch.float64)
    row = next((i for i, group in enumerate(axes) if group and not set(group) & set(keys)), None)
    if name in operator.booleans():
        found = found > -0.5
        if row is not None:
            found.select(row, 0).fill_(port.negated)
    return found


def arranged(x: Tensor, how: Layout) -> Tensor:
    """The four steps of a layout."""
    x = x.permute(how.before) if how.before else x
    x = x.flatten(-how.join) if how.join > 1 else x
    x = x.unflatten(-1, how.spread) if how.spread else x
    return x.permute(how.after) if how.after else x


def placed(x: Tensor, port: Port) -> Tensor:
    """A value as its port hands it to the map."""
    x = arranged(~x if port.negated else x, port.layout)
    return x.unsqueeze(0) if port.lone else x
