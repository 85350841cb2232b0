"""`low-rank-kv`: a decoder's cache holds latents of its keys and values, r numbers for each group of heads, in place of them; lossy.

K_h = c_g U_h^T and V_h = d_g W_h for the heads h of a group g, c_g = D_g x. Prompts expand the latents; steps absorb them, as `absorb`
does: (q_h U_h) c_g^T and (P d_g) W_h. Keys that are turned by position after their product stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.algebra import Dense
from rewriter.cost import Cost
from rewriter.errors import RewriteError
from rewriter.fit import site_cost, usable_weight
from rewriter.graph import Graph, Layout, Port, Region, Site, Value, load_bias
from rewriter.moments import Moments
from rewriter.passes.detect.attention import inside
from rewriter.passes.detect.cached import CHANGED, Cache, only_for, read, rows
from rewriter.passes.fuse_attention import not_free
from rewriter.passes.planning.absorbed import fastest, per_token, where
from rewriter.passes.solvers.grouped_low_rank import Grouped, grouped
from rewriter.passes.structures.attention import Attention
from rewriter.passes.structures.latent_attention import CACHED, LatentAttention
from rewriter.passes.structures.latent_values import LatentValues
from rewriter.passes.structures.siblings import Siblings
from rewriter.rule import AbstractPass, Context, Decision, check_share

TOGETHER = 4  # heads that share a latent where nothing else is said
SHARE = 0.5
SIDES = ("keys", "values")
TURNED = f"its keys are {CHANGED}"
Linears = Mapping[int, Site]  # by the id of what they give


@dataclass(frozen=True)
class Product:
    """A linear layer that gives what is cached, and maybe the queries: they are rows of it, and nothing else reads it."""

    site: Site
    x: Value  # (batch, time, n)
    query: Tensor | None  # (heads, key) rows
    sides: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """An attention with its cache."""

    site: Site
    form: Attention
    region: Region
    caches: Mapping[str, Cache]
    products: tuple[Product, ...]
    groups: int
    ranks: Mapping[str, int]
    kept: str  # why keys stay what they are, where they do
    weights: Mapping[str, Grouped] = field(default_factory=dict)

    def width(self, side: str) -> int:
        return self.form.key if side == "keys" else self.form.width


@dataclass(frozen=True)
class LowRankKv(AbstractPass):
    """rank: numbers a token for the keys of a group, and as many for its values; by default what params admits. params: share of the
    cache's numbers, 0.5 by default. groups: latents for the keys of a layer, and as many for its values; one for four heads by default.
    cached: tokens in the cache while the forms are timed; an empty cache counts as much."""

    name: ClassVar[str] = "low-rank-kv"
    summary: ClassVar[str] = "a decoder caches latents in place of keys and values, absorbed at each step; lossy"
    whole: ClassVar[bool] = True
    rank: int | None = None
    params: float | None = None
    groups: int | None = None
    cached: int = CACHED

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        self._check()
        linears = {id(s.places[0].y): s for s in context.selected if s.kind == "linear" and not s.reason and len(s.places) == 1}
        linears = {y: s for y, s in linears.items() if not _rewritten(context, s)}
        readings: list[Reading] = []
        for site in [s for s in context.selected if s.kind == "attention"]:
            earlier = context.decisions.get(site.id)
            whole = earlier is not None and isinstance(earlier.operator, Attention)
            if earlier is not None and earlier.rewritten and not whole:
                yield earlier
                continue
            if whole:  # one operation: seen as the model spelled it, and put back where it stays
                graph.restore(site)
            found = self._read(graph, site, linears)
            if isinstance(found, Reading):
                readings.append(found)
            else:
                yield _kept(graph, context, site, found)
        for reading in list(self._fitted(graph, context, readings)):
            yield from self._decided(graph, context, reading)

    def _check(self) -> None:
        check_share(self.params, f"{self.name}:params")
        for option in ("rank", "groups", "cached"):
            given = getattr(self, option)
            if given is not None and given < 1:
                raise RewriteError(f"{self.name}:{option}={given} is out of range; give a whole number above 0")

    def _read(self, graph: Graph, site: Site, linears: Linears) -> Reading | str:
        form, region = site.form, site.region
        if not isinstance(form, Attention) or region is None:
            return site.reason
        if reason := not_free(graph, region):
            return reason
        found = {side: read(graph, port, region, linears) for side, port in zip(SIDES, region.inputs[1:3], strict=True)}
        wrong = {side: f"its {side} are {what}" for side, what in found.items() if isinstance(what, str)}
        caches = {side: what for side, what in found.items() if isinstance(what, Cache)}
        if "values" in wrong or wrong.get("keys", TURNED) != TURNED:
            return next(iter(wrong.values()))
        products = _products(graph, region, caches)
        if isinstance(products, str):
            return products
        groups = self.groups or form.shared // max(n for n in range(1, TOGETHER + 1) if form.shared % n == 0)
        if form.shared % groups:
            return f"groups={groups} does not divide its {form.shared} heads of keys and values"
        share = SHARE if self.params is None else self.params
        most = {side: form.shared // groups * (form.key if side == "keys" else form.width) for side in caches}
        ranks = {side: self.rank or max(1, int(share * width)) for side, width in most.items()}
        if wide := [side for side in caches if ranks[side] > most[side]]:
            return f"a latent of {ranks[wide[0]]} is wider than the {wide[0]} of its group, {most[wide[0]]}"
        if self.params is not None and any(ranks[side] > max(1, self.params * most[side]) for side in caches):
            return f"latents of {self.rank} are more than params={self.params} of its cache"
        if self.rank is None and all(ranks[side] >= most[side] for side in caches):
            return f"params={share} of its cache leaves it as large as it is"
        return Reading(site, form, region, caches, products, groups, ranks, wrong.get("keys", ""))

    def _fitted(self, graph: Graph, context: Context, readings: Sequence[Reading]) -> Iterator[Reading | Decision]:
        """With weights, layer by layer."""
        sites = {p.site.id: p.site for reading in readings for p in reading.products}
        wanted = [(reading, side) for reading in readings for side in reading.caches]
        made: dict[tuple[str, str], Grouped | str] = {}
        for group in context.calibration.moments(list(sites.values())):
            for linear, moments in group:
                for reading, side in wanted:
                    if reading.caches[side].site is linear:
                        made[reading.site.id, side] = _fit(graph, reading, side, moments)
        for reading in readings:
            all_made = {side: made[reading.site.id, side] for side in reading.caches}
            wrong = next((w for w in all_made.values() if isinstance(w, str)), "")
            weights = {side: w for side, w in all_made.items() if isinstance(w, Grouped)}
            yield Decision(reading.site, wrong) if wrong else replace(reading, weights=weights)

    def _decided(self, graph: Graph, context: Context, reading: Reading | Decision) -> Iterator[Decision]:
        if isinstance(reading, Decision):
            yield _kept(graph, context, reading.site, reading.reason)
            return
        site = reading.site
        latent = _form(reading, self.cached)
        few, figures = fastest(context, latent)
        latent = replace(latent, few=few)
        swap = Swap(reading, latent)
        swap.put(graph)
        reason = f"{_said(reading)}; absorbed {where(few)}, after {self.cached} tokens {figures}"
        errors = [weights.error for weights in reading.weights.values()]
        least = min(context.tokens)
        dense = Cost(0, per_token(replace(latent, few=0), least).flops, 0)
        for product in reading.products:
            said = f"its rows of {' and '.join(product.sides)} give latents now, for {site.name}"
            after = swap.siblings[product.site.id].cost()
            yield Decision(product.site, said, site_cost(product.site), after, None, self.name, False, 0.0, part_of=site.name)
        yield Decision(site, reason, dense, per_token(latent, least), latent, self.spelling(), False, max(errors), undo=swap.undo)


def _kept(graph: Graph, context: Context, site: Site, reason: str) -> Decision:
    """One operation again where it was made one."""
    earlier = context.decisions.get(site.id)
    if earlier is None or earlier.operator is None:
        return Decision(site, reason)
    graph.splice(site, earlier.operator)
    return earlier


def _said(reading: Reading) -> str:
    """What is in the cache now."""
    form, ranks = reading.form, reading.ranks
    sizes = {"keys": form.shared * form.key, "values": form.shared * form.width}
    now = sum(sizes.values()) + sum(reading.groups * ranks[side] - sizes[side] for side in ranks)
    many = f"{reading.groups} latent{'s' * (reading.groups > 1)}"
    parts = [f"{many} of {ranks[side]} for {side}, weighted error {reading.weights[side].error:.3g}" for side in ranks]
    kept = f"{reading.kept}, so they stay; " if reading.kept else ""
    return f"{kept}{', '.join(parts)}: {now} numbers a token in the cache instead of {sum(sizes.values())}"


def _rewritten(context: Context, site: Site) -> bool:
    earlier = context.decisions.get(site.id)
    return earlier is not None and earlier.rewritten


def _products(graph: Graph, region: Region, caches: Mapping[str, Cache]) -> tuple[Product, ...] | str:
    query = region.inputs[0]
    found = []
    for site in {cache.site.id: cache.site for cache in caches.values()}.values():
        place = site.places[0]
        asked = rows(graph, query.value, place.y)
        ends = {id(cache.end(graph)) for cache in caches.values() if cache.site is site}
        ends |= {id(graph.producer(query.value))} if asked is not None else set()
        if not only_for(graph, list(graph.users(place.y)), ends):
            return f"what {site.name} gives is used for more than its keys, values and queries"
        x = _tokens(graph, place.x)
        if x is None or place.layout != Layout():
            return f"what {site.name} multiplies is not of batch, tokens and features"
        if place.bias is not None and not graph.is_const(place.bias):
            return f"the bias of {site.name} is computed"
        sides = tuple(side for side, cache in caches.items() if cache.site is site)
        found.append(Product(site, x, asked, sides))
    return tuple(found)


def _tokens(graph: Graph, x: Value) -> Value | None:
    """(batch, time, n), before a reshape that makes rows of all tokens."""
    for _ in range(2):
        shape = graph.shape(x) or ()
        if len(shape) == 3:
            return x
        node = graph.producer(x)
        first = None if node is None or graph.op(node) != "reshape" else graph.inputs(node)[0]
        if first is None or (graph.shape(first) or (0,))[-1] != shape[-1]:
            return None
        x = first
    return None


def _fit(graph: Graph, reading: Reading, side: str, moments: Moments | None) -> Grouped | str:
    cache = reading.caches[side]
    weight = usable_weight(graph, cache.site)
    if isinstance(weight, str):
        return f"{cache.site.name}: {weight}"
    if moments is None:
        return "nothing is known of what its keys and values are made of (no samples reach it): a fit would be blind"
    bias, index = load_bias(graph, cache.site.places[0], len(weight)), cache.rows.flatten()
    own = None if bias is None else bias[index]
    # a softmax drops what all keys have in common: hidden ones score far below any other
    return grouped(weight[index], own, moments, reading.groups, reading.ranks[side], common=side == "values")


def _form(reading: Reading, cached: int) -> LatentAttention | LatentValues:
    form, dtype = reading.form, reading.caches["values"].site.dtype
    assert dtype is not None
    ups = {side: made.up.unflatten(0, (form.shared, -1)).to(dtype) for side, made in reading.weights.items()}  # (shared, width, rank)
    value_up = ups["values"].mT.contiguous()
    if "keys" not in ups:
        return LatentValues(form, value_up, few=0, cached=cached, groups=reading.groups)
    return LatentAttention(form, ups["keys"].contiguous(), value_up, few=0, joint=False, cached=cached, groups=reading.groups)


class Swap:
    """A layer's latents in the place of its keys and values, and back."""

    def __init__(self, reading: Reading, form: LatentAttention | LatentValues) -> None:
        self.reading, self.form = reading, form
        self.siblings: dict[str, Siblings] = {}

    def undo(self, graph: Graph, back: bool) -> None:
        """Or done again."""
        self.take_back(graph) if back else self.put(graph)

    def put(self, graph: Graph) -> None:
        reading = self.reading
        for product in reading.products:
            form = self.siblings[product.site.id] = _siblings(graph, reading, product)
            graph.splice(replace(product.site, region=_region(graph, reading, product), places=()), form)
        for side, cache in reading.caches.items():
            graph.recache(cache.past, cache.present, reading.groups, reading.ranks[side])
        query, key, _, *masks = reading.region.inputs
        ports = {"keys": key, **{side: Port(cache.present) for side, cache in reading.caches.items()}}
        graph.splice(replace(reading.site, region=replace(reading.region, inputs=(query, *ports.values(), *masks))), self.form)

    def take_back(self, graph: Graph) -> None:
        reading = self.reading
        graph.restore(reading.site)
        for product in reading.products:
            graph.restore(product.site)
        for side, cache in reading.caches.items():
            graph.recache(cache.past, cache.present, reading.form.shared, reading.width(side))


