"""`auto`: at each site the family with the least weighted error among the forms that pay; exact structure first, "leave it" always allowed.

Alone it does exact discovery only; a lossy fit needs `params=`, `--budget` or `--max-error`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rewriter.decide import decide_all
from rewriter.fit import Plan
from rewriter.graph import Graph
from rewriter.registry import structures
from rewriter.rule import AbstractPass, Context, Decision, check_share
from rewriter.structure import HALF


@dataclass(frozen=True)
class Auto(AbstractPass):
    """params: at most this share of each site's dense numbers."""

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "each site in the family with the least weighted error that pays; exact structure is found without a budget"
    params: float | None = None

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        check_share(self.params, "auto:params")
        families = [kind() for kind in structures().values() if not kind.named_only]
        lossy = self.params is not None or context.budget is not None or context.consent
        share = self.params or (1.0 if context.budget else HALF)
        yield from decide_all(graph, context, Plan(families, lossy, share, budget=context.budget))
