"""A site's error-versus-cost curve: each family's best form at limits from the floor to the dense size, weighted error e against cost c.

At the even share every family is fitted; the other limits are for families that may be chosen there:

numbers    those whose error at the even share is near the least
time       those that no other beats there in both error and time; one whose fit is dear only where its start, the same form without the
           descent, is faster than the dense weight. What a curve holds was timed together, in one comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from rewriter.algebra import Dense
from rewriter.allocate import FLOOR, Budget
from rewriter.cache import digest
from rewriter.calibrate import Calibration
from rewriter.cost import Cost
from rewriter.fit import Plan, after_cost, fit_families, fit_key, shifted, site_cost, timed, usable_weight
from rewriter.graph import Graph, Site
from rewriter.moments import Moments
from rewriter.operator import flatten, skeleton
from rewriter.parallel import in_parallel
from rewriter.rule import Context
from rewriter.structure import AbstractStructure, Fitted, NoMatch

LIMITS = 10  # of a curve, besides the even share
NEAR = 1.05  # of the best error at the even share, within which a family is fitted at the other limits
SPARSE = 3  # families that descend are fitted at every third one of those


@dataclass(frozen=True)
class Point:
    """One form that a site may take."""

    structure: str  # the family; "" is the dense weight
    share: float  # of the dense numbers, which the fit was allowed
    error: float  # weighted, relative
    cost: Cost
    seconds: tuple[float, ...] = ()  # at each token count, where time is asked for

    @classmethod
    def stored(cls, content: Mapping[str, object]) -> Point:
        """From its asdict."""
        return cls(**{**content, "cost": Cost(**content["cost"]), "seconds": tuple(content["seconds"])})  # type: ignore[arg-type]


Curve = list[Point]  # the dense weight first


@dataclass(frozen=True)
class _Form:
    """A fit without its numbers."""

    spelling: str
    share: float
    error: float
    cost: Cost
    spec: str

    @property
    def family(self) -> str:
        return self.spelling.split(":")[0]


@dataclass
class _Draft:
    """A site's curve while it is made."""

    site: Site
    moments: Moments
    forms: list[_Form] = field(default_factory=list)
    starts: Mapping[str, str] = field(default_factory=dict)  # specs by family whose fit is dear, where time is asked for
    families: Sequence[AbstractStructure] = ()  # of the limits besides the even share


def share_of(seconds: Sequence[float], dense: Sequence[float]) -> float:
    """Of the dense time, every token count weighing the same: what a budget counts."""
    return sum(s / d for s, d in zip(seconds, dense, strict=True)) / len(dense)


def limits(share: float, cap: float) -> list[float]:
    """From the floor of a share to the dense size, evenly in the logarithm, the share itself among them; none above the cap."""
    low = FLOOR * share
    grid = [low * (1 / low) ** (i / LIMITS) for i in range(LIMITS)]
    return sorted({x for x in [share, *grid] if x <= cap})


class Remembered:
    """A graph's moments, which curves and fits ask for in turn: kept where all sites' fit in memory at once."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.kept = dict[str, Moments | None]()

    def __call__(self, sites: Sequence[Site]) -> Iterator[list[tuple[Site, Moments | None]]]:
        if sites and all(site.id in self.kept for site in sites):
            yield [(site, self.kept[site.id]) for site in sites]
            return
        for group in self.calibration.moments(sites):
            if len(group) == len(sites):
                self.kept |= {site.id: found for site, found in group}
            yield group


def curves_of(
    graph: Graph, context: Context, plan: Plan, budget: Budget, model: str, sites: Sequence[Site], moments: Remembered
) -> dict[str, Curve]:
    """Every site's curve, from the cache or from one pass over the samples."""

    def key(site: Site) -> str:
        return digest("curve", fit_key(model, context, plan, site), budget, FLOOR, LIMITS, NEAR)

    curves = {}
    for site in sites:
        entry = context.fits.get(key(site))
        if entry is not None:
            curves[site.id] = [Point.stored(p) for p in entry[1]["points"]]
    work = _Curves(graph, context, plan, budget)
    for group in moments([s for s in sites if s.id not in curves]):
        for site, curve in work.of(group):
            curves[site.id] = curve
            context.fits.put(key(site), None, {"points": [asdict(p) for p in curve]})
    return curves


