"""Adapters as sums: y = W x + U D x is (W + U D) x, and where W was factored before, W = B A, it is [B U] [A; D] x."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rewriter.algebra import Compose, Dense, Sum
from rewriter.fit import after_cost, keep, part
from rewriter.graph import PLAIN, Graph, Site, load_matrix
from rewriter.operator import AbstractMatrix
from rewriter.passes.merge_lora import Base, branch_of, factors_gone, merged, stays
from rewriter.passes.planning.choice import fastest, ratios
from rewriter.passes.planning.forms import sums
from rewriter.quantised import Quantised
from rewriter.rule import Context, Decision


def planned(graph: Graph, context: Context) -> Iterator[Decision]:
    """A decision for each adapter, the outermost first, and for what else it changes."""
    gone, joined, bases = list[Site](), list[Site](), dict[int, Base]()
    for site in [s for s in reversed(context.selected) if s.kind == "adapter"]:
        reduced, base = context.decisions.get(site.id) or keep(site, ""), _base(context, site)
        if reduced.part_of:
            continue
        branch = branch_of(graph, site, reduced)
        if site.reason or isinstance(branch, str):
            yield stays(reduced, site.reason or str(branch))
            continue
        earlier = context.decisions.get(base.id) if base is not None else None
        alone = base is None or earlier is None or not earlier.rewritten
        if earlier is None or alone:
            decisions = [_merged(graph, context, site, branch, bases)]
        else:
            decisions = list(_joined(graph, context, site, reduced, _branch(branch), earlier))
        if decisions[0].part_of:
            (gone if alone else joined).append(site)
        yield from decisions
    yield from factors_gone(context, gone)
    yield from factors_gone(context, joined, final=False)


def _base(context: Context, site: Site) -> Site | None:
    """The linear that the adapter stands beside."""
    weight = site.weights["base"].value
    return next((s for s in context.selected if s.kind == "linear" and s.weights["weight"].value is weight), None)


def _merged(graph: Graph, context: Context, site: Site, branch: tuple[Tensor, Tensor], bases: dict[int, Base]) -> Decision:
    """Into the weight where that is faster; it is smaller in any case."""
    earlier = context.decisions.get(site.id) or keep(site, "")
    base = Dense(load_matrix(graph, site.weights["base"], (-1, branch[0].shape[1])).T.float().contiguous())
    table = context.seconds([Sum((base, _branch(branch))), base])
    before, after = ([row[i] for row in table] for i in (0, 1))
    if sum(after) >= sum(before):
        return stays(earlier, f"merged it would be no faster: {ratios(context.tokens, before, after)}")
    decision = merged(graph, context, site, bases)
    return replace(decision, reason=f"{decision.reason}; {ratios(context.tokens, before, after)}") if decision.part_of else decision


def _branch(factors: tuple[Tensor, Tensor]) -> AbstractMatrix:
    down, up = factors
    return Compose((Dense(down.T.float().contiguous()), Dense(up.T.float().contiguous())))


def _joined(graph: Graph, context: Context, site: Site, adapter: Decision, branch: AbstractMatrix, earlier: Decision) -> Iterator[Decision]:
    """With the factors of its base, as one operator where that is faster."""
    base, held = earlier.site, earlier.operator
    (place,) = site.places
    assert site.region is not None
    apart = len(base.places) != 1 or base.places[0].layout != PLAIN or site.region.inputs[1].value is not base.places[0].y
    if earlier.part_of or not isinstance(held, AbstractMatrix) or isinstance(held, Quantised) or apart or "bias" in site.weights:
        yield stays(adapter, f"{base.name} was rewritten, and its adapter cannot be joined to it")
        return
    exact = earlier.exact and (adapter.exact or not adapter.rewritten)
    forms = sums([held.to(torch.float32), branch])[: None if exact else -1]  # a fit is not made dense
    table = context.seconds(forms)
    best = fastest(table)
    if not best:
        yield stays(adapter, f"beside {base.name}: as one operator they would be no faster")
        return
    figures = ratios(context.tokens, [row[0] for row in table], [row[best] for row in table])
    assert base.dtype is not None
    for rewritten in (base, *([site] if adapter.rewritten else [])):
        graph.restore(rewritten)
    whole = replace(base, places=(replace(base.places[0], nodes=(*base.places[0].nodes, *site.region.nodes), y=place.y),), weights={})
    stored = forms[best].to(base.dtype)
    graph.splice(whole, stored, earlier.shift)
    said = f"{adapter.reason}; part of {base.name}" if adapter.rewritten else f"part of {base.name}"
    reason = f"{earlier.reason}; with its adapter as one operator: {figures}"
    yield replace(part(site, f"{said}: {figures}", base.name, "joined", exact), before=adapter.before)
    yield replace(earlier, site=whole, reason=reason, after=after_cost(whole, stored), operator=stored, exact=exact)
