"""`correct`: refits lossy sites in order, each to what the dense model's site gives, from the inputs that the rewritten model feeds it.

T = W (I + E[d x'] E[x x']^-1),  d = (the dense model's input) - x:  the least squares of the dense products W (x + d) on the input x that
the rewritten model has there, corrections before it included. The site's own form is fitted to T under x, and its bias takes up the mean of
what is left. Covariances instead of second moments where it has such a bias.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.algebra import ByTokens
from rewriter.calibrate import Feeds, Samples, padding_mask, site_rows, source
from rewriter.cuts import cuts
from rewriter.errors import RewriteError
from rewriter.fit import after_cost, keep, shifted, usable_weight
from rewriter.graph import Graph, Site, Value
from rewriter.moments import Accumulator, Moments
from rewriter.operator import AbstractMatrix
from rewriter.output_error import OutputErrors
from rewriter.passes.healing.blockwise import Chain
from rewriter.passes.healing.targets import Targets
from rewriter.quantised import Quantised
from rewriter.registry import parse_passes, structures
from rewriter.rule import AbstractPass, Context, Decision

HELD_OUT = 8  # every eighth batch judges
RIDGE = 1e-3  # of the inputs' mean square: what no sample shows is not corrected
ROWS = 4096  # that go into moments at a time
GAIN = 1e-3  # of the error of a site's product, below which nothing is changed
Stage = list[Decision]  # sites that read the same value


@dataclass(frozen=True)
class Correct(AbstractPass):
    """No options: it runs each block over the calibration samples once for each value that lossy sites read there."""

    name: ClassVar[str] = "correct"
    summary: ClassVar[str] = "refits lossy sites in order to what reaches them, in closed form; kept only where that is better"

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        decisions = {s.id: context.decisions.get(s.id) or keep(s, "no earlier pass rewrote this one") for s in context.selected}
        lossy = [d for d in decisions.values() if isinstance(d.operator, AbstractMatrix) and not d.exact and not _fixed(d)]
        if lossy:
            decisions |= {d.site.id: d for d in _Correction(graph, context, _samples(context)).of(lossy)}
        yield from decisions.values()


def _fixed(decision: Decision) -> bool:
    """Whether its weights are integers: a correction would be floats again, so it goes before they are rounded. So it does before a second
    form is made of them, and before neighbours are one."""
    return isinstance(decision.operator, Quantised | ByTokens) or not decision.site.weights


def _samples(context: Context) -> Samples:
    """What is fitted to; RewriteError where nothing says what the model will see."""
    samples = context.calibration.samples
    if samples is None or samples.invented:
        raise RewriteError("correct fits to what the model will see, and invented inputs are not that; give --data")
    if len(samples.batches) < 2:
        raise RewriteError("correct needs two batches of samples at least, one to fit and one to judge by; give more --data")
    return samples


@dataclass(frozen=True)
class _Fed:
    """Joint moments of [x; d], (2n, 2n), on the samples that are fitted and on those that judge."""

    fitted: Moments
    held: Moments


class _Gathered:
    """An accumulator that takes many rows at a time: to add to its matrix costs as much as a few hundred of them."""

    def __init__(self, features: int) -> None:
        self.accumulator, self.waiting = Accumulator(features), list[Tensor]()

    def add(self, rows: Tensor) -> None:
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) >= ROWS:
            self._flush()

    def moments(self, law: str, shrunk: bool) -> Moments | None:
        """None where there was no row."""
        self._flush()
        return self.accumulator.moments(law, shrunk) if self.accumulator.count else None

    def _flush(self) -> None:
        if sum(map(len, self.waiting)):
            self.accumulator.update(torch.cat(self.waiting))
        self.waiting.clear()


class _Correction:
    """States of both models lie on disk while it works; the graph holds the decisions that it gives, whatever happens."""

    def __init__(self, graph: Graph, context: Context, samples: Samples) -> None:
        self.graph, self.context, self.samples = graph, context, samples

    def of(self, lossy: Sequence[Decision]) -> list[Decision]:
        kept = list(lossy)
        try:
            for d in lossy:
                self.graph.restore(d.site)
            judges = OutputErrors(self.graph, replace(self.samples, batches=self.samples.batches[::HELD_OUT]))
            blocks = cuts(self.graph, [d.site for d in lossy])
            with judges as errors, tempfile.TemporaryDirectory(prefix="rewriter-correct-") as folder:
                self.dense = Targets(Path(folder))
                (inputs := Path(folder) / "inputs").mkdir()
                self.chain = Chain(self.graph, [end for end, _ in blocks], self.samples.batches, self.dense, inputs)
                stages = _stages(self.graph, lossy, blocks)
                self._teach([stage for _, group in stages for stage in group])
                self._splice(lossy)
                before = errors.now()
                changed = self._corrected(stages)
                after = errors.now()
            said = f"output error {before:.3g} to {after:.3g} on held-back samples"
            if after <= before:
                kept = [changed.get(d.site.id) or _untouched(d, "it stands inside a branch or loop") for d in lossy]
            else:
                kept = [replace(d, reason=f"{d.reason}; correction did not help ({said}): left as it was") for d in lossy]
        finally:
            self._splice(kept)
        return kept

    def _splice(self, decisions: Sequence[Decision]) -> None:
        for d in decisions:
            assert d.operator is not None
            self.graph.splice(d.site, d.operator, d.shift)

    def _teach(self, stages: Sequence[Stage]) -> None:
        """Keep what the sites read in the dense model."""
        wanted, batches = _inputs(stages), self.samples.batches
        for index, feeds in enumerate(self.context.progress.track(batches, "the dense model's inputs", len(batches))):
            self.dense.put(index, _rows(stages, feeds, self.graph.part(feeds, {}, wanted)))

    def _corrected(self, stages: Sequence[tuple[int, Sequence[Stage]]]) -> dict[str, Decision]:
        """The decisions by site, refitted where that is better on what judges; the graph holds them."""
        done, changed = 0, dict[str, Decision]()
        for block, group in self.context.progress.track(stages, "correcting", len(stages)):
            for passed in range(done, block):
                self.chain.advance(passed, range(len(self.samples.batches)))
            done = block
            for stage in group:
                fed = self._fed(block, stage)
                found = [_untouched(d, fed) if isinstance(fed, str) else self._refitted(d, fed) for d in stage]
                self._splice(found)
                changed |= {d.site.id: d for d in found}
        return changed

    def _fed(self, block: int, stage: Stage) -> _Fed | str:
        site, wanted = stage[0].site, _inputs([stage])
        assert site.shape is not None
        fitted, held = _Gathered(2 * site.shape[1]), _Gathered(2 * site.shape[1])
        for index, feeds in enumerate(self.samples.batches):
            now, then = _rows([stage], feeds, self.chain.values(block, index, wanted))[site.id], self.dense[index][site.id]
            if now.shape != then.shape:
                return "the rewritten model gives it other rows than the dense one"
            (fitted if index % HELD_OUT else held).add(torch.cat([now, then - now], 1))
        law = self.samples.law
        one, other = fitted.moments(law, True), held.moments(law, False)
        return "no samples reach it" if one is None or other is None else _Fed(one, other)

    def _refitted(self, decision: Decision, fed: _Fed) -> Decision:
        """The better of a refit and of a new bias alone, where it is better than what stands there."""
        weight, site = usable_weight(self.graph, decision.site), decision.site
        assert isinstance(weight, Tensor) and isinstance(decision.operator, AbstractMatrix)
        before = _error(weight, decision.operator, decision.shift, fed.held)
        found = []
        for operator, spelling in self._forms(decision, weight, fed.fitted):
            shift = _gap(weight, operator) @ fed.fitted.mean if shifted(self.graph, site) else None
            error = _error(weight, operator, shift, fed.held)
            after = after_cost(site, operator)
            found.append(replace(decision, operator=operator, structure=spelling, shift=shift, error=error, after=after))
        best = min(found, key=lambda d: d.error or 0.0)
        said = f"the error of its product on held-back samples {before:.3g} to {best.error:.3g}"
        if not (best.error or 0.0) < (1 - GAIN) * before:
            return _untouched(decision, f"it would take {said}")
        return replace(best, reason=f"{decision.reason}; corrected: {said}")

    def _forms(self, decision: Decision, weight: Tensor, fed: Moments) -> list[tuple[AbstractMatrix, str]]:
        """What stands there, and its family's fit at the same options and no more numbers, where a structure made it."""
        site, operator = decision.site, decision.operator
        assert isinstance(operator, AbstractMatrix) and site.dtype is not None
        if decision.structure.partition(":")[0] not in structures():
            return [(operator, decision.structure)]
        seen = fed.centered() if shifted(self.graph, site) else fed
        (step,) = parse_passes(decision.structure)
        fit = step.structure.fit(target(weight, seen), _of_inputs(seen), operator.cost().params, self.context.rng(site))
        return [(operator, decision.structure), *([(fit.operator.to(site.dtype), fit.spelling)] if fit else [])]


