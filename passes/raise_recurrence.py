"""`raise-recurrence`: a loop that was read as a linear recurrence becomes one node that runs many steps at a time; exact.

A time-invariant system may also run in chunks, with the matrices of many steps beside those of one, or with a transition that is the
identity minus a low rank kept as factors: the fastest is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from rewriter.graph import Graph, Site
from rewriter.operator import AbstractMap, AbstractRecurrence, tensors
from rewriter.passes.structures.householder import HouseholderProduct, HouseholderStructure
from rewriter.passes.structures.linear_system import LinearSystem, chunked
from rewriter.rule import AbstractPass, Context, Decision, against_dense
from rewriter.structure import NoMatch

LENGTHS = (16, 64)  # of chunks that are tried
GAIN = 0.9  # of the first form's time: what stores more has to be faster than timings scatter
MOST = 1 << 22  # numbers in the matrices of a chunk


@dataclass(frozen=True)
class RaiseRecurrence(AbstractPass):
    """Replaces every recurrence that was read."""

    name: ClassVar[str] = "raise-recurrence"
    summary: ClassVar[str] = "loops that are linear recurrences become one node each: delta rules, linear attention, state spaces; exact"

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        return context.decide("recurrence", lambda site: self._raised(graph, context, site))

    @staticmethod
    def _raised(graph: Graph, context: Context, site: Site) -> Decision:
        form = site.form
        if not isinstance(form, AbstractRecurrence):
            return Decision(site, site.reason)
        before = form.cost()
        if site.region is None:  # the node stands there already
            return Decision(site, site.reason, before, before, form, spelled(form), True, 0.0)
        forms = [form, *in_factors(form), *in_chunks(form)] if isinstance(form, LinearSystem) else [form]
        chosen, figures = fastest(context, forms)
        graph.splice(site, chosen)
        said = site.reason.partition(":")[0]
        speed = "" if chosen is form else f"; {figures}"
        return Decision(site, f"{said}, in one node{speed}", before, chosen.cost(), chosen, spelled(chosen), True, 0.0)


def in_factors(system: LinearSystem) -> list[AbstractMap]:
    """The system with its transition as I - U V^T, where it is one of low rank: Householder products among them."""
    found = HouseholderStructure().discover(system.transition.dense())
    return [] if isinstance(found, NoMatch) else [replace(system, transition=found.operator)]


def in_chunks(system: LinearSystem) -> list[AbstractMap]:
    """The system with the matrices of a chunk, for every length whose matrices are not too large."""
    p, q = (int(dims[-1]) for dims in (system.sequences()["input"], system.results()["output"]))
    lengths = [length for length in LENGTHS if length * length * p * q + length * (p + q) * system.order <= MOST]
    found = [chunked(system, length) for length in lengths]
    return [form for form in found if all(bool(t.isfinite().all()) for t in tensors(form))]  # powers of A may overflow where steps do not


def fastest(context: Context, forms: Sequence[AbstractMap]) -> tuple[AbstractMap, str]:
    """The form with the least summed time at the asked token counts, where that is under GAIN of the first's, else the first; and the
    best of the others beside the first, as measured."""
    if len(forms) == 1:
        return forms[0], ""
    table = context.seconds(forms)
    totals = [sum(column) for column in zip(*table, strict=True)]
    best = min(range(1, len(forms)), key=totals.__getitem__)
    if not totals[best] < GAIN * totals[0]:
        return forms[0], against_dense(context.tokens, [(row[0], row[best]) for row in table])
    return forms[best], ", ".join(f"{row[0] / row[best]:.1f}x step by step at T={t}" for t, row in zip(context.tokens, table, strict=True))


def spelled(form: AbstractMap) -> str:
    """For the report."""
    details = {"chunk": getattr(form, "length", None)}
    if isinstance(form, LinearSystem) and isinstance(form.transition, HouseholderProduct):
        details["factors"] = form.transition.u.shape[1]
    return type(form).__name__ + "".join(f":{name}={n}" for name, n in details.items() if n)
