"""One run's state between its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rewriter.backend import Target
from rewriter.caches import Change, changes
from rewriter.calibrate import Feeds
from rewriter.graph import Graph, Site
from rewriter.options import Options
from rewriter.rule import AbstractPass, Context, Decision
from rewriter.sampling import Split


@dataclass
class Job:
    """What was given, what was found in it, and the last word on every site."""

    options: Options
    source: Any  # backends.files.load.Source
    graph: Graph  # rewritten in place
    target: Target
    samples: Split
    sites: Sequence[Site]
    context: Context
    begin: float
    passes: Sequence[AbstractPass]
    notes: list[str]

    @property
    def decisions(self) -> dict[str, Decision]:
        """The last word on every site, by id."""
        return self.context.decisions

    def reference(self, feeds: Feeds) -> Mapping[str, Tensor]:
        """The model as it was given."""
        return self.source.graph.run(feeds)  # type: ignore[no-any-return]

    @property
    def resized(self) -> list[Change]:
        """Caches of other sizes than they had."""
        return changes(self.source.graph.specs(), self.graph.specs())

    @property
    def lossy(self) -> list[Decision]:
        """What was approximated, worst first."""
        return sorted((d for d in self.decisions.values() if d.lossy), key=lambda d: -(d.error or 0.0))

    @property
    def rewritten(self) -> int:
        return sum(d.rewritten for d in self.decisions.values())
