"""All sites under one budget: curves, what each site's error does to the output, the exact choice, and whether it beats the even one.

curve      a site's forms: weighted error e against cost c (rewriter/curves.py)
even       the best form that every site can have at the budget's share: what there would be without an allocation
weight     w = (E / e)^2, E the relative output error of the model with that one site in its even form
chosen     min sum w e^2 (rewriter/allocate.py); kept only where the whole model's error on the same samples is below that of `even`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rewriter.allocate import FLOOR, Budget, choose
from rewriter.curves import Curve, Point, Remembered, curves_of, share_of
from rewriter.errors import RewriteError
from rewriter.fit import Plan, cached, fit_key, fitted, keep
from rewriter.graph import Graph, Site
from rewriter.output_error import OutputErrors
from rewriter.parallel import in_parallel
from rewriter.rule import Context, Decision

NOTHING = "no form of it costs less than the dense weight, or nothing is known of its input"


def allocated(
    graph: Graph, context: Context, plan: Plan, budget: Budget, model: str, sites: Sequence[Site], settled: Sequence[Decision]
) -> Iterator[Decision]:
    """A decision for every site, the settled ones' cost being part of the budget.

    RewriteError where no choice of the forms that were found stays within it.
    """
    moments = Remembered(context.calibration)
    curves = curves_of(graph, context, plan, budget, model, sites, moments)
    open_sites = {s.id: s for s in sites if len(curves[s.id]) > 1}
    for site in sites:
        if site.id not in open_sites:
            yield keep(site, NOTHING)
    if not open_sites:
        return
    units = _Units(budget, curves, settled)

    def fits(points: Mapping[str, Point]) -> dict[str, Decision]:
        return _fits(graph, context, plan, model, {key: (open_sites[key], point) for key, point in points.items()}, moments)

    even = {key: units.even(key) for key in open_sites}
    first = fits(even)
    assert context.calibration.samples is not None
    with OutputErrors(graph, context.calibration.samples) as errors:
        weights = {key: errors.effect(d) for key, d in context.progress.track(first.items(), "what the output feels", len(first))}
        chosen = units.choose(weights)
        second = {**first, **fits({key: point for key, point in chosen.items() if point != even[key]})}
        low, high = errors.of(second.values()), errors.of(first.values())
    moved = low <= high or units.total(even) > 1
    for decision in (second if moved else first).values():
        yield replace(decision, reason=_reason(decision, budget, moved, low, high))


def _reason(decision: Decision, budget: Budget, moved: bool, low: float, high: float) -> str:
    """The decision's own, and what the allocation did."""
    if not moved:
        return f"{decision.reason}; its even part of {budget}: moving it between sites made the output's error {low:.3g}, from {high:.3g}"
    if decision.operator is None:
        return f"{budget} is saved at other sites: the output feels this one's error most"
    return f"{decision.reason}; its part of {budget} by what the output feels"


class _Units:
    """Costs as parts of the budget: 1 is all of it. Time counts alike at every token count, whatever it takes."""

    def __init__(self, budget: Budget, curves: Mapping[str, Curve], settled: Sequence[Decision]) -> None:
        self.budget, self.curves = budget, curves
        dense = [curve[0] for curve in curves.values()]
        self.times = [sum(column) for column in zip(*[d.seconds for d in dense], strict=True)]
        self.whole = sum(d.cost.of(unit) for d in dense) + sum(d.before.of(unit) for d in settled) if (unit := budget.unit) != "ms" else 0
        # an exact form's time is not part of this comparison: it is neither in the whole nor spent
        self.spent = sum(d.after.of(unit) for d in settled) / self.whole / budget.share if self.whole else 0.0
        self.costs = {key: [self.cost(p) for p in curve] for key, curve in curves.items()}

    def cost(self, point: Point) -> float:
        """1 is the whole budget."""
        if self.budget.unit != "ms":
            return float(point.cost.of(self.budget.unit) / self.whole / self.budget.share)
        return share_of(point.seconds, self.times) / self.budget.share

    def total(self, points: Mapping[str, Point]) -> float:
        """What a choice costs, the sites without a choice included."""
        return self.spent + sum(self.cost(points.get(key, curve[0])) for key, curve in self.curves.items())

    def even(self, key: str) -> Point:
        """The least error among the points at the budget's share of this site's own cost; the cheapest where there is none."""
        curve, costs = self.curves[key], self.costs[key]
        allowed = [p for p, c in zip(curve, costs, strict=True) if p.structure and c <= self.budget.share * costs[0]]
        return min(allowed, key=lambda p: p.error) if allowed else curve[costs.index(min(costs))]

    def choose(self, weights: Mapping[str, float]) -> dict[str, Point]:
        """The exact choice, each site at or above its floor where it has such forms."""
        fixed = self.spent + sum(costs[0] for key, costs in self.costs.items() if key not in weights)
        options = {key: self._above_floor(key) for key in weights}
        costs = [[self.costs[key][i] for i in options[key]] for key in weights]
        losses = [[w * self.curves[key][i].error ** 2 for i in options[key]] for key, w in weights.items()]
        picked = choose(costs, losses, 1 - fixed) if fixed < 1 else None
        if picked is None:
            least = (fixed + sum(map(min, costs))) * self.budget.share
            raise RewriteError(
                f"--budget {self.budget} cannot be kept: the forms that were found, none below half of the even share, come to "
                f"{self.budget.unit}={least:.3g}; give at least that, or leave sites out with --exclude"
            )
        return {key: self.curves[key][options[key][k]] for key, k in zip(weights, picked, strict=True)}

    def _above_floor(self, key: str) -> list[int]:
        costs = self.costs[key]
        floor = FLOOR * self.budget.share * costs[0]
        above = [i for i, c in enumerate(costs) if c >= floor]
        cheapest = costs.index(min(costs))
        return above if len(above) > 1 else [*above, *({cheapest} - set(above))]


def _fits(
    graph: Graph, context: Context, plan: Plan, model: str, wanted: Mapping[str, tuple[Site, Point]], moments: Remembered
) -> dict[str, Decision]:
    """The points as decisions, from the cache or from one pass over the samples."""
    plans = {
        key: replace(plan, structures=[s for s in plan.structures if s.name == point.structure], share=point.share, chosen=True)
        for key, (_, point) in wanted.items()
    }
    keys = {key: fit_key(model, context, plans[key], site) for key, (site, _) in wanted.items()}
    decisions = {key: keep(site, "dense") for key, (site, point) in wanted.items() if not point.structure}
    decisions |= {key: found for key, (site, _) in wanted.items() if key not in decisions and (found := cached(context, site, keys[key]))}
    missing = [site for key, (site, _) in wanted.items() if key not in decisions]
    for group in moments(missing):
        made = in_parallel(lambda pair: fitted(graph, context, plans[pair[0].id], *pair, keys[pair[0].id]), group)
        for (site, _), decision in context.progress.track(made, "fitting", len(group)):
            decisions[site.id] = decision
    return decisions
