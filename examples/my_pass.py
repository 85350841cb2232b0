"""`keep-small`: one structure, at sites of more than `above` numbers only; what is smaller is kept, and the report says so.

A pass of one's own in one file: a frozen dataclass whose fields are its options. It decides by handing a narrower context to the engine's
`decide_all`, so that exact discovery, calibration, budgets, the cache and every reason in the report come with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from rewriter.decide import decide_all
from rewriter.errors import RewriteError
from rewriter.fit import Plan, site_cost
from rewriter.graph import Graph, Site
from rewriter.registry import structures
from rewriter.rule import AbstractPass, Context, Decision, check_share

DEFAULT_SHARE = 0.5


@dataclass(frozen=True)
class KeepSmall(AbstractPass):
    """above: sites of so many numbers or fewer are kept; structure: the family for the others; params: at most this share of each."""

    name: ClassVar[str] = "keep-small"
    summary: ClassVar[str] = "one structure at large sites, small ones are left alone"
    above: int = 65536
    structure: str = "low-rank"
    params: float | None = None

    def requires(self, graph: Graph) -> None:
        """A share outside (0, 1], and a structure that there is not."""
        check_share(self.params, "keep-small:params")
        if self.structure not in structures():
            raise RewriteError(f"keep-small:structure={self.structure} is unknown; there are: {', '.join(structures())}")

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        """Every selected site gets one decision: small ones here, the others from `decide_all`."""
        small = [site for site in context.selected if self._is_small(context, site)]
        for site in small:
            cost = site_cost(site)
            yield Decision(site, f"small: {cost.params:,} numbers, keep-small:above is {self.above:,}", cost, cost)
        others = [site for site in context.selected if all(site is not kept for kept in small)]
        share = self.params or (1.0 if context.budget else DEFAULT_SHARE)
        plan = Plan([structures()[self.structure]()], lossy=True, share=share, budget=context.budget)
        yield from decide_all(graph, replace(context, selected=others), plan)

    def _is_small(self, context: Context, site: Site) -> bool:
        """Of the sites that a pass may rewrite; one that an earlier pass rewrote stays as that pass left it."""
        earlier = context.decisions.get(site.id)
        rewritten = earlier is not None and earlier.rewritten
        return site.kind == "linear" and not site.reason and not rewritten and site_cost(site).params <= self.above
