"""Chains of linears with nothing but a bias between: y = W_2 (W_1 x + b_1) + b_2 = W_2 W_1 x + (W_2 b_1 + b_2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from rewriter.algebra import ByTokens, Compose, Dense
from rewriter.fit import after_cost, keep, part, site_cost
from rewriter.graph import PLAIN, Graph, Site, load_bias, load_weight
from rewriter.operator import AbstractMatrix
from rewriter.passes.planning.choice import Choice, chosen, ratios, said
from rewriter.passes.planning.forms import products
from rewriter.quantised import Quantised
from rewriter.rule import Context, Decision


@dataclass(frozen=True)
class Link:
    """One linear of a chain as it is now; a dense weight is loaded when it is asked for."""

    graph: Graph
    site: Site
    decision: Decision | None  # of an earlier pass that rewrote it

    @property
    def operator(self) -> AbstractMatrix:
        """In float32."""
        held = self.decision.operator if self.decision is not None else None
        assert held is None or isinstance(held, AbstractMatrix)
        return (held or Dense(load_weight(self.graph, self.site).T.contiguous())).to(torch.float32)

    @property
    def kinds(self) -> tuple[type[AbstractMatrix], ...]:
        """Of its factors."""
        held = self.decision.operator if self.decision is not None else None
        return tuple(type(factor) for factor in held.as_product()) if isinstance(held, AbstractMatrix) else (Dense,)

    @property
    def bias(self) -> Tensor | None:
        """(m,) float64, with what a fit has shifted it by."""
        assert self.site.shape is not None
        total = load_bias(self.graph, self.site.places[0], self.site.shape[0])
        shift = self.decision.shift if self.decision is not None else None
        return total if shift is None else shift.double() if total is None else total + shift.double()


def link(graph: Graph, site: Site, decision: Decision | None) -> Link | None:
    """None where no chain can hold it: it is not single and plain, its bias varies, or its form is no product of floats."""
    if site.kind != "linear" or len(site.places) != 1 or site.places[0].layout != PLAIN:
        return None
    rewritten = decision if decision is not None and decision.rewritten else None
    if rewritten is None and (site.reason or site.operator is not None or site.dtype is None or not site.dtype.is_floating_point):
        return None
    bias, held = site.places[0].bias, rewritten.operator if rewritten is not None else None
    floats = held is None or (isinstance(held, AbstractMatrix) and not isinstance(held, Quantised | ByTokens))
    return Link(graph, site, rewritten) if floats and (bias is None or graph.is_const(bias)) else None


def chains(graph: Graph, links: Sequence[Link]) -> Iterator[list[Link]]:
    """Maximal runs in which each reads just what the one before it wrote."""
    reader = {id(each.site.places[0].x): each for each in links}
    follower: dict[str, Link] = {}
    for each in links:
        following = reader.get(id(each.site.places[0].y))
        if following is not None and _alone(graph, each, following):
            follower[each.site.id] = following
    behind = {each.site.id for each in follower.values()}
    for head in links:
        if head.site.id in follower and head.site.id not in behind:
            run = [head]
            while run[-1].site.id in follower:
                run.append(follower[run[-1].site.id])
            yield run


def _alone(graph: Graph, first: Link, second: Link) -> bool:
    """Whether nothing else reads what the first one gives, in the graph as it was before they were rewritten."""
    rewritten = [(each.site, each.decision) for each in (first, second) if each.decision is not None]
    for site, _ in rewritten:
        graph.restore(site)
    alone = len(graph.users(first.site.places[0].y)) == 1
    for site, decision in rewritten:
        assert decision.operator is not None
        graph.splice(site, decision.operator, decision.shift)
    return alone


def planned(graph: Graph, context: Context, chain: Sequence[Link]) -> Iterator[Decision]:
    """The chain in its fastest form; the last site carries the product, the others become part of it."""
    names = " . ".join(each.site.name for each in chain)
    whole = Compose(tuple(each.operator for each in chain))
    exact = all(each.decision is None or each.decision.exact for each in chain)
    dense = sum(site_cost(each.site).params for each in chain)
    forms = [form for i, form in enumerate(products(whole)) if not i or exact or form.cost().params < dense]
    table = context.seconds(forms)
    choice = chosen(context.tokens, context.seconds, forms, table, two=exact and context.objective == "ms" and context.budget is None)
    if choice.index == 0:
        yield from (keep(each.site, f"chain {names}: no merged form is faster") for each in chain if each.decision is None)
        return
    figures = ratios(context.tokens, [row[0] for row in table], choice.seconds)
    stored = said(choice.form)
    yield from spliced(graph, chain, choice, f"chain {names} merged ahead: {figures}{stored and f'; {stored}'}")


def spliced(graph: Graph, chain: Sequence[Link], choice: Choice, reason: str) -> Iterator[Decision]:
    """One opaque node for the whole chain, where its last site stood."""
    first, last = chain[0].site, chain[-1].site
    assert first.shape is not None and last.shape is not None and last.dtype is not None
    for each in chain:
        if each.decision is not None:
            graph.restore(each.site)
    whole = replace(last, shape=(last.shape[0], first.shape[1]), places=(replace(last.places[0], x=first.places[0].x),), weights={})
    stored, shift = choice.form.to(last.dtype), carried(chain)
    graph.splice(whole, stored, shift)
    found = [each.decision for each in chain if each.decision is not None]
    errors = [decision.error for decision in found if decision.error is not None]
    exact = all(decision.exact for decision in found)
    for each in chain[:-1]:
        yield part(each.site, f"part of {last.name}: {reason}", last.name, "merged", exact)
    after = after_cost(whole, stored)
    yield Decision(whole, reason, site_cost(last), after, stored, "merged", exact, max(errors, default=0.0), shift)


def carried(chain: Sequence[Link]) -> Tensor | None:
    """What the last one's stored bias gains: the earlier biases through what follows them, and its own shift."""
    total: Tensor | None = None
    for each, following in pairwise(chain):
        total = each.bias if total is None else total if each.bias is None else total + each.bias
        total = None if total is None else following.operator.to(torch.float64).dense() @ total
    own = chain[-1].decision.shift if chain[-1].decision is not None else None
    return total if own is None else own.double() if total is None else total + own.double()
