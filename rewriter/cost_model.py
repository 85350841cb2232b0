"""What a rewritten model should take: the dense model's time, less that of the layers that are gone, plus that of those in their place.

    predicted = dense * (t(dense) - sum_gone t(layer) + sum_come t(layer)) / t(dense)

t is the target's figure for a layer alone, measured on this machine and cached by hardware and versions, as those are by which passes
choose between forms; that of the dense model was taken in the same rounds, so that a busier machine cancels. What is measured must bear it
out: where the two are more than 15 % apart, the choices rest on figures that do not hold here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from rewriter import registry
from rewriter.algebra import Dense
from rewriter.backend import Layer, Runner, Target, Whole
from rewriter.caches import fitted
from rewriter.graph import Graph, Site, Value
from rewriter.latency import Batch
from rewriter.operator import AbstractMatrix, flatten, skeleton
from rewriter.report import Latency
from rewriter.timing import interleave

AGREE = 0.15  # of the predicted time


class Base:
    """The dense model that others are compared with on some batches: what they have in common is found once."""

    def __init__(self, graph: Graph, run: Runner, feeds: Sequence[Batch], target: Target) -> None:
        self.graph, self.run, self.feeds, self.target = graph, run, feeds, target
        self._layers: dict[int, Counter[Layer]] = {}  # by the batch's place

    @cached_property
    def _sites(self) -> list[Site]:
        return registry.sites(self.graph)

    @cached_property
    def _key(self) -> str:
        return self.graph.fingerprint()

    def predicted(self, rows: Sequence[Latency], other: Graph) -> list[Latency]:
        """The rows, one for each batch, with what is predicted of the other; a note where the measured time is further off."""
        sites = registry.sites(other)
        return [self._predicted(row, i, batch, other, sites) for i, (row, batch) in enumerate(zip(rows, self.feeds, strict=True))]

    def _predicted(self, row: Latency, i: int, batch: Batch, other: Graph, sites: Sequence[Site]) -> Latency:
        if isinstance(batch, str) or row.dense_seconds is None or row.rewritten_seconds is None:
            return row
        try:
            if i not in self._layers:
                self._layers[i] = self.target.layers(self.graph, self._sites, batch)
            own = fitted(batch, other.specs(), drawn=True)
            before, after = self._layers[i], self.target.layers(other, sites, own)
            whole = Whole(" ".join([self._key, *(f"{name} {list(x.shape)}" for name, x in batch.items())]), partial(self.run, batch))
            share = _share(after - before, before - after, whole, row.threads, self.target)
        except Exception as problem:  # a layer that does not run alone is no reason to lose what was measured
            return _noted(row, f"nothing is predicted at T={row.tokens}: {' '.join(str(problem).split())[:160]}")
        return _row(row, row.dense_seconds * share)


def _noted(row: Latency, said: str) -> Latency:
    return replace(row, note="; ".join(filter(None, (row.note, said))))


def _row(row: Latency, predicted: float) -> Latency:
    assert row.rewritten_seconds is not None
    seconds = max(predicted, 0.0)
    off = row.rewritten_seconds / seconds - 1 if seconds else math.inf
    if abs(off) <= AGREE:
        return replace(row, predicted_seconds=seconds)
    gap = f"{off:+.0%} from what" if seconds else f"{1e3 * row.rewritten_seconds:.3g} ms, and no time at all is what"
    said = f"at T={row.tokens} the measured time is {gap} its layers alone predict, more than {AGREE:.0%} off"
    return replace(_noted(row, said), predicted_seconds=seconds)


def _share(come: Counter[Layer], gone: Counter[Layer], whole: Whole, threads: int, target: Target) -> float:
    """What is left of the dense model's time."""
    among = sorted({*come, *gone}, key=lambda layer: layer.key)
    if not among:
        return 1.0
    *seconds, dense = target.measure_layers(among, whole, threads)
    return 1 + sum((come[layer] - gone[layer]) * took for layer, took in zip(among, seconds, strict=True)) / dense


def by_form(graph: Graph, sites: Sequence[Site], feeds: Mapping[str, Tensor]) -> Counter[Layer]:
    """The linear layers by their spec alone, for targets that time nothing beside it."""
    forms: dict[Value, AbstractMatrix] = {}
    for node in graph.nodes():
        if isinstance(form := graph.operator(node), AbstractMatrix):
            forms[graph.outputs(node)[0]] = form
    for site in sites:
        if site.kind == "linear" and site.shape is not None and site.operator is None:
            dense = Dense(torch.empty(site.shape[::-1], device="meta"))
            forms |= dict.fromkeys((place.y for place in site.places), dense)
    found = Counter[Layer]()

    def count(form: AbstractMatrix, y: Tensor) -> None:
        rows, (_, spec) = y.numel() // form.shape[0], flatten(form)
        found[Layer(f"{rows} {spec}", rows, spec)] += 1

    graph.run(feeds, {y: partial(count, form) for y, form in forms.items() if graph.can_tap(y)})
    return found


def measure_forms(target: Target, layers: Sequence[Layer], whole: Whole, threads: int) -> list[float]:
    """Seconds of such layers, of all that run on so many rows together; then those of the whole model."""
    seconds: dict[Layer, float] = {}
    for rows in dict.fromkeys(layer.tokens for layer in layers):
        those = [layer for layer in layers if layer.tokens == rows]
        seconds |= zip(those, target.measure([skeleton(layer.what)[0] for layer in those], rows, threads), strict=True)
    return [*(seconds[layer] for layer in layers), interleave([whole.call], again=True).seconds(0)]
