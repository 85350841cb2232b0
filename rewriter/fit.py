"""Deciding one linear site: discover an exact form, else fit the asked families, and take the least weighted error among those that pay.

"Leave it" is always a candidate: a site that cannot be read, cannot be calibrated or does not pay keeps its weight, with the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewriter.algebra import Dense
from rewriter.allocate import Budget
from rewriter.cache import FITTING, digest, hardware, sources
from rewriter.cost import Cost, dense_cost
from rewriter.errors import RewriteError
from rewriter.graph import Graph, Site, load_weight
from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.rule import Context, Decision
from rewriter.structure import AbstractStructure, Fitted


@dataclass(frozen=True)
class Plan:
    """What a pass asks of every site: families in the order that ties are broken, whether lossy fits are wanted, and the share of the
    dense numbers."""

    structures: Sequence[AbstractStructure]
    lossy: bool
    share: float
    explicit: bool = False  # the user set rank or blocks, and share bounds it
    budget: Budget | None = None  # what all sites together may cost; share then bounds each one
    chosen: bool = False  # under the budget, which has weighed what it costs: it is not compared with the dense weight again


def site_cost(site: Site) -> Cost:
    """What the site's dense weight costs per token; nothing for sites that have none, and for adapters, whose factors are sites too."""
    if site.shape is None or site.dtype is None or site.kind == "adapter":
        return Cost()
    if site.operator is not None:
        return site.operator.cost()
    return dense_cost(site.shape, site.dtype.itemsize, places=len(site.places))


def refusal(site: Site) -> str:
    """Why no pass may rewrite the site at all; "" where one may."""
    if site.reason or site.kind != "linear":
        return site.reason or "no pass for it yet"
    if site.operator is not None:
        return f"already structured: {type(site.operator).__name__}"
    if site.dtype is None or not site.dtype.is_floating_point:
        return f"its weight is {str(site.dtype).removeprefix('torch.')}, not a float"
    assert site.shape is not None
    if min(site.shape) == 1:
        return f"its weight is a single vector, {list(site.shape)}: nothing smaller does the same"
    return ""


def keep(site: Site, reason: str) -> Decision:
    """The site as it is, with the reason."""
    cost = site_cost(site)
    return Decision(site, reason, cost, cost)


def part(site: Site, reason: str, of: str, structure: str, exact: bool = True, final: bool = False) -> Decision:
    """A site of which nothing is left: another one's operator or weight does its work."""
    return Decision(site, reason, site_cost(site), Cost(), None, structure, exact, 0.0, part_of=of, final=final)


def usable_weight(graph: Graph, site: Site) -> Tensor | str:
    """The matrix in float32, or why it cannot be used."""
    weight = load_weight(graph, site)
    if not bool(torch.isfinite(weight).all()):
        return "its weight holds NaN or inf"
    if not bool(weight.any()):
        return "its weight is all zeros"
    return weight if weight.dtype == torch.float64 else weight.float()


def after_cost(site: Site, operator: AbstractMatrix) -> Cost:
    """What the operator costs at the site per token: stored once, executed at each place."""
    assert site.dtype is not None
    one = operator.to(site.dtype).cost()
    return Cost(one.params, one.flops * len(site.places), one.nbytes)


def discovered(graph: Graph, plan: Plan, site: Site) -> Decision | None:
    """The site in the exact form with the fewest numbers, or kept where its weight cannot be used; None where nothing exact is smaller."""
    weight = usable_weight(graph, site)
    if isinstance(weight, str):
        return keep(site, weight)
    assert site.dtype is not None
    best: Fitted | None = None
    stored = weight.to(site.dtype)  # rounding level is that of the numbers as stored
    for structure in plan.structures:
        found = structure.discover(stored)
        if isinstance(found, Fitted) and (best is None or found.operator.cost().params < best.operator.cost().params):
            best = found
    if best is None:
        return None
    before, after = site_cost(site), after_cost(site, best.operator)
    if after.params >= before.params:
        return None
    reason = f"the weight is exactly {best.spelling}: {after.params:,} numbers instead of {before.params:,}"
    return Decision(site, reason, before, after, best.operator.to(site.dtype), best.spelling, True, best.weighted_error)


def timed(context: Context, plan: Plan) -> bool:
    """Whether forms are compared by their time, be it under a budget or by the objective."""
    return context.objective == "ms" or (plan.budget is not None and plan.budget.unit == "ms")


def fit_key(model: str, context: Context, plan: Plan, site: Site) -> str:
    """What a fit depends on. `model` is the graph's fingerprint: a site's input moments depend on everything before it."""
    asked = ",".join(s.spelling() for s in plan.structures)
    how_timed = (context.target.timed_as, context.tokens, context.threads, context.two_forms, hardware(), sources())
    speed = how_timed if timed(context, plan) else ()
    how = (asked, plan.share, plan.explicit, plan.chosen, context.objective, context.seed)
    return digest(model, site.id, *how, speed, context.calibration.key, sources(FITTING))