@dataclass(frozen=True)
class _Curves:
    """The work on a group of sites: fits run side by side, timings have the machine to themselves."""

    graph: Graph
    context: Context
    plan: Plan
    budget: Budget

    @property
    def measured(self) -> bool:
        return timed(self.context, self.plan)

    def of(self, group: Sequence[tuple[Site, Moments | None]]) -> Iterator[tuple[Site, Curve]]:
        """A curve for each site; of nothing but the dense weight where nothing is known of its input."""
        drafts = {site.id: _Draft(site, found) for site, found in group if found is not None}
        self._fit(self._even, drafts.values(), "forms at the even share")
        for draft in self._alone(drafts.values()):
            draft.families = self._worthwhile(draft)
        self._fit(self._others, drafts.values(), "error against cost")
        curves = {draft.site.id: self._curve(draft) for draft in self._alone(drafts.values())}
        for site, _ in group:
            yield site, curves.get(site.id) or [Point("", 1.0, 0.0, site_cost(site))]

    def _fit(self, work: Callable[[_Draft], None], drafts: Iterable[_Draft], what: str) -> None:
        for _ in self.context.progress.track(in_parallel(work, drafts), what, len(list(drafts))):
            pass

    def _alone(self, drafts: Iterable[_Draft]) -> Iterator[_Draft]:
        return iter(self.context.progress.track(drafts, "timing", len(list(drafts)))) if self.measured else iter(drafts)

    @property
    def _shares(self) -> list[float]:
        """The limits, the even one first."""
        return sorted(limits(self.budget.share, self.plan.share), key=lambda share: abs(share - self.budget.share))

    def _even(self, draft: _Draft) -> None:
        if self.measured:
            draft.starts = {family.name: spec for family in self.plan.structures if (spec := self._start(draft, family))}
        for share in self._shares[:1]:
            self._add(draft, [f for f in self.plan.structures if f.name not in draft.starts], share)

    def _start(self, draft: _Draft, family: AbstractStructure) -> str:
        """Of its smallest member, which is its fastest."""
        weight = self._weight(draft)
        tried = (family.start(weight, draft.moments, int(share * weight.numel())) for share in sorted(self._shares))
        return next((flatten(found)[1] for found in tried if not isinstance(found, NoMatch)), "")

    def _others(self, draft: _Draft) -> None:
        for place, share in enumerate(self._shares):
            wanted = [f for f in draft.families if place or f.name in draft.starts]
            self._add(draft, [f for f in wanted if place % SPARSE == 0 or not f.iterative], share)

    def _add(self, draft: _Draft, families: Sequence[AbstractStructure], share: float) -> None:
        known = {form.spelling for form in draft.forms}
        draft.forms += [form for form in self._fits(draft, families, share) if form.spelling not in known]

    def _fits(self, draft: _Draft, families: Sequence[AbstractStructure], share: float) -> list[_Form]:
        site, weight = draft.site, self._weight(draft)
        limit, rng = int(share * weight.numel()), self.context.rng(site)
        found, _ = fit_families(families, weight, draft.moments, limit, rng, shifted(self.graph, site))
        return [self._form(site, share, fit) for fit in found]

    def _weight(self, draft: _Draft) -> Tensor:
        weight = usable_weight(self.graph, draft.site)
        assert isinstance(weight, Tensor)
        return weight

    def _form(self, site: Site, share: float, fit: Fitted) -> _Form:
        return _Form(fit.spelling, share, fit.weighted_error, after_cost(site, fit.operator), flatten(fit.operator)[1])

    def _worthwhile(self, draft: _Draft) -> list[AbstractStructure]:
        """The families of the other limits."""
        forms = draft.forms
        if self.measured and len(forms) + len(draft.starts) > 1:
            dense, *seconds = self._seconds(draft, [*[form.spec for form in forms], *draft.starts.values()])
            times = dict(zip([*[form.family for form in forms], *draft.starts], (share_of(s, dense) for s in seconds), strict=True))
            kept = {name for name in draft.starts if times[name] < 1}
            kept |= {f.family for f in forms if not any(NEAR * g.error < f.error and times[g.family] < times[f.family] for g in forms)}
        else:
            least = min((form.error for form in forms), default=0.0)
            kept = {*draft.starts, *[form.family for form in forms if form.error <= NEAR * least]}
        return [f for f in self.plan.structures if f.name in kept or not (forms or draft.starts)]

    def _seconds(self, draft: _Draft, specs: Sequence[str]) -> list[tuple[float, ...]]:
        """At each token count, of the dense weight and of the forms. Time is one of shapes: no numbers are needed."""
        assert draft.site.shape is not None
        dense = Dense(torch.empty(draft.site.shape[::-1], device="meta"))
        return list(zip(*self.context.seconds([dense, *[skeleton(spec)[0] for spec in specs]]), strict=True))

    def _curve(self, draft: _Draft) -> Curve:
        columns = self._seconds(draft, [form.spec for form in draft.forms]) if self.measured else [()] * (1 + len(draft.forms))
        dense = Point("", 1.0, 0.0, site_cost(draft.site), columns[0])
        points = [Point(f.family, f.share, f.error, f.cost, s) for f, s in zip(draft.forms, columns[1:], strict=True)]
        return [dense, *[p for p in points if self._pays(p, dense)]]

    def _pays(self, point: Point, dense: Point) -> bool:
        if self.context.objective == "ms":
            return share_of(point.seconds, dense.seconds) < 1
        return point.cost.of(self.context.objective) < dense.cost.of(self.context.objective)
