"""Attention whose keys and values are computed from one latent, whatever moves its numbers on the way: K_h = [c U_h^T, r], V_h = c W_h.

The graph says what depends on what; the matrices are what comes out for unit vectors, and random numbers have to agree with them. So one
product or two, a concatenation or a scatter, an expansion or a copy are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.graph import PLAIN, Graph, Layout, Node, Port, Region, Value
from rewriter.passes.detect.agreement import placed
from rewriter.passes.detect.magnitudes import sized, sources
from rewriter.passes.detect.scores import readers
from rewriter.passes.structures.attention import Attention
from rewriter.passes.structures.latent_attention import LatentAttention
from rewriter.tolerances import EQUAL

NEAR = 60  # values behind an operand that may be what it is made of
LAYOUTS = {3: Layout(spread=(1, -1), after=(0, 2, 1, 3)), 4: PLAIN}  # (batch, keys, n) and (batch, 1, keys, n)


@dataclass(frozen=True)
class Latent:
    """What a region computes from a latent, and the product that expands it."""

    form: LatentAttention
    region: Region
    product: Node


def read(graph: Graph, attention: Attention, region: Region) -> Latent | str:
    """The attention on its latent, `few` being 0; else why its keys and values are not made of one."""
    query, key, value, *masks = region.inputs
    found = next(_products(graph, value.value), None)
    if found is None:
        return "its values are no product of one latent and a stored matrix"
    product, latent = found
    if query.lone or key.lone or value.lone or _lengths(graph, latent) is None:
        return "its latent has more than batch, keys and features"
    rotated = _rotated(graph, key.value, latent)
    if isinstance(rotated, str):
        return rotated
    if _time(graph, query) == _lengths(graph, latent)[1]:  # type: ignore[index]
        return "every key is a query of the same call: there is no cache whose expansion could be saved"
    if _used_elsewhere(graph, product, region):
        return "its expanded keys or values are used elsewhere, too: they would be computed all the same"
    parts = [latent, *rotated]
    try:
        made = _matrices(graph, attention, region, parts)
    except RewriteError as problem:
        return f"what its keys and values are could not be checked: {problem}"
    if isinstance(made, str):
        return made
    ports = [_port(graph, part) for part in parts]
    dtype = graph.dtype(latent)
    assert dtype is not None
    key_up, value_up = (m.to(dtype).contiguous() for m in made)
    form = LatentAttention(attention, key_up, value_up, few=0)
    return Latent(form, replace(region, inputs=(query, *ports, *masks)), product)


def _before(graph: Graph, value: Value) -> Iterator[Value]:
    """The value and what it is computed from, nearest first; sizes are not followed."""
    seen, level = {id(value)}, [value]
    while level and len(seen) < NEAR:
        yield from level
        nodes = [node for v in level if (node := graph.producer(v)) is not None and graph.op(node) != "shape"]
        level = [v for node in nodes for v in graph.inputs(node) if v is not None and not graph.is_const(v)]
        level = [v for i, v in enumerate(level) if id(v) not in seen and all(v is not other for other in level[:i])]
        seen |= {id(v) for v in level}


def _products(graph: Graph, value: Value) -> Iterator[tuple[Node, Value]]:
    """Products with a stored matrix that the value is made of, with what is multiplied."""
    for behind in _before(graph, value):
        node = graph.producer(behind)
        if node is None or graph.op(node) not in ("linear", "matmul"):
            continue
        x, weight = list(graph.inputs(node))[:2]
        if x is not None and weight is not None and graph.is_const(weight) and sources(graph, value, [x]) is not None:
            yield node, x


def _lengths(graph: Graph, value: Value) -> tuple[int | str, int | str, int] | None:
    """(batch, keys, features) of a value without heads; None where it is none such."""
    shape = graph.shape(value) or ()
    if len(shape) not in LAYOUTS or not isinstance(shape[-1], int) or (len(shape) == 4 and shape[1] != 1):
        return None
    return shape[0], shape[-2], shape[-1]


def _port(graph: Graph, value: Value) -> Port:
    layout = LAYOUTS[len(graph.shape(value) or ())]
    features = (graph.shape(value) or (0,))[-1]
    return Port(value, replace(layout, spread=(1, int(features))) if layout.spread else layout)


def _time(graph: Graph, query: Port) -> int | str:
    """What the number of queries is called: the port gives (batch, heads, time, key)."""
    shape = list(graph.shape(query.value) or ())
    layout = query.layout
    shape = [shape[i] for i in layout.before] if layout.before else shape
    if layout.join != 1:
        shape = [*shape[: len(shape) - layout.join], 0]
    shape = [*shape[:-1], *layout.spread] if layout.spread else shape
    return ([shape[i] for i in layout.after] if layout.after else shape)[-2]


def _rotated(graph: Graph, key: Value, latent: Value) -> list[Value] | str:
    """[] where the keys are made of the latent alone, else what else they are made of, which all heads share."""
    if sources(graph, key, [latent]) is not None:
        return []
    own = _lengths(graph, latent)
    for value in _before(graph, key):
        found = _lengths(graph, value)
        if found is None or own is None or found[:2] != own[:2] or value is latent:
            continue
        apart = all(v is not latent for v in _before(graph, value))
        if apart and sources(graph, key, [latent, value]) is not None:
            return [value]
    return "its keys are not made of the latent of its values and one part that all heads share"


def _used_elsewhere(graph: Graph, product: Node, region: Region) -> bool:
    """Whether what is computed from the product leads anywhere but into the region, sizes aside."""
    inside, stack, seen = {id(node) for node in region.nodes}, [product], {id(product)}
    while stack:
        values = graph.outputs(stack.pop())
        users = [u for value in values for u in readers(graph, value)]
        if not users:  # a result of the model, or nothing's
            return True
        after = [u for u in users if graph.op(u) != "shape" and id(u) not in inside | seen]
        seen |= {id(u) for u in after}
        stack += after
    return False


def _matrices(graph: Graph, attention: Attention, region: Region, parts: Sequence[Value]) -> tuple[Tensor, Tensor] | str:
    """(U, W) in float64, or what else the keys and values are."""
    ranks = [_lengths(graph, part)[2] for part in parts]  # type: ignore[index]
    nope, rope, shared = attention.key - sum(ranks[1:]), sum(ranks[1:]), attention.shared
    if nope <= 0:
        return "no part of its keys is made of the latent"
    count = max(ranks)
    units = [torch.eye(count, n, dtype=torch.float64) for n in ranks]
    key, value = _keys_and_values(graph, region, parts, [units[0], *(torch.zeros_like(u) for u in units[1:])])
    up, down = key[0, :, : ranks[0], :nope].mT, value[0, :, : ranks[0]]
    rng = torch.Generator().manual_seed(0)
    given = [torch.randn(u.shape, generator=rng, dtype=torch.float64) for u in units]
    key, value = _keys_and_values(graph, region, parts, given)
    turned = [given[1].expand(shared, count, rope)] if rope else []
    rtol, atol = EQUAL[torch.float64]
    scale = max(1.0, float(key.abs().max()), float(value.abs().max()))
    wanted = (torch.cat([given[0] @ up.mT, *turned], -1), given[0] @ down)
    same = all(a.shape == b[0].shape and torch.allclose(a, b[0], rtol, atol * scale) for a, b in zip(wanted, (key, value), strict=True))
    return (up, down) if same else "its keys are not [c U^T, r], or its values not c W, for a latent c"


def _keys_and_values(graph: Graph, region: Region, parts: Sequence[Value], numbers: Sequence[Tensor]) -> list[Tensor]:
    """What the attention would be given, (1, shared, keys, n), for these (keys, n) parts."""
    ports, count = region.inputs[1:3], len(numbers[0])
    given = {part: x.reshape([1] * (len(graph.shape(part) or ()) - 2) + list(x.shape)) for part, x in zip(parts, numbers, strict=True)}
    batch, keys, _ = _lengths(graph, parts[0])  # type: ignore[misc]
    sizes = {str(batch): 1}
    first, *others = str(keys).replace(" ", "").split("+")  # of a cache and a call
    sizes |= {str(keys): count, first: count - len(others), **dict.fromkeys(others, 1)}
    for port in ports:
        for v in sources(graph, port.value, parts) or ():
            given[v] = sized(graph, v, sizes, 1)
    return [placed(x, port) for x, port in zip(graph.compute([p.value for p in ports], given), ports, strict=True)]
