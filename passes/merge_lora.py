"""`merge-lora`: W' = W + scale * U D, formed in double precision and rounded once to the type that W is stored in.

The branch goes, the linear stays where it was and under its name, so that later passes see it as any other. Exact but for that rounding,
which is said as a share of what the adapter changes: stored in few bits, a weight may lose much of a small change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.fit import keep, part
from rewriter.graph import Graph, Site, Value, WeightRef, load_branch, load_matrix, put_matrix
from rewriter.passes.structures.low_rank import LowRank
from rewriter.rule import AbstractPass, Context, Decision


@dataclass(frozen=True)
class Change:
    """What a branch makes of its base's weight."""

    weight: Tensor  # (m, n), as it is stored
    delta: Tensor  # (m, n) float64

    @classmethod
    def of(cls, graph: Graph, site: Site, branch: tuple[Tensor, Tensor]) -> Change:
        """By (D, U)."""
        assert site.shape is not None
        down, up = branch
        return cls(load_matrix(graph, site.weights["base"], site.shape), up.double() @ down.double())

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


@dataclass
class Base:
    """A weight as it was given, and what goes into it: the sum is rounded once."""

    ref: WeightRef
    weight: Tensor  # (m, n)
    branches: dict[str, tuple[Tensor, Tensor]]  # by site: (D, U)

    def put(self, graph: Graph, site: str, down: Tensor, up: Tensor) -> None:
        """Instead of what the site had."""
        self.branches[site] = down, up
        total = sum((up.double() @ down.double() for down, up in self.branches.values()), self.weight.double())
        put_matrix(graph, self.ref, total.to(self.weight.dtype))

    def choose(self, site: str, whole: tuple[Tensor, Tensor], reduced: tuple[Tensor, Tensor], graph: Graph, exact: bool) -> None:
        self.put(graph, site, *(whole if exact else reduced))


Bases = dict[int, Base]  # by the weight


@dataclass(frozen=True)
class MergeLora(AbstractPass):
    """Merges every adapter branch that can go into its base's weight."""

    name: ClassVar[str] = "merge-lora"
    summary: ClassVar[str] = "adapter branches go into the weights that they stand beside; exact but for rounding, which is said"

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        """Of several branches beside one linear the outermost first: what it leaves is what the next one was added to."""
        adapters = [s for s in reversed(context.selected) if s.kind == "adapter"]
        bases: Bases = {}
        decisions = [merged(graph, context, site, bases) for site in adapters]
        yield from decisions
        if not any(d.rewritten for d in decisions) and any(not s.reason for s in adapters):
            raise RewriteError(f"merge-lora changes nothing: {decisions[0].site.name}: {decisions[0].reason}")
        yield from factors_gone(context, [d.site for d in decisions if d.part_of])


def merged(graph: Graph, context: Context, site: Site, bases: Bases) -> Decision:
    """The adapter in its base's weight, in place, at the rank that an earlier pass left it; as it was left where it cannot be."""
    earlier = context.decisions.get(site.id) or keep(site, "")
    if earlier.part_of:
        return earlier
    branch = branch_of(graph, site, earlier)
    rewritten = [d.site for d in context.decisions.values() if d.operator is not None and d.site.kind == "linear"]
    if any(_held(other) is site.weights["base"].value for other in rewritten):
        return stays(earlier, "its base was rewritten by an earlier pass: name merge-lora ahead of it")
    if site.reason or site.region is None or isinstance(branch, str):
        return stays(earlier, branch if isinstance(branch, str) and not site.reason else site.reason)
    change = Change.of(graph, site, branch)
    if not change.delta.any():
        return stays(earlier, "its factors' product is zero: there is nothing to merge")
    if change.merged.equal(change.weight):
        kind = str(change.weight.dtype).removeprefix("torch.")
        return stays(earlier, f"rounded to {kind} the weight would stay as it is: the branch is kept")
    whole, ref = load_branch(graph, site), site.weights["base"]
    if earlier.operator is not None:
        graph.restore(site)
    base = bases.setdefault(id(ref.value), Base(ref, change.weight, {}))
    base.put(graph, site.id, *branch)
    (place,), (_, rest, low) = site.places, site.region.inputs
    if "bias" in site.weights:  # what is left of the branch
        bias = site.weights["bias"]
        graph.put(bias.value, load_matrix(graph, bias, (1, -1))[0])
        graph.skip(low.value, bias.value)
    else:
        graph.skip(place.y, rest.value)
    said = f"merged into its base: |UD| = {change.share:.2%} of |W|, of which rounding took {change.lost:.1e}"
    made = part(site, said, site.name.partition(" (adapter)")[0], "merged", final=True)
    if earlier.operator is None:
        return made
    undo = None if earlier.exact else partial(base.choose, site.id, whole, branch)
    reduced = replace(made, structure=f"{earlier.structure}, merged", before=earlier.before, exact=earlier.exact, error=earlier.error)
    return replace(reduced, reason=f"{earlier.reason}; {said}", undo=undo)


def _held(site: Site) -> Value | None:
    """What a linear multiplies by."""
    return site.weights["weight"].value if site.weights else None


def branch_of(graph: Graph, site: Site, earlier: Decision) -> tuple[Tensor, Tensor] | str:
    """(D, U) of an adapter as an earlier pass left it, or why it cannot be merged."""
    if site.region is None:
        return site.reason
    if earlier.operator is None:
        return load_branch(graph, site)
    if not isinstance(earlier.operator, LowRank):
        return f"a branch in {earlier.structure} is not merged"
    return earlier.operator.down.T, earlier.operator.up.T


def stays(earlier: Decision, reason: str) -> Decision:
    """An adapter as an earlier pass left it."""
    return replace(earlier, reason=f"{earlier.reason}; {reason}" if earlier.rewritten else reason)


def factors_gone(context: Context, adapters: Sequence[Site], final: bool = True) -> Iterator[Decision]:
    """The own sites of merged adapters' factors, of which nothing is left."""
    owners = {id(a.weights[key].value): a.name for a in adapters for key in ("down", "up")}
    for site in context.selected:
        owner = owners.get(id(site.weights["weight"].value)) if site.kind == "linear" else None
        earlier = context.decisions.get(site.id)
        if owner is not None and len(site.places) == 1 and not (earlier is not None and earlier.part_of):
            yield part(site, f"a factor of {owner}", owner, "merged", final=final)
