"""`block-lora`: an adapter's branch U D of rank r as A_s (B_1 + ... + B_n), one down-projection of rank r / n for all n up-projections.

Folded, that is a branch of rank r / n; the nearest one is the truncated singular value decomposition of U D, weighted by the second moments
of what the branch reads where they are known. U D is not multiplied out. Source: Zhou et al., Block-LoRA (arXiv:2501.16720).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.cost import Cost
from rewriter.errors import RewriteError
from rewriter.fit import after_cost, keep, part
from rewriter.graph import Graph, Place, Site, load_branch, load_matrix
from rewriter.moments import Moments
from rewriter.passes.solvers.spectral import ridged
from rewriter.passes.structures.low_rank import LowRank
from rewriter.rule import AbstractPass, Context, Decision
from rewriter.thin import Thin, thin
from rewriter.tolerances import EXACT

BLOCKS = 2


@dataclass(frozen=True)
class BlockLora(AbstractPass):
    """blocks: the rank becomes r / blocks, 2 where neither is given; energy: the share of a branch's energy to keep, by the least rank that
    does; with both the smaller rank is taken."""

    name: ClassVar[str] = "block-lora"
    summary: ClassVar[str] = "adapter branches at a lower rank, weighted by what they read: r / blocks, or what keeps a share of the energy"
    blocks: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RewriteError(f"block-lora:energy={self.energy} is out of range; give a share above 0 and up to 1, such as 0.95")

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        adapters = [s for s in context.selected if s.kind == "adapter"]
        open_sites = [s for s in adapters if s.region is not None]
        yield from (keep(s, s.reason) for s in adapters if s.region is None)
        for group in context.calibration.moments(open_sites):
            for site, moments in context.progress.track(group, "reducing adapters", len(group)):
                decision = self._reduced(graph, site, moments)
                yield decision
                if decision.operator is not None:
                    graph.splice(decision.site, decision.operator)
                    yield from _factors(context, site)

    def _reduced(self, graph: Graph, site: Site, moments: Moments | None) -> Decision:
        down, up = load_branch(graph, site)
        branch = replace(site, places=(_place(graph, site),))
        rank, (place,) = len(down), branch.places
        if reason := graph.can_splice(place) or _useless(down, up):
            return keep(site, reason)
        found = thin(down, up, None if moments is None else ridged(moments.second))
        assert site.dtype is not None
        kept, own = self._rank(found, rank, EXACT[site.dtype])
        before = _cost(down, up, site.dtype)
        if kept >= rank:
            return replace(keep(site, self._nothing(found, rank)), before=before, after=before)
        operator = LowRank(*(factor.T.contiguous() for factor in found.truncated(kept))).to(site.dtype)
        after, exact = after_cost(branch, operator), kept == own
        reason = f"rank {kept} instead of {rank}, {after.params:,} numbers instead of {before.params:,}: " + (
            "the branch has no more" if exact else _lost(graph, site, found, kept, moments)
        )
        error = found.gone(kept) / found.norm if exact else found.lost(kept)
        return Decision(branch, reason, before, after, operator, f"low-rank:rank={kept}", exact, error)

    def _rank(self, found: Thin, rank: int, level: float) -> tuple[int, int]:
        """(the rank to keep, the rank that the branch has)."""
        own = max(1, found.own_rank(level))
        bounds = [own] if self.energy is None else [own, max(1, found.keeping(self.energy, level))]
        if self.energy is None or self.blocks is not None:
            bounds.append(max(1, rank // (self.blocks or BLOCKS)))
        return min(bounds), own

    def _nothing(self, found: Thin, rank: int) -> str:
        """Why no rank is taken away."""
        if rank == 1:
            return "its rank is 1: nothing smaller does the same"
        lost = f"{found.lost(rank - 1):.2%}"
        return f"{self.spelling()} takes all of its rank {rank}: nothing gets smaller, rank {rank - 1} would lose {lost} of what it does"


def _useless(down: Tensor, up: Tensor) -> str:
    if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
        return "its factors hold NaN or inf"
    return "" if bool(down.any() and up.any()) else "its factors' product is zero: there is nothing to reduce"


def _place(graph: Graph, site: Site) -> Place:
    """The branch alone, from what its base reads to what is added; its bias stays."""
    assert site.region is not None
    (whole,), low, bias = site.places, site.region.inputs[2].value, site.weights.get("bias")
    nodes = (*site.region.nodes[:-1], graph.producer(low))
    return Place(nodes, whole.x, low, whole.layout, bias and bias.value, bias.scale if bias else 1.0)


def _cost(down: Tensor, up: Tensor, dtype: torch.dtype) -> Cost:
    return LowRank(down.T, up.T).to(dtype).cost()


def _lost(graph: Graph, site: Site, found: Thin, kept: int, moments: Moments | None) -> str:
    """What the rank costs, relative to the branch, and beside its base."""
    assert site.shape is not None
    base = float(load_matrix(graph, site.weights["base"], site.shape).double().norm())
    law = "its change" if moments is None else "what it does"
    return f"{found.lost(kept):.2%} of {law} is lost, in norms {found.gone(kept) / max(base, 1e-300):.3%} of its base's weight"


def _factors(context: Context, site: Site) -> Iterator[Decision]:
    """The sites of U and D, whose cost is said with the branch."""
    own = {id(site.weights[key].value) for key in ("down", "up")}
    for factor in context.selected:
        if factor.kind == "linear" and len(factor.places) == 1 and id(factor.weights["weight"].value) in own:
            yield replace(part(factor, f"a factor of {site.name}", site.name, "merged"), before=Cost())