def _siblings(graph: Graph, reading: Reading, product: Product) -> Siblings:
    """One product for all that a layer gives: rows for queries as they were, latents for the rest."""
    site, weight = product.site, usable_weight(graph, product.site)
    assert isinstance(weight, Tensor) and site.dtype is not None and site.shape is not None
    bias = load_bias(graph, site.places[0], len(weight))
    parts: list[tuple[Tensor, Tensor]] = []
    if product.query is not None:
        index = product.query.flatten()
        parts.append((weight[index].double().T, torch.zeros(len(index)).double() if bias is None else bias[index]))
    parts += [(reading.weights[side].down, reading.weights[side].shift) for side in product.sides]
    dense = Dense(torch.cat([down for down, _ in parts], 1).contiguous())
    widths = tuple(down.shape[1] for down, _ in parts)
    biases = tuple(shift.contiguous() for _, shift in parts) if any(bool(shift.any()) for _, shift in parts) else ()
    return Siblings(site.shape[1], (dense,), widths, (), biases).to(site.dtype)


def _region(graph: Graph, reading: Reading, product: Product) -> Region:
    """From the layer's input to its queries, and to what goes into the cache."""
    form, begin = reading.form, product.site.places[0].nodes[0]
    outputs = [Port(reading.region.inputs[0].value, _laid(form.heads, form.key))] if product.query is not None else []
    outputs += [Port(reading.caches[side].added, _laid(reading.groups, reading.ranks[side])) for side in product.sides]
    nodes = {id(node): node for port in outputs for node in inside(graph, port.value, begin)}
    return Region(tuple(nodes.values()), (Port(product.x),), tuple(outputs))


def _laid(heads: int, width: int) -> Layout:
    """(batch, time, heads * width) to (batch, heads, time, width)."""
    return Layout(spread=(heads, width), after=(0, 2, 1, 3))
