"""Passes and decisions. A pass looks at sites and decides; every site gets a decision, with its reason.

A pass is a frozen dataclass: requires -> run -> ensures; its fields are its options on the command line. It rewrites by `graph.splice`, and
what it did can be taken back by `graph.restore`, so a later bound can give a site up again.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.allocate import Budget
from rewriter.backend import Target
from rewriter.cache import FitCache
from rewriter.calibrate import Calibration
from rewriter.cost import Cost
from rewriter.errors import RewriteError
from rewriter.graph import Graph, Site
from rewriter.operator import AbstractOperator
from rewriter.progress import Progress
from rewriter.structure import spell


@dataclass(frozen=True)
class Decision:
    """What becomes of one site. `before` and `after` are per token; kept sites have them equal."""

    site: Site
    reason: str  # never empty
    before: Cost = Cost()
    after: Cost = Cost()
    operator: AbstractOperator | None = None  # None: kept
    structure: str = ""  # as written on the command line
    exact: bool = False
    error: float | None = None  # weighted, relative to the site's product
    shift: Tensor | None = None  # what the bias gained
    part_of: str = ""  # the site whose operator, or weight, does this one's work too
    final: bool = False  # of a part: there is no way back, whatever becomes of that site
    # of what `restore` does not undo: whether it is to be exact, so that a bound may ask for it
    undo: Callable[[Graph, bool], None] | None = None

    @property
    def rewritten(self) -> bool:
        return self.operator is not None or bool(self.part_of)

    @property
    def lossy(self) -> bool:
        """Whether something was approximated, and may be given up."""
        return not self.exact and (self.operator is not None or self.undo is not None)

    def give_up(self, graph: Graph) -> None:
        """Take the approximation back."""
        self.undo(graph, True) if self.undo is not None else graph.restore(self.site)

    def redo(self, graph: Graph) -> None:
        """The inverse of `give_up`."""
        if self.undo is not None:
            self.undo(graph, False)
        else:
            assert self.operator is not None
            graph.splice(self.site, self.operator, self.shift)

    def kept(self, reason: str) -> Decision:
        """The same site, given up."""
        gone = replace(self, operator=None, structure="", exact=False, error=None, shift=None, part_of="", undo=None)
        return replace(gone, reason=reason, after=self.before)


@dataclass
class Context:
    """What a pass may ask while it runs."""

    target: Target
    calibration: Calibration
    tokens: tuple[int, ...]  # token counts that speed is judged at
    threads: int
    objective: str  # one of rewriter.allocate.UNITS, in which a lossy rewrite has to pay
    budget: Budget | None  # what all linear sites together may cost
    consent: bool  # lossy `auto` was asked for by a bound
    selected: Sequence[Site]  # the sites that globs leave
    fits: FitCache
    progress: Progress
    seed: int = 0
    two_forms: bool = False  # one of the passes stores two forms of a site where each wins at some token count
    decisions: dict[str, Decision] = field(default_factory=dict)  # of earlier passes, by site id

    def decide(self, kind: str, one: Callable[[Site], Decision]) -> Iterator[Decision]:
        """The decision on every selected site of a kind; what an earlier pass rewrote stays as it is."""
        for site in self.selected:
            if site.kind == kind:
                earlier = self.decisions.get(site.id)
                yield earlier if earlier is not None and earlier.rewritten else one(site)

    def rng(self, site: Site) -> torch.Generator:
        """The site's own generator: independent of order and of what else is rewritten."""
        generator = torch.Generator()
        generator.manual_seed((self.seed * 1_000_003 + int.from_bytes(site.name.encode()[-7:], "little")) % (1 << 63))
        return generator

    def seconds(self, forms: Sequence[AbstractOperator]) -> list[list[float]]:
        """Measured on the target: one row for each token count, one figure for each form."""
        return [self.target.measure(forms, tokens, self.threads) for tokens in self.tokens]


@dataclass(frozen=True)
class AbstractPass(abc.ABC):
    """A rewrite of a graph. Laws: every selected site gets exactly one decision; a kept site's nodes are as they were; same seed, same
    result."""

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for `rewrite passes`
    two_forms: ClassVar[bool] = False  # see Context
    whole: ClassVar[bool] = False  # its samples are whole sequences, whose caches are empty
    kinds: ClassVar[dict[str, type[AbstractPass]]] = {}

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("Abstract"):
            AbstractPass.kinds[cls.name] = cls

    def requires(self, graph: Graph) -> None:
        """RewriteError where the pass cannot work on such a graph at all."""

    @abc.abstractmethod
    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        """Decide, and splice what is rewritten."""

    def ensures(self, graph: Graph) -> None:
        """Check what the pass promises of the graph it leaves; a violation is a bug, not bad input."""

    def spelling(self) -> str:
        """As written on the command line."""
        return spell(self)


def given_up(decisions: Mapping[str, Decision], decision: Decision, reason: str) -> list[Decision]:
    """The decision, its approximation taken back, and those of the sites that were part of it."""
    if decision.undo is not None and decision.operator is None:
        return [replace(decision, reason=f"merged whole; {reason}", exact=True, error=0.0, undo=None)]
    found = [decision.kept(reason)]
    for lost in found:  # a part may have parts
        name = lost.site.name
        parts = [d for d in decisions.values() if d.part_of == name and not d.final]
        found += [part.kept(f"{name}, which it was part of, was given up: {reason}") for part in parts]
    return found


def against_dense(tokens: Sequence[int], table: Sequence[tuple[float, float]]) -> str:
    """`0.950 ms against 1.000 ms dense at T=64`, for each token count with its seconds (dense, form)."""
    return "; ".join(
        f"{1e3 * form:.3f} ms against {1e3 * dense:.3f} ms dense at T={t}" for t, (dense, form) in zip(tokens, table, strict=True)
    )


def check_share(share: float | None, where: str) -> None:
    """RewriteError unless a share of the dense numbers lies in (0, 1]."""
    if share is not None and not 0 < share <= 1:
        raise RewriteError(f"{where}={share} is out of range; give a share of the dense numbers above 0 and up to 1, such as 0.5")