def cached(context: Context, site: Site, key: str) -> Decision | None:
    """The remembered decision under a key, None where there is none."""
    entry = context.fits.get(key)
    if entry is None:
        return None
    operator, figures = entry
    if operator is None:
        return keep(site, figures["reason"])
    shift = torch.tensor(figures["shift"], dtype=torch.float64) if figures["shift"] else None
    cost = after_cost(site, operator)
    return Decision(site, figures["reason"], site_cost(site), cost, operator, figures["structure"], False, figures["error"], shift)


def fitted(graph: Graph, context: Context, plan: Plan, site: Site, moments: Moments | None, key: str) -> Decision:
    """Fit, judge and remember."""
    decision = _judged(graph, context, plan, site, moments)
    shift = decision.shift.tolist() if decision.shift is not None else None
    figures = {"reason": decision.reason, "structure": decision.structure, "error": decision.error, "shift": shift}
    context.fits.put(key, decision.operator, figures)
    return decision


def _judged(graph: Graph, context: Context, plan: Plan, site: Site, moments: Moments | None) -> Decision:
    weight = usable_weight(graph, site)
    assert isinstance(weight, Tensor) and site.shape is not None and site.dtype is not None
    if moments is None:
        return keep(site, "nothing is known of its input (no samples reach it and no LayerNorm stands before it): a fit would be blind")
    limit = int(plan.share * weight.numel())
    shifts = shifted(graph, site)
    fits, refusals = fit_families(plan.structures, weight, moments, limit, context.rng(site), shifts)
    if plan.explicit and not fits and plan.share < 1:
        raise RewriteError(f"{site.name}: {'; '.join(refusals)}")
    chosen, lost = (fits[0], []) if plan.chosen and fits else best_that_pays(context, site, weight, fits)
    if chosen is None:
        return keep(site, "; ".join([*lost, *refusals]) or "no family fits in the budget")
    operator = chosen.operator.to(site.dtype)
    shift = moments.shift(weight, operator.to(torch.float32).dense()) if shifts else None
    after, before = after_cost(site, operator), site_cost(site)
    among = f"least weighted error of {len(fits)} forms" if len(fits) > 1 else "the one form that fits"
    reason = f"{among}, at {after.params / before.params:.0%} of params"
    return Decision(site, reason, before, after, operator, chosen.spelling, False, chosen.weighted_error, shift)


def shifted(graph: Graph, site: Site) -> bool:
    """Whether the site's bias can take the mean error up, at every place."""
    return all(p.bias is not None and graph.is_const(p.bias) for p in site.places)


def fit_families(
    structures: Sequence[AbstractStructure], weight: Tensor, moments: Moments, limit: int, rng: torch.Generator, shifted: bool
) -> tuple[list[Fitted], list[str]]:
    """Every family's best member under the limit, best first, and why the others have none.

    `shifted`: the bias takes the mean error up, so the families see the covariance; errors stay relative to the whole product.
    """
    seen = moments.centered() if shifted else moments
    energy = seen.energy(weight)
    whole = energy + float((weight.double() @ moments.mean).square().sum()) if shifted else energy
    scale = max((energy / max(whole, 1e-300)) ** 0.5, 1e-300)
    fits: list[Fitted] = []
    refusals: list[str] = []
    for structure in sorted(structures, key=lambda s: s.iterative):
        rival = min((f.weighted_error / scale for f in fits), default=None)
        if rival is not None and structure.iterative and not structure.promising(weight, seen, limit, rival):
            refusals.append(f"{structure.name}: what its fit starts from is too far above {rival:.3g}")
            continue
        found = structure.fit(weight, seen, limit, rng)
        if isinstance(found, Fitted):
            fits.append(replace(found, weighted_error=found.weighted_error * scale))
        else:
            refusals.append(f"{structure.name}: {found.reason}")
    return sorted(fits, key=lambda f: f.weighted_error), refusals


def best_that_pays(context: Context, site: Site, weight: Tensor, fits: Sequence[Fitted]) -> tuple[Fitted | None, list[str]]:
    """The first fit that costs less than the dense weight by the objective, and the numbers of those that do not. Of time it is enough to
    win somewhere where the dense form may be stored beside it."""
    before, lost = site_cost(site), []
    if not fits:
        return None, []
    if context.objective != "ms":
        for fit in fits:
            after = after_cost(site, fit.operator)
            if after.of(context.objective) < before.of(context.objective):
                return fit, []
            lost.append(
                f"{fit.spelling} does not pay: {after.of(context.objective):,} {context.objective} against {before.of(context.objective):,}"
            )
        return None, lost
    dense = Dense(weight.float().T.contiguous())
    table = context.seconds([dense, *[f.operator for f in fits]])
    totals = [sum(column) for column in zip(*table, strict=True)]
    for i, (fit, total) in enumerate(zip(fits, totals[1:], strict=True), 1):
        if total < totals[0] or (context.two_forms and any(row[i] < row[0] for row in table)):
            return fit, []
        at = ", ".join(map(str, context.tokens))
        lost.append(f"{fit.spelling} does not pay: {1e3 * total:.3f} ms against {1e3 * totals[0]:.3f} ms dense at T={at}")
    return None, lost
