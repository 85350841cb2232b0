"""`merge-lora`: W' = W + scale * U D, formed in double precision and rounded once to the type that W is stored in.

The branch goes, the linear stays where it was and under its name, so that later passes see it as any other. Exact but for that rounding,
which is said as a share of what the adapter changes: stored in few bits, a weight may lose much of a small change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.fit import part, site_cost
from rewriter.graph import Graph, Site, load_matrix, put_matrix
from rewriter.rule import AbstractPass, Context, Decision


@dataclass(frozen=True)
class Change:
    """What a branch makes of its base's weight."""

    weight: Tensor  # (m, n), as it is stored
    delta: Tensor  # (m, n) float64

    @classmethod
    def of(cls, graph: Graph, site: Site) -> Change:
        assert site.shape is not None
        m, n = site.shape
        down, up = (load_matrix(graph, site.weights[key], shape).double() for key, shape in (("down", (-1, n)), ("up", (m, -1))))
        return cls(load_matrix(graph, site.weights["base"], site.shape), up @ down)

    @property
    def merged(self) -> Tensor:
        return (self.weight.double() + self.delta).to(self.weight.dtype)

    @property
    def lost(self) -> float:
        """|what rounding took| / |delta|."""
        return float((self.merged.double() - self.weight.double() - self.delta).norm() / self.delta.norm())

    @property
    def share(self) -> float:
        """|delta| / |W|."""
        return float(self.delta.norm() / self.weight.double().norm().clamp_min(torch.finfo(torch.float64).tiny))


@dataclass(frozen=True)
class MergeLora(AbstractPass):
    """Merges every adapter branch that can go into its base's weight."""

    name: ClassVar[str] = "merge-lora"
    summary: ClassVar[str] = "adapter branches go into the weights that they stand beside; exact but for rounding, which is said"

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        """Of several branches beside one linear the outermost first: what it leaves is what the next one was added to."""
        adapters = [s for s in reversed(context.selected) if s.kind == "adapter"]
        decisions = [merged(graph, site) for site in adapters]
        yield from decisions
        if not any(d.rewritten for d in decisions) and any(not s.reason for s in adapters):
            raise RewriteError(f"merge-lora changes nothing: {decisions[0].site.name}: {decisions[0].reason}")
        yield from factors_gone(graph, context, [d.site for d in decisions if d.rewritten])


def merged(graph: Graph, site: Site) -> Decision:
    """The adapter in its base's weight, in place; kept where it cannot be."""
    before = site_cost(site)
    if site.reason or site.region is None:
        return Decision(site, site.reason, before, before)
    change = Change.of(graph, site)
    if not change.delta.any():
        return Decision(site, "its factors' product is zero: there is nothing to merge", before, before)
    if change.merged.equal(change.weight):
        kind = str(change.weight.dtype).removeprefix("torch.")
        return Decision(site, f"rounded to {kind} the weight would stay as it is: the branch is kept", before, before)
    put_matrix(graph, site.weights["base"], change.merged)
    (place,), (_, rest, low) = site.places, site.region.inputs
    if "bias" in site.weights:  # what is left of the branch
        bias = site.weights["bias"]
        graph.put(bias.value, load_matrix(graph, bias, (1, -1))[0])
        graph.skip(low.value, bias.value)
    else:
        graph.skip(place.y, rest.value)
    said = f"merged into its base: |UD| = {change.share:.2%} of |W|, of which rounding took {change.lost:.1e}"
    return part(site, said, site.name.removesuffix(" (adapter)"), "merged", final=True)


def factors_gone(graph: Graph, context: Context, adapters: Sequence[Site]) -> Iterator[Decision]:
    """The own sites of merged adapters' factors, of which nothing is left."""
    owners = {id(a.weights[key].value): a.name for a in adapters for key in ("down", "up")}
    for site in context.selected:
        owner = owners.get(id(site.weights["weight"].value)) if site.kind == "linear" else None
        if owner is not None and len(site.places) == 1:
            yield part(site, f"a factor of {owner}", owner, "merged", final=True)
