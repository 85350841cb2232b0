"""What a rewritten model should take: the dense model's time, less its linear layers', plus that of the layers that stand in their place.

    predicted(T) = dense(T) - sum_s t(W_s, T) + sum_s t(form_s, T)

t is the target's figure for a layer alone, measured on this machine and cached by hardware and versions: the one by which passes choose
between forms. What is measured must bear it out: where the two are more than 15 % apart, the choices rest on figures that do not hold here.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from rewriter import registry
from rewriter.algebra import Dense
from rewriter.backend import Target
from rewriter.graph import Graph
from rewriter.operator import AbstractMatrix, flatten, skeleton
from rewriter.report import Latency

AGREE = 0.15  # of the predicted time


def predicted(rows: Sequence[Latency], dense: Graph, rewritten: Graph, target: Target) -> list[Latency]:
    """The rows with what is predicted; a note where the measured time is further off than AGREE."""
    before, after = layers(dense), layers(rewritten)
    return [_row(row, before - after, after - before, target) for row in rows]


def layers(graph: Graph) -> collections.Counter[str]:
    """How often each linear form is run, by its spec."""
    found = collections.Counter[str]()
    for node in graph.nodes():
        if isinstance(form := graph.operator(node), AbstractMatrix):
            found[flatten(form)[1]] += 1
    for detect in registry.detectors():
        for site in detect(graph):
            if site.kind == "linear" and site.shape is not None and site.operator is None:
                found[flatten(Dense(torch.empty(site.shape[::-1], device="meta")))[1]] += len(site.places)
    return found


def _row(row: Latency, gone: collections.Counter[str], come: collections.Counter[str], target: Target) -> Latency:
    if row.dense_seconds is None or row.rewritten_seconds is None:
        return row
    seconds = max(row.dense_seconds - _sum(gone, row, target) + _sum(come, row, target), 0.0)
    off = row.rewritten_seconds / seconds - 1 if seconds else math.inf
    if abs(off) <= AGREE:
        return replace(row, predicted_seconds=seconds)
    gap = f"{off:+.0%} from what" if seconds else f"{1e3 * row.rewritten_seconds:.3g} ms, and no time at all is what"
    said = f"at T={row.tokens} the measured time is {gap} its layers alone predict, more than {AGREE:.0%} off"
    return replace(row, predicted_seconds=seconds, note="; ".join(filter(None, (row.note, said))))


def _sum(forms: collections.Counter[str], row: Latency, target: Target) -> float:
    return sum(count * target.measure([skeleton(spec)[0]], row.tokens, row.threads)[0] for spec, count in forms.items())
