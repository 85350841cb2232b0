"""Keys or values that a decoder caches, and the rows of a linear layer that each call adds to them: present = [past, added].

`past` is an input of the model and `present` an output, which one attention alone reads. `added` is rows of one product, laid out anew;
which ones is what comes out for a product of random numbers. A rotation by position is no row, so rotated keys are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.graph import PLAIN, Graph, Node, Port, Region, Site, Value
from rewriter.passes.detect.magnitudes import sized, sources
from rewriter.passes.detect.scores import readers

NEAR = 60  # values behind what is added that may be the product
TOKENS = 3  # of the product of random numbers
AXES = {0, 2}  # of a cache (batch, heads, tokens, features), whose sizes vary
CHANGED = "turned by position, or otherwise changed, between their product and the cache"
_SAME = ("slice", "identity", "cast")  # where nothing of the shape changes


@dataclass(frozen=True)
class Cache:
    """Keys or values with their past."""

    past: Value  # (batch, shared, past, width)
    present: Value  # (batch, shared, past + time, width)
    added: Value  # (batch, shared, time, width)
    site: Site  # whose product has them
    rows: Tensor  # (shared, width) int64: which of its rows they are

    def end(self, graph: Graph) -> Node:
        """What puts them together."""
        return graph.producer(self.present)


def read(graph: Graph, port: Port, region: Region, products: Mapping[int, Site]) -> Cache | str:
    """What the port takes, as a cache, else why it is none. `products`: linear sites by the id of what they give."""
    present = _same(graph, port.value)
    pieces = _pieces(graph, present)
    shape = graph.shape(present) or ()
    if port.layout != PLAIN or port.lone or len(pieces) != 2 or len(shape) != 4 or not all(isinstance(shape[i], int) for i in (1, 3)):
        return "no cache of batch, heads, tokens and features that each call adds to"
    past, added = _input(graph, pieces[0]), pieces[1]
    users = readers(graph, present)
    leaves = [u for u in users if graph.op(u) == "output"]
    if past is None or not leaves:
        return "no cache that is an input and an output of the model"
    end = {id(graph.producer(present))}
    onward = [u for u in users if graph.op(u) != "output"]
    if not only_for(graph, onward, {id(n) for n in region.nodes}) or not only_for(graph, readers(graph, past), end):
        return "a cache that is read elsewhere, too"
    product = next((site for value in _before(graph, added) if (site := products.get(id(value))) is not None), None)
    if product is None:
        return "no product of a selected linear layer that stands as it was"
    found = rows(graph, added, product.places[0].y)
    if found is None:
        return CHANGED
    return Cache(past, present, added, product, found)


def _same(graph: Graph, value: Value) -> Value:
    """What it is, before nodes that change nothing."""
    while (node := graph.producer(value)) is not None and graph.op(node) in _SAME:
        first = next(iter(graph.inputs(node)), None)
        if first is None or (graph.shape(first), graph.dtype(first)) != (graph.shape(value), graph.dtype(value)):
            return value
        value = first
    return value


def _pieces(graph: Graph, value: Value) -> Sequence[Value]:
    """What is put together along the tokens, nothing left out but what is empty; [] where nothing is."""
    node = graph.producer(value)
    found = None if node is None else graph.stacked(node)
    if found is None or not found[2] or found[1] != 2:
        return []
    return [v for v in found[0] if not graph.is_const(v) or _numbers(graph, v)]


def _numbers(graph: Graph, value: Value) -> int:
    held = graph.const(value)
    return 0 if held is None else held.numel()


def _input(graph: Graph, value: Value) -> Value | None:
    """The input of the model that it is."""
    value = _same(graph, value)
    while len(pieces := _pieces(graph, value)) == 1:
        value = _same(graph, pieces[0])
    given = graph.producer(value) is None and not graph.is_const(value)
    return value if given and graph.name(value) in {spec.name for spec in graph.specs()} else None


def only_for(graph: Graph, nodes: Sequence[Node], ends: set[int]) -> bool:
    """Whether the nodes lead to these ends alone, sizes that vary aside."""
    stack, seen = list(nodes), set(ends)
    while stack:
        node = stack.pop()
        sizes = graph.op(node) == "shape" and set(graph.attributes(node)["axes"]) <= AXES
        if id(node) in seen or sizes:
            continue
        seen.add(id(node))
        if graph.op(node) == "output":
            return False
        stack += [u for value in graph.outputs(node) for u in readers(graph, value)]
    return True


def _before(graph: Graph, value: Value) -> list[Value]:
    """The value and what it is computed from, nearest first; sizes are not followed."""
    found, at = [value], 0
    while at < len(found) < NEAR:
        node = graph.producer(found[at])
        known = {id(v) for v in found}
        if node is not None and graph.op(node) != "shape":
            found += [v for v in graph.inputs(node) if v is not None and not graph.is_const(v) and id(v) not in known]
        at += 1
    return found


def rows(graph: Graph, value: Value, product: Value) -> Tensor | None:
    """(heads, width): the row of a product (…, m) that each feature of a value (batch, heads, time, width) is; None where some is none."""
    shape, features = graph.shape(value) or (), (graph.shape(product) or (None,))[-1]
    others = sources(graph, value, [product])
    if len(shape) != 4 or others is None or not isinstance(features, int):
        return None
    given = torch.randn(TOKENS, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = {str(shape[0]): 1, str(shape[2]): TOKENS}
    numbers = given.reshape([1] * (len(graph.shape(product) or ()) - 2) + [TOKENS, features])
    try:
        (found,) = graph.compute([value], {product: numbers, **{v: sized(graph, v, sizes, 1) for v in others}})
    except RewriteError:
        return None
    if list(found.shape) != [1, shape[1], TOKENS, shape[3]]:
        return None
    tokens = found[0].transpose(0, 1).flatten(1)  # (tokens, heads * width)
    same = tokens[0, :, None] == given[0]
    index = same.int().argmax(1)
    whole = bool((same.sum(1) == 1).all()) and torch.equal(given[:, index], tokens)
    return index.reshape(int(shape[1]), int(shape[3])) if whole else None