def _stages(graph: Graph, lossy: Sequence[Decision], blocks: Sequence[tuple[Value, Sequence[Site]]]) -> list[tuple[int, list[Stage]]]:
    """Each block's stages in order, the block behind the last cut included; without sites inside branches and loops."""
    number = {site.id: i for i, (_, sites) in enumerate(blocks) for site in sites}

    def block(d: Decision) -> int:
        return number.get(d.site.id, len(blocks))

    plain = sorted((d for d in lossy if all(graph.body(p.nodes[0]) == "" for p in d.site.places)), key=block)
    grouped = itertools.groupby(plain, block)
    return [(i, [list(stage) for _, stage in itertools.groupby(group, lambda d: source(d.site))]) for i, group in grouped]


def _inputs(stages: Sequence[Stage]) -> list[Value]:
    return [place.x for stage in stages for place in stage[0].site.places]


def _rows(stages: Sequence[Stage], feeds: Feeds, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """What each stage's sites multiply of the values that they read, (rows, n), by the site that comes first; real rows only."""
    mask, left = padding_mask(feeds), iter(values)
    read = {stage[0].site.id: [site_rows(next(left), p.layout, mask).flatten(0, -2) for p in stage[0].site.places] for stage in stages}
    return {key: torch.cat(rows) for key, rows in read.items()}


def _untouched(decision: Decision, why: str) -> Decision:
    return replace(decision, reason=f"{decision.reason}; not corrected: {why}")


def target(weight: Tensor, fed: Moments) -> Tensor:
    """T, (m, n) in the weight's dtype, from the joint moments of [x; d]."""
    n = weight.shape[1]
    square, crossed = fed.second[:n, :n], fed.second[n:, :n]
    ridge = RIDGE * square.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny) * torch.eye(n, dtype=torch.float64)
    w = weight.double()
    corrected: Tensor = w + w @ torch.linalg.solve(square + ridge, crossed.T).T
    return corrected.to(weight.dtype)


def _of_inputs(fed: Moments) -> Moments:
    n = fed.features // 2
    return replace(fed, second=fed.second[:n, :n].contiguous(), mean=fed.mean[:n])


def _gap(weight: Tensor, operator: AbstractMatrix) -> Tensor:
    """(m, 2n): W (x + d) - W' x = [W - W', W] [x; d]."""
    w = weight.double()
    return torch.cat([w - operator.to(torch.float64).dense(), w], 1)


def _error(weight: Tensor, operator: AbstractMatrix, shift: Tensor | None, fed: Moments) -> float:
    """Of the site's product and shift, relative to the dense model's product there."""
    gap, w = _gap(weight, operator), weight.double()
    left = gap @ fed.mean - (0 if shift is None else shift)
    lost = ((gap @ fed.covariance()) * gap).sum() + left.square().sum()
    dense = fed.energy(torch.cat([w, w], 1))
    return float((lost.clamp_min(0) / max(dense, torch.finfo(torch.float64).tiny)).sqrt())
