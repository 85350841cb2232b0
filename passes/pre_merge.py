"""`pre-merge`: which factors to multiply ahead of time, decided by measurement on the target at the asked token counts.

What stands in a row is a product, what stands beside one another a sum: chains of linears, factored sites, adapters beside bases, linears
that read one value. Each has several forms that are equal (planning/forms.py); the fastest is taken, or two of them behind one
dispatch by the number of tokens where each wins somewhere (planning/choice.py). A fit is never merged into a dense-sized matrix alone:
where dense is faster its ORIGINAL weight goes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rewriter.algebra import Dense
from rewriter.fit import after_cost, keep, refusal
from rewriter.graph import Graph
from rewriter.operator import AbstractMatrix
from rewriter.passes.absorb import Absorb
from rewriter.passes.planning import adapters, chains, siblings
from rewriter.passes.planning.choice import chosen, said
from rewriter.passes.planning.forms import dense, products
from rewriter.rule import AbstractPass, Context, Decision, against_dense, given_up


@dataclass(frozen=True)
class PreMerge(AbstractPass):
    """Plans products and sums of factors."""

    name: ClassVar[str] = "pre-merge"
    summary: ClassVar[str] = "factors multiplied ahead of time where that is faster: chains, adapters, siblings; slow rewrites undone"

    two_forms: ClassVar[bool] = True

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        for step in (adapters.planned, self._absorbed, self._chained, self._judged, self._packed, self._alone):
            for decision in step(graph, context):
                context.decisions[decision.site.id] = decision
                yield decision

    @staticmethod
    def _absorbed(graph: Graph, context: Context) -> Iterator[Decision]:
        """Attention on a latent is a product, too."""
        return (d for d in Absorb().run(graph, context) if d.rewritten)

    def _judged(self, graph: Graph, context: Context) -> Iterator[Decision]:
        matrices = [d for d in context.decisions.values() if isinstance(d.operator, AbstractMatrix) and d.site.kind == "linear"]
        rewritten = [d for d in matrices if d.structure != "merged"]
        for decision in context.progress.track(rewritten, "measuring forms", len(rewritten)):
            yield from _judged(graph, context, decision)

    def _chained(self, graph: Graph, context: Context) -> Iterator[Decision]:
        for chain in chains.chains(graph, _links(graph, context)):
            yield from chains.planned(graph, context, chain)

    def _packed(self, graph: Graph, context: Context) -> Iterator[Decision]:
        for family in siblings.families(graph, _links(graph, context)):
            yield from siblings.planned(graph, context, family)

    def _alone(self, graph: Graph, context: Context) -> Iterator[Decision]:
        for site in context.selected:
            if site.kind == "linear" and site.id not in context.decisions and not refusal(site):
                yield keep(site, "nothing stands in a row with it, or beside it on the same input, that it could be merged with")


def _links(graph: Graph, context: Context) -> list[chains.Link]:
    """Every linear that a chain or a family may hold, as earlier steps left it."""
    decisions = [(s, context.decisions.get(s.id)) for s in context.selected]
    sites = [(s, d) for s, d in decisions if d is None or not (d.part_of or d.structure in ("merged", "packed"))]
    return [found for s, d in sites if (found := chains.link(graph, s, d)) is not None]


def _judged(graph: Graph, context: Context, decision: Decision) -> Iterator[Decision]:
    """The decision with its measured speed; where speed is the objective in its fastest form, or given up where that is the dense weight.

    A budget has weighed every site's cost, and another one's would not make up for this one's.
    """
    site, operator = decision.site, decision.operator
    assert isinstance(operator, AbstractMatrix) and site.dtype is not None
    floats = operator.to(torch.float32)
    original = Dense(torch.empty(floats.shape[::-1]))  # whose numbers do not matter here
    free = context.objective == "ms" and context.budget is None
    forms = [form for i, form in enumerate(products(floats)) if not i or (free and form.cost().params < original.cost().params)]
    table = context.seconds([original, *forms])
    if not free:
        yield _with_speed(context, decision, [row[0] for row in table], [row[1] for row in table])
        return
    equal = [dense(floats), *forms]  # the first takes as long as the original
    choice = chosen(context.tokens, context.seconds, equal, table, two=True)
    if choice.index == 0 and not decision.exact:
        graph.restore(site)
        figures = against_dense(context.tokens, [(row[0], row[1]) for row in table])
        reason = f"{decision.structure} is slower than dense ({figures}): the original weight went back"
        yield from given_up(context.decisions, decision, reason)
        return
    if choice.index not in (0, 1):
        stored = choice.form.to(site.dtype)
        graph.splice(site, stored, decision.shift)
        reason = "; ".join(filter(None, (decision.reason, said(choice.form))))
        decision = replace(decision, reason=reason, operator=stored, after=after_cost(site, stored))
    yield _with_speed(context, decision, [row[0] for row in table], choice.seconds if choice.index != 0 else [row[1] for row in table])


def _with_speed(context: Context, decision: Decision, dense_seconds: Sequence[float], seconds: Sequence[float]) -> Decision:
    speed = ", ".join(f"{d / f:.1f}x dense at T={t}" for t, d, f in zip(context.tokens, dense_seconds, seconds, strict=True))
    return replace(decision, reason=f"{decision.reason}; {speed}")
