"""One pass for each structure: `low-rank:rank=64`, `monarch:blocks=4:params=0.5`. A named structure is consent to a lossy fit.

Without params a structure may store its own share of the dense numbers, mostly half; a set rank or block count wins, and params bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar

from rewriter.decide import decide_all
from rewriter.fit import Plan
from rewriter.graph import Graph
from rewriter.rule import AbstractPass, Context, Decision, check_share
from rewriter.structure import AbstractStructure


@dataclass(frozen=True)
class StructurePass(AbstractPass):
    """A structure applied to every linear site."""

    name: ClassVar[str] = "structure"
    summary: ClassVar[str] = "one structure at every site"
    structure: AbstractStructure | None = None
    params: float | None = None

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        assert self.structure is not None
        check_share(self.params, f"{self.structure.name}:params")
        explicit = any(getattr(self.structure, f.name) != f.default for f in fields(self.structure))
        share = self.params or (1.0 if context.budget else self.structure.share)
        bounded = self.params is not None or context.budget is not None
        yield from decide_all(graph, context, Plan([self.structure], True, share, explicit and bounded, context.budget))

    def spelling(self) -> str:
        assert self.structure is not None
        return self.structure.spelling() + (f":params={self.params}" if self.params is not None else "")
