"""`raise-recurrence`: a loop that was read as a linear recurrence becomes one node that runs many steps at a time; exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rewriter.cost import Cost
from rewriter.graph import Graph, Site
from rewriter.rule import AbstractPass, Context, Decision


@dataclass(frozen=True)
class RaiseRecurrence(AbstractPass):
    """Replaces every recurrence that was read."""

    name: ClassVar[str] = "raise-recurrence"
    summary: ClassVar[str] = "loops that are linear recurrences become one node each: delta rules, linear attention, state spaces; exact"

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        for site in context.selected:
            if site.kind == "recurrence":
                yield self._raised(graph, site)

    @staticmethod
    def _raised(graph: Graph, site: Site) -> Decision:
        if site.form is None or site.region is None:
            return Decision(site, site.reason)
        graph.splice(site, site.form)
        said = site.reason.partition(":")[0]
        cost = site.form.cost()
        return Decision(site, f"{said}, in one node", Cost(0, cost.flops, 0), cost, site.form, type(site.form).__name__, True, 0.0)
