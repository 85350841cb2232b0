"""`raise-recurrence`: a loop that was read as a linear recurrence becomes one node that runs many steps at a time; exact.

A time-invariant system may also run in chunks, with the matrices of many steps beside those of one: the fastest length is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rewriter.graph import Graph, Site
from rewriter.operator import AbstractMap, AbstractRecurrence
from rewriter.passes.structures.linear_system import LinearSystem, chunked
from rewriter.rule import AbstractPass, Context, Decision

LENGTHS = (16, 64)  # of chunks that are tried
MOST = 1 << 22  # numbers in the matrices of a chunk


@dataclass(frozen=True)
class RaiseRecurrence(AbstractPass):
    """Replaces every recurrence that was read."""

    name: ClassVar[str] = "raise-recurrence"
    summary: ClassVar[str] = "loops that are linear recurrences become one node each: delta rules, linear attention, state spaces; exact"

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        for site in context.selected:
            earlier = context.decisions.get(site.id)
            if site.kind == "recurrence":
                yield earlier if earlier is not None and earlier.rewritten else self._raised(graph, context, site)

    @staticmethod
    def _raised(graph: Graph, context: Context, site: Site) -> Decision:
        form = site.form
        if not isinstance(form, AbstractRecurrence):
            return Decision(site, site.reason)
        before = form.cost()
        if site.region is None:  # the node stands there already
            return Decision(site, site.reason, before, before, form, spelled(form), True, 0.0)
        chosen, figures = fastest(context, [form, *in_chunks(form)]) if isinstance(form, LinearSystem) else (form, "")
        graph.splice(site, chosen)
        said = site.reason.partition(":")[0]
        return Decision(site, f"{said}, in one node{figures}", before, chosen.cost(), chosen, spelled(chosen), True, 0.0)


def in_chunks(system: LinearSystem) -> list[AbstractMap]:
    """The system with the matrices of a chunk, for every length whose matrices are not too large."""
    p, q = (int(dims[-1]) for dims in (system.sequences()["input"], system.results()["output"]))
    return [chunked(system, length) for length in LENGTHS if length * length * p * q + length * (p + q) * system.order <= MOST]


def fastest(context: Context, forms: Sequence[AbstractMap]) -> tuple[AbstractMap, str]:
    """The form with the least summed time at the asked token counts, and what was measured."""
    table = context.seconds(forms)
    totals = [sum(column) for column in zip(*table, strict=True)]
    best = totals.index(min(totals))
    speed = ", ".join(f"{row[0] / row[best]:.1f}x step by step at T={t}" for t, row in zip(context.tokens, table, strict=True))
    return forms[best], f"; {speed}" if best else ""


def spelled(form: AbstractMap) -> str:
    """For the report."""
    length = getattr(form, "length", None)
    return type(form).__name__ + (f":chunk={length}" if length else "")
