"""`absorb`: attention on a cached latent (DeepSeek's MLA) without expanding it, in calls of so few queries that this is faster; exact.

(q_h U_h) c^T instead of q_h (c U_h^T)^T, and (P c) W_h instead of P (c W_h). Where each wins at some asked token count, both are there
and the number of queries decides in each call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from rewriter.cost import Cost
from rewriter.errors import RewriteError
from rewriter.fit import site_cost
from rewriter.graph import Graph, Site
from rewriter.passes.detect.latent import read
from rewriter.passes.fuse_attention import not_free
from rewriter.passes.planning.absorbed import fastest, per_token, where
from rewriter.passes.structures.attention import Attention
from rewriter.passes.structures.latent_attention import CACHED
from rewriter.rule import AbstractPass, Context, Decision


@dataclass(frozen=True)
class Absorb(AbstractPass):
    """cached: tokens in the cache while the forms are timed; an empty cache counts as much."""

    name: ClassVar[str] = "absorb"
    summary: ClassVar[str] = "attention on a cached latent (MLA) without expanding it, in the calls where that is faster; exact"
    cached: int = CACHED

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        if self.cached < 1:
            raise RewriteError(f"{self.name}:cached={self.cached} is out of range; give a number of tokens above 0, such as {CACHED}")
        products: dict[int, Site] = {}  # what expanded a latent, and the attention that has its weights now
        for site in [s for s in context.selected if s.kind == "attention"]:
            earlier = context.decisions.get(site.id)
            if earlier is None or not earlier.rewritten:
                yield self._judged(graph, context, site, products)
            elif isinstance(earlier.operator, Attention):  # one operation: seen as the model spelled it, and put back where it stays
                graph.restore(site)
                decision = self._judged(graph, context, site, products)
                if not decision.rewritten:
                    graph.splice(site, earlier.operator)
                yield decision if decision.rewritten else earlier
            else:
                yield earlier
        for site in context.selected:
            owners = {products[id(n)].name for place in site.places for n in place.nodes if id(n) in products}
            if site.kind == "linear" and owners and all(any(id(n) in products for n in place.nodes) for place in site.places):
                reason = f"its weight is in {', '.join(sorted(owners))} now"
                yield Decision(site, reason, site_cost(site), Cost(), None, self.name, True, 0.0, part_of=min(owners))

    def _judged(self, graph: Graph, context: Context, site: Site, products: dict[int, Site]) -> Decision:
        if not isinstance(site.form, Attention) or site.region is None:
            return Decision(site, site.reason)
        found = read(graph, site.form, site.region)
        reason = found if isinstance(found, str) else not_free(graph, found.region)
        if isinstance(found, str) or reason:
            return Decision(site, reason)
        form = replace(found.form, cached=self.cached)
        few, figures = fastest(context, form)
        least = min(context.tokens)
        before = Cost(0, per_token(form, least).flops, 0)  # the product that expands has the weights
        if not few:
            said = f"absorbing a latent of {form.key_up.shape[2]} is not faster after {self.cached} tokens: {figures}"
            return Decision(site, said, before, before)
        form = replace(form, few=few)
        graph.splice(replace(site, form=form, region=found.region), form)
        products[id(found.product)] = site
        said = f"a latent of {form.key_up.shape[2]} absorbed {where(few)}; after {self.cached} tokens {figures}"
        return Decision(site, said, before, per_token(form, least), form, self.name, True, 0.0)
