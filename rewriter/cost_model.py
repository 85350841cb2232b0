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
from functools import partial

import torch
from torch import Tensor

from rewriter import registry
from rewriter.algebra import Dense
from rewriter.backend import Layer, Runner, Target, Whole
from rewriter.graph import Graph, Site, Value
from rewriter.latency import Batch
from rewriter.operator import AbstractMatrix, flatten, skeleton
from rewriter.report import Latency
from rewriter.timing import interleave

AGREE = 0.15  # of the predicted time


def predicted(rows: Sequence[Latency], feeds: Sequence[Batch], a: Graph, b: Graph, dense: Runner, target: Target) -> list[Latency]:
    """The rows with what is predicted of B from A, which `dense` runs, on each batch; a note where the measured time is further off."""
    graphs = [(graph, [site for detect in registry.detectors() for site in detect(graph)]) for graph in (a, b)]
    found = []
    for row, batch in zip(rows, feeds, strict=True):
        if isinstance(batch, str) or row.dense_seconds is None or row.rewritten_seconds is None:
            found.append(row)
            continue
        sizes = [f"{name} {list(x.shape)}" for name, x in batch.items()]
        whole = Whole(" ".join([a.fingerprint(), *sizes]), partial(dense, batch))
        try:
            before, after = (target.layers(graph, sites, batch) for graph, sites in graphs)
            share = _share(after - before, before - after, whole, row.threads, target)
        except Exception as problem:  # a layer that does not run alone is no reason to lose what was measured
            found.append(_noted(row, f"nothing is predicted at T={row.tokens}: {' '.join(str(problem).split())[:160]}"))
            continue
        found.append(_row(row, row.dense_seconds * share))
    return found


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
    return [*(seconds[layer] for layer in layers), interleave([whole.call]).seconds(0)]
