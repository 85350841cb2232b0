"""Deciding all linear sites: what stays, what is exact, and the rest fitted, each site by itself or all under one budget."""

from __future__ import annotations

from collections.abc import Iterator

from rewriter.budgeted import allocated
from rewriter.fit import Plan, cached, discovered, fit_key, fitted, keep, refusal
from rewriter.graph import Graph, Site
from rewriter.parallel import in_parallel
from rewriter.rule import Context, Decision


def decide_all(graph: Graph, context: Context, plan: Plan) -> Iterator[Decision]:
    """A decision for every selected site. Sites are spliced after the last one was fitted, so that all see the model as it was given."""
    decided = list(_decide_all(graph, context, plan))
    for decision in decided:
        if decision.operator is not None and decision is not context.decisions.get(decision.site.id):
            graph.splice(decision.site, decision.operator, decision.shift)
    yield from decided


def _decide_all(graph: Graph, context: Context, plan: Plan) -> Iterator[Decision]:
    open_sites = []
    for site in context.selected:
        earlier = context.decisions.get(site.id)
        refused = refusal(site)
        if earlier is not None and earlier.rewritten:
            yield earlier
        elif refused:
            yield keep(site, refused)
        else:
            open_sites.append(site)

    model = graph.fingerprint() if plan.lossy else ""  # exact discovery is not remembered

    def first_look(site: Site) -> Decision | None:
        found = discovered(graph, plan, site)
        if found is None and not plan.lossy:
            return keep(site, "not an exact member of any family; a lossy form needs a bound: params=, --budget or --max-error")
        return found or (cached(context, site, fit_key(model, context, plan, site)) if plan.budget is None else None)

    missing, settled = [], list[Decision]()
    for site, decision in context.progress.track(in_parallel(first_look, open_sites), "looking for exact structure", len(open_sites)):
        if decision is None:
            missing.append(site)
        else:
            settled.append(decision)
    yield from settled
    if plan.budget is not None and plan.lossy:
        yield from allocated(graph, context, plan, plan.budget, model, missing, settled)
        return
    workers = 1 if context.objective == "ms" else None  # timings want the machine to themselves
    for group in context.calibration.moments(missing):
        for _, decision in context.progress.track(
            in_parallel(lambda pair: fitted(graph, context, plan, *pair, fit_key(model, context, plan, pair[0])), group, workers),
            "fitting",
            len(group),
        ):
            yield decision
