"""Room for adapters in an ONNX graph: y + (x A) B + c, where A and B are inputs of the model that default to rank zero.

    A (n, r), B (r, m)      r is chosen with each run; without an adapter it is 0, and y is the base's
    c (m,)                  zeros by default; where an adapter has biases

Linears that read one value share A, so that x is multiplied once: A = [A_1 ... A_k], each (n, r), and Split takes the parts asunder.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor

from rewriter.adapters import Update
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.graph import PLAIN, Site

ATTRIBUTE_SINCE = 18  # Split is told how many parts there are


@dataclass(frozen=True)
class Part:
    """One linear's share of a slot."""

    up: str  # the input that is its B
    features: int  # m
    bias: str | None = None  # the input that is its c


@dataclass(frozen=True)
class Slot:
    """The inputs of linears that share A."""

    down: str  # the input that is A
    features: int  # n
    parts: Mapping[str, Part]  # by the site's id, as they lie in A
    dtype: torch.dtype

    def filled(self, updates: Mapping[str, Update]) -> dict[str, Tensor]:
        """Its inputs' values for updates by site; each is as wide as the widest, with zeros, and those without one are zero."""
        rank = max(len(update.down) for update in updates.values())
        downs, found = [], {}
        for site, part in self.parts.items():
            a, b = torch.zeros(self.features, rank), torch.zeros(rank, part.features)
            if (update := updates.get(site)) is not None:
                a[:, : len(update.down)], b[: len(update.down)] = update.down.T, update.up.T
            downs.append(a)
            found[part.up] = b.to(self.dtype)
            if part.bias is not None and update is not None and update.shift is not None:
                found[part.bias] = update.shift.to(self.dtype)
        return {self.down: torch.cat(downs, 1).to(self.dtype), **found}


def opened(graph: OnnxGraph, sites: Sequence[Site], biased: Container[str] = ()) -> list[Slot]:
    """In place: room at each of the sites, and for a bias at those whose ids are in `biased`."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        (first, *others) = site.places
        alone = others or first.layout != PLAIN
        groups.setdefault(site.id if alone else (first.x, first.nodes[0].graph, site.dtype), []).append(site)
    return [_slot(graph, group, biased) for group in groups.values()]


def _slot(graph: OnnxGraph, group: Sequence[Site], biased: Container[str]) -> Slot:
    site, together = group[0], _named_together([s.name for s in group])
    assert site.shape is not None and site.dtype is not None
    n, rank = site.shape[1], f"{together}.rank"
    a = _input(graph, f"{together}.lora_A", (n, 0), (n, rank if len(group) == 1 else f"{rank}*{len(group)}"), site.dtype)
    ups = {s.id: _input(graph, f"{s.name}.lora_B", (0, s.shape[0]), (rank, s.shape[0]), site.dtype) for s in group if s.shape is not None}
    shifts = {s.id: _input(graph, f"{s.name}.lora_bias", s.shape[:1], s.shape[:1], site.dtype) for s in group if s.shape and s.id in biased}
    lows = _apart(graph, site.places[0].x, a, group, together) if len(group) > 1 else {}
    for each in group:
        for place in each.places:

            def low(tape: Tape, x: ir.Value, each: Site = each) -> ir.Value:
                made = tape.op("MatMul", [lows[each.id] if lows else tape.op("MatMul", [x, a]), ups[each.id]])
                return tape.op("Add", [made, shifts[each.id]]) if each.id in shifts else made

            graph.beside(each, place, low)
    named = {key: value.name for key, value in shifts.items()}
    parts = {s.id: Part(ups[s.id].name or "", s.shape[0], named.get(s.id)) for s in group if s.shape is not None}
    return Slot(a.name or "", n, parts, site.dtype)


def _named_together(names: Sequence[str]) -> str:
    """`attention.query+key+value`."""
    if len(names) == 1:
        return names[0]
    split = [name.split(".") for name in names]
    shared = next((i for i, words in enumerate(zip(*split, strict=False)) if len(set(words)) > 1), 0)
    return ".".join([*split[0][:shared], "+".join(".".join(words[shared:]) for words in split)])


def _apart(graph: OnnxGraph, x: ir.Value, a: ir.Value, group: Sequence[Site], together: str) -> dict[str, ir.Value]:
    """Each one's x A, all of them made before the first is used."""
    own = {node for site in group for place in site.places for node in place.nodes}
    body = group[0].places[0].nodes[0].graph
    assert body is not None
    first = next(node for node in body if node in own)
    tape = Tape()
    options = {"axis": -1} | ({"num_outputs": len(group)} if graph.opset >= ATTRIBUTE_SINCE else {})
    parts = tape.op_multi_out("Split", [tape.op("MatMul", [graph.grown.get(x, x), a])], options, num_outputs=len(group))
    graph.insert_before(first, tape.nodes, together)
    return {site.id: part for site, part in zip(group, parts, strict=True)}


def _input(graph: OnnxGraph, name: str, sizes: Sequence[int], dims: Sequence[int | str], dtype: torch.dtype) -> ir.Value:
    """An input that has a value of its own until a run gives it another."""
    value = graph.parameter(name, torch.zeros(*sizes, dtype=dtype))
    value.shape = ir.Shape(dims)
    graph.model.graph.inputs.append(value)
    return value
