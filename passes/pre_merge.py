"""`pre-merge`: which factors to multiply ahead of time, decided by measurement on the target at the asked token counts.

Chains of linears with nothing between them (an imported W = U V) are one product: each contiguous grouping of the factors is a candidate,
and the fastest wins. A site that an earlier pass factored and whose dense form is faster everywhere gets its ORIGINAL weight back: a fit is
never merged into a dense-sized matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.algebra import Compose, Dense
from rewriter.cost import Cost
from rewriter.fit import after_cost, site_cost
from rewriter.graph import PLAIN, Graph, Site, load_weight
from rewriter.operator import AbstractMatrix
from rewriter.rule import AbstractPass, Context, Decision, against_dense


@dataclass(frozen=True)
class PreMerge(AbstractPass):
    """Plans products of factors: chains of linears merge where that is faster; where speed is the objective slow sites go back to dense."""

    name: ClassVar[str] = "pre-merge"
    summary: ClassVar[str] = "merges chains of linears where that is faster; with objective ms undoes slow rewrites"

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        rewritten = [d for d in context.decisions.values() if isinstance(d.operator, AbstractMatrix)]
        for decision in context.progress.track(rewritten, "measuring forms", len(rewritten)):
            yield self._judged(graph, context, decision)
        free = [s for s in context.selected if s.kind == "linear" and not s.reason and not self._taken(context, s)]
        for chain in chains(graph, free):
            yield from self._merge(graph, context, chain)

    @staticmethod
    def _taken(context: Context, site: Site) -> bool:
        earlier = context.decisions.get(site.id)
        return earlier is not None and earlier.rewritten

    def _judged(self, graph: Graph, context: Context, decision: Decision) -> Decision:
        """The decision with its measured speed, or given up where speed is the objective and dense wins at every asked token count.

        A budget has weighed every site's cost, and another one's would not make up for this one's.
        """
        assert isinstance(decision.operator, AbstractMatrix)
        dense = Dense(load_weight(graph, decision.site).float().T.contiguous())
        table = context.seconds([dense, decision.operator.to(torch.float32)])
        free = context.objective == "ms" and context.budget is None and not decision.exact
        if free and all(form >= original for original, form in table):
            graph.restore(decision.site)
            figures = against_dense(context.tokens, [(d, f) for d, f in table])
            return decision.kept(
                f"{decision.structure} is slower than dense at every asked token count ({figures}): the original weight went back"
            )
        speed = ", ".join(f"{d / f:.1f}x dense at T={t}" for t, (d, f) in zip(context.tokens, table, strict=True))
        return replace(decision, reason=f"{decision.reason}; {speed}")

    def _merge(self, graph: Graph, context: Context, chain: Sequence[Site]) -> Iterator[Decision]:
        """Merge a chain where that is faster; the last site carries the product, the others become part of it."""
        weights = [load_weight(graph, s).double() for s in chain]
        forms = [form(weights, cut) for cut in groupings(len(chain))]
        table = context.seconds(forms)
        totals = [sum(column) for column in zip(*table, strict=True)]
        best = min(range(len(forms)), key=totals.__getitem__)
        names = " . ".join(s.name for s in chain)
        figures = f"{1e3 * totals[best]:.3f} ms against {1e3 * totals[0]:.3f} ms as it stands, at T={', '.join(map(str, context.tokens))}"
        if best == 0:
            yield from (_kept(s, f"chain {names}: no merged form is faster") for s in chain)
            return
        yield from spliced(graph, chain, forms[best], f"chain {names} merged ahead: {figures}")


def chains(graph: Graph, sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Maximal runs of single-place linears in which each reads just what the one before it wrote, and no bias comes between."""
    plain = [s for s in sites if len(s.places) == 1 and s.places[0].layout == PLAIN]
    reader = {id(s.places[0].x): s for s in plain}
    follower: dict[str, Site] = {}
    for site in plain:
        place = site.places[0]
        following = reader.get(id(place.y))
        if following is not None and place.bias is None and len(graph.users(place.y)) == 1:
            follower[site.id] = following
    heads = [s for s in plain if s.id in follower and all(f.id != s.id for f in follower.values())]
    for head in heads:
        run = [head]
        while run[-1].id in follower:
            run.append(follower[run[-1].id])
        yield run


def groupings(count: int) -> list[tuple[int, ...]]:
    """The places to cut a chain of `count` factors: all cuts first (as it stands), then every coarser grouping."""
    inner = range(1, count)
    return [cut for size in range(count - 1, -1, -1) for cut in combinations(inner, size)]


def form(weights: Sequence[Tensor], cuts: tuple[int, ...]) -> AbstractMatrix:
    """The chain with the factors between two cuts multiplied; weights are (m_i, n_i), first applied first."""
    edges = [0, *cuts, len(weights)]
    factors = []
    for start, stop in pairwise(edges):
        product = weights[start]
        for weight in weights[start + 1 : stop]:
            product = weight @ product
        factors.append(Dense(product.T.float().contiguous()))
    return factors[0] if len(factors) == 1 else Compose(tuple(factors))


def spliced(graph: Graph, chain: Sequence[Site], operator: AbstractMatrix, reason: str) -> Iterator[Decision]:
    """One opaque node for the whole chain, where its last site stood."""
    first, last = chain[0], chain[-1]
    assert first.shape is not None and last.shape is not None and last.dtype is not None
    whole = replace(last, shape=(last.shape[0], first.shape[1]), places=(replace(last.places[0], x=first.places[0].x),))
    stored = operator.to(last.dtype)
    graph.splice(whole, stored)
    for site in chain[:-1]:
        yield Decision(site, f"part of {last.name}: {reason}", site_cost(site), Cost(), None, "merged", True, 0.0, part_of=last.name)
    yield Decision(whole, reason, site_cost(last), after_cost(whole, stored), stored, "merged", True, 0.0)


def _kept(site: Site, reason: str) -> Decision:
    cost = site_cost(site)
    return Decision(site, reason, cost, cost)
