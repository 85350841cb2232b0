"""Caches whose sizes a rewrite changed: a decoder's inputs and outputs keep their names and their order, the sizes of its cache may become
others.

What is in a cache then means something else, so two such models are compared on whole sequences, from an empty cache on: for a causal
model that is the error of decoding step by step, too. What they hand on is not compared, what they make of it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.inputs import InputSpec

Feeds = Mapping[str, Tensor]


@dataclass(frozen=True)
class Change:
    """One input's dimensions in one model and in the other."""

    before: InputSpec
    after: InputSpec

    def __str__(self) -> str:
        before, after = (f"[{','.join(map(str, spec.dims))}]" for spec in (self.before, self.after))
        return f"{self.before.name} {before} is {after}"

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """(axis, size before, size after) where they differ."""
        pairs = enumerate(zip(self.before.dims, self.after.dims, strict=True))
        return [(i, int(a), int(b)) for i, (a, b) in pairs if a != b]


def changes(before: Sequence[InputSpec], after: Sequence[InputSpec]) -> list[Change]:
    """The float inputs whose fixed sizes differ."""
    named = {spec.name: spec for spec in after}
    return [Change(a, named[a.name]) for a in before if a.name in named and _resized(a, named[a.name])]


def _resized(a: InputSpec, b: InputSpec) -> bool:
    if a.dtype != b.dtype or len(a.dims) != len(b.dims) or not a.torch_dtype.is_floating_point:
        return False
    return any(isinstance(x, int) and isinstance(y, int) and x != y for x, y in zip(a.dims, b.dims, strict=True))


def fitted(feeds: Feeds, specs: Sequence[InputSpec], drawn: bool = False) -> Feeds:
    """The same for a model of these inputs: empty caches of its own sizes; `drawn`: full ones as long as they were, of standard normals.

    RewriteError where a cache of other sizes holds something, which would mean something else there."""
    if not specs:
        return feeds
    given = {spec.name: feeds[spec.name] for spec in specs if spec.name in feeds}
    shapes = {s.name: _shape(given[s.name], s) for s in specs if s.name in given and len(s.dims) == given[s.name].dim()}
    other = {name: shape for name, shape in shapes.items() if list(given[name].shape) != shape}
    for name in other:
        if given[name].numel() and not drawn:
            raise RewriteError(
                f"input '{name}' holds a cache of {given[name].shape[2]} tokens, and this model has other sizes, where what is in it "
                "would mean something else; give whole sequences, the cache empty"
            )
    rng = torch.Generator().manual_seed(0)
    return {**feeds, **{name: torch.randn(shape, generator=rng).to(given[name].dtype) for name, shape in other.items()}}


def _shape(x: Tensor, spec: InputSpec) -> list[int]:
    return [
        d if isinstance(d, int) and x.dim() == 4 and i in (1, 3) else n for i, (n, d) in enumerate(zip(x.shape, spec.dims, strict=True))
    ]


def fitting(run: Callable[[Feeds], Mapping[str, Tensor]], changed: Sequence[Change]) -> Callable[[Feeds], Mapping[str, Tensor]]:
    """The model that has the sizes after, on feeds of those before."""
    specs = [change.after for change in changed]
    return (lambda feeds: run(fitted(feeds, specs))) if changed else run


def follows(dense: Tensor, other: Tensor, changed: Sequence[Change]) -> bool:
    """Whether an output changed as some cache that goes in did."""
    axes = [[i for i, *_ in change.sizes] for change in changed]
    return dense.dim() == other.dim() and any(
        all((dense.shape[i], other.shape[i]) == (a, b) for i, a, b in change.sizes)
        and all(dense.shape[i] == other.shape[i] for i in range(dense.dim()) if i not in own)
        for change, own in zip(changed, axes, strict=True)
        if len(change.before.dims) == dense.dim()
    )


def whole(specs: Sequence[InputSpec], sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of samples that begin with an empty cache and are as long as cache and call were together."""
    found = dict(sizes)
    sums = {dim for spec in specs for dim in spec.dims if isinstance(dim, str) and "+" in dim}
    for past in {spec.dims[2] for spec in specs if len(spec.dims) == 4 and spec.torch_dtype.is_floating_point}:
        for rest in [word for dim in sums if past in (words := dim.split("+")) for word in words if word != past]:
            found[rest] = sizes[rest] + sizes.get(str(past), 0)
            found[str(past)] = 0
    return found


def said(changed: Sequence[Change]) -> str:
    """One line for the report, "" where nothing changed."""
    if not changed:
        return ""
    before, after = (sum(_nbytes(spec) for spec in specs) for specs in ([c.before for c in changed], [c.after for c in changed]))
    sizes = f"{before:,} bytes a token are {after:,} now"
    return f"the cache has other sizes, {sizes}; its outputs are not compared: {'; '.join(map(str, changed))}"


def _nbytes(spec: InputSpec) -> int:
    """Of one token of one sequence."""
    count = 1
    for dim in spec.dims:
        count *= dim if isinstance(dim, int) else 1
    return count * spec.torch_dtype.itemsize
