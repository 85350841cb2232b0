"""`quantize`: weights in 8 bits with a scale for each column of each block, or in 4 with one for every few rows of it, around whatever form
a site has by then; dense ones too.

Factors are rounded in their balanced gauge: W = A B is also (A G)(G^-1 B), and rounding sees the difference. Rows that others are combined
from are rounded worst, their error times coefficients up to 50: pivoted factors become plain ones, or are multiplied out where those would
be larger.

On ONNX Runtime integers are multiplied, with inputs rounded at each call; a site keeps its floats where that is no faster. An output layer
that is tied to an embedding table reads all of it at each token: where time counts, it gets 8 bits of its own beside the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rewriter.algebra import ByTokens, Compose, Dense, Permutation
from rewriter.cost import Cost
from rewriter.errors import RewriteError
from rewriter.fit import keep, refusal, usable_weight
from rewriter.graph import Graph, Site
from rewriter.moments import Moments, isotropic
from rewriter.operator import AbstractMatrix
from rewriter.passes.structures.low_rank import LowRank, LowRankStructure
from rewriter.quantised import BITS, Quantised, quantised
from rewriter.rule import AbstractPass, Context, Decision


@dataclass(frozen=True)
class Quantize(AbstractPass):
    """bits: 8, or 4 where those beat 8; dense: whether sites that no pass rewrote are rounded as well."""

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "weights of linears in 8 or 4 bits, structured ones too, where that is faster, or smaller for that objective"
    bits: int = 8
    dense: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise RewriteError(f"quantize:bits={self.bits} is not allowed; give {' or '.join(map(str, BITS))}")

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        decisions, open_sites = {s.id: context.decisions.get(s.id) or keep(s, "") for s in context.selected}, []
        for site in context.selected:
            refused = self._refused(site, decisions[site.id], context)
            if refused is None:
                open_sites.append(decisions[site.id].site)
            else:
                decisions[site.id] = replace(decisions[site.id], reason=refused)
        for site in open_sites:  # inputs are those of the model as it was given, by which earlier passes judged
            if decisions[site.id].rewritten:
                graph.restore(site)
        for group in context.calibration.moments(open_sites):
            for site, moments in context.progress.track(group, f"rounding to {self.bits} bits", len(group)):
                decisions[site.id] = _rounded(graph, context, decisions[site.id], moments, self.bits)
        for decision in (decisions[site.id] for site in open_sites):
            if decision.operator is not None:
                graph.splice(decision.site, decision.operator, decision.shift)
        yield from decisions.values()

    def _refused(self, site: Site, earlier: Decision, context: Context) -> str | None:
        """Why the site stays as it is; None where it may be rounded."""
        if earlier.part_of or (earlier.rewritten and not isinstance(earlier.operator, AbstractMatrix)):
            return earlier.reason
        beside = site.stays and context.objective == "ms"
        if not earlier.rewritten and (reason := refusal(replace(site, reason="") if beside else site)):
            return earlier.reason or reason
        if not earlier.rewritten and not self.dense:
            return _joined(earlier.reason, "no earlier pass rewrote this one, and quantize:dense=false leaves those")
        if site.dtype != torch.float32:
            return _joined(earlier.reason, f"its weight is {str(site.dtype).removeprefix('torch.')}; integers stand for float32 here")
        return None


def _rounded(graph: Graph, context: Context, decision: Decision, moments: Moments | None, bits: int) -> Decision:
    site, before = decision.site, decision.operator
    own = isinstance(before, AbstractMatrix) and (decision.exact or not site.weights)  # of a merged chain no one weight is stored
    weight = before.dense() if own and isinstance(before, AbstractMatrix) else usable_weight(graph, site)
    if isinstance(weight, str):
        return keep(site, weight)
    before = before or Dense(weight.T.contiguous())
    assert isinstance(before, AbstractMatrix)
    floats = before.to(torch.float32)
    # two forms, each rounded by itself, would be two functions
    even, structure = _evened(floats.few if isinstance(floats, ByTokens) else floats, decision.structure)
    forms = [made for b in BITS if b >= bits and (made := quantised(even, b)) is not None and made.bits == b]
    if not forms:
        return replace(decision, reason=_joined(decision.reason, "no weight of it is multiplied: nothing to round"))
    made, figures = _weighed(context, floats, forms, decision.after if decision.rewritten else decision.before)
    if made is None:
        return replace(decision, reason=_joined(decision.reason or site.reason, figures))
    if site.stays:
        figures = _joined(figures, f"beside the dense matrix, which stays for {', '.join(site.weights['weight'].shared_by)}")
    seen, dense = moments or isotropic(weight.shape[1]), made.dense()
    shift = None if decision.shift is None else seen.shift(weight, dense)
    error = seen.error(weight, dense, shifted=shift is not None)
    error = error if site.weights else math.hypot(error, decision.error or 0.0)  # beside what was lost before
    structure = f"{structure} in {made.bits} bits" if structure else f"{made.bits} bits"
    reason = _joined(decision.reason if decision.rewritten else "", figures)
    rounded = replace(decision, reason=reason, after=_cost(site, made, decision.before), operator=made, structure=structure)
    return replace(rounded, exact=False, error=error, shift=shift)


def _evened(operator: AbstractMatrix, structure: str) -> tuple[AbstractMatrix, str]:
    """The same matrix in the form that rounds best, and its structure; none where that is a dense weight."""
    even = operator.balanced()
    if isinstance(even, Compose) and [type(f) for f in even.factors] == [LowRank, Permutation]:
        factors, order = even.factors
        assert isinstance(factors, LowRank) and isinstance(order, Permutation)
        even = LowRank(factors.down, factors.up[:, order.index])
    if not isinstance(even, LowRank) or isinstance(operator, LowRank):
        return even, structure
    if even.cost().params >= operator.shape[0] * operator.shape[1]:
        return Dense(operator.dense().T.contiguous()), ""
    return even, replace(LowRankStructure(), rank=len(even.up)).spelling()


def _weighed(context: Context, floats: AbstractMatrix, forms: Sequence[Quantised], before: Cost) -> tuple[Quantised | None, str]:
    """The form that pays most, or None, with the numbers. What is no time is bytes: integers are as many numbers as floats."""
    if context.objective != "ms":
        best = min(forms, key=lambda form: form.cost().nbytes)
        after = best.cost().nbytes
        if after >= before.nbytes:
            return None, f"{best.bits} bits do not pay: {after:,} bytes against {before.nbytes:,}"
        return best, f"in {best.bits} bits"
    table = context.seconds([floats, *forms])
    slow, *totals = (sum(column) for column in zip(*table, strict=True))
    i = totals.index(min(totals))
    best, fast = forms[i], totals[i]
    if fast >= slow:
        at = ", ".join(map(str, context.tokens))
        return None, f"{best.bits} bits do not pay: {1e3 * fast:.3f} ms against {1e3 * slow:.3f} ms in floats at T={at}"
    ratios = [f"{row[0] / row[1 + i]:.1f}x floats at T={t}" for t, row in zip(context.tokens, table, strict=True)]
    return best, f"in {best.bits} bits: {', '.join(ratios)}"


def _cost(site: Site, made: AbstractMatrix, dense: Cost) -> Cost:
    """Stored once, executed at each place; the dense matrix too where it stays."""
    one, kept = made.cost(), dense if site.stays else Cost(0, 0, 0)
    return Cost(one.params + kept.params, one.flops * len(site.places), one.nbytes + kept.nbytes)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
