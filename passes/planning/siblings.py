"""Linears that read one value, such as query, key and value, or gate and up: as one product where that is faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rewriter.algebra import Dense
from rewriter.fit import keep, part, site_cost
from rewriter.graph import Graph, Port, Region, Site
from rewriter.operator import AbstractMatrix, flatten
from rewriter.passes.planning.chains import Link
from rewriter.passes.planning.choice import pays, ratios
from rewriter.passes.structures.siblings import Siblings
from rewriter.rule import Context, Decision

RANK = 3  # (batch, time, features): what a map's inputs are


def families(graph: Graph, links: Sequence[Link]) -> Iterator[list[Link]]:
    """Those that read one value of three axes, in one body, dense all of them or all products of two dense factors."""
    found: dict[object, list[Link]] = {}
    for each in links:
        place = each.site.places[0]
        if len(graph.shape(place.x) or ()) == RANK and each.kinds in ((Dense,), (Dense, Dense)):
            found.setdefault((id(place.x), graph.body(place.nodes[0]), each.kinds, each.site.dtype), []).append(each)
    yield from (family for family in found.values() if len(family) > 1)


def planned(graph: Graph, context: Context, family: Sequence[Link]) -> Iterator[Decision]:
    """The family as one map where that pays."""
    together, apart = packed(family), alone(family)
    table = context.seconds([apart, together])
    site, names = region_site(family), ", ".join(each.site.name for each in family)
    figures = ratios(context.tokens, *zip(*table, strict=True))
    assert site.region is not None
    refused = f"they would be no faster, {figures}" if not pays(table) else graph.can_splice(site.region)
    if refused:
        yield from (keep(each.site, f"{names} as one product: {refused}") for each in family if each.decision is None)
        return
    for each in family:
        if each.decision is not None:
            graph.restore(each.site)
    assert site.dtype is not None
    stored = together.to(site.dtype)
    graph.splice(site, stored)
    yield from _decisions(site, family, stored, f"{names} as one product: {figures}")


def _decisions(site: Site, family: Sequence[Link], stored: Siblings, reason: str) -> Iterator[Decision]:
    exact = all(each.decision is None or each.decision.exact for each in family)
    errors = [each.decision.error or 0.0 for each in family if each.decision is not None]
    for each in family[:-1]:
        yield part(each.site, f"part of {site.name}: {reason}", site.name, "packed", exact)
    yield Decision(site, reason, site_cost(family[-1].site), stored.cost(), stored, "packed", exact, max(errors, default=0.0))


def biases(family: Sequence[Link]) -> tuple[Tensor, ...]:
    """One for each where one of them has any."""
    if all(each.bias is None for each in family):
        return ()
    return tuple(torch.zeros(each.operator.shape[0]) if each.bias is None else each.bias.float() for each in family)


def alone(family: Sequence[Link]) -> Siblings:
    """As they stand."""
    return Siblings(family[0].operator.shape[1], (), (), tuple(each.operator for each in family), biases(family))


def packed(family: Sequence[Link]) -> Siblings:
    """The first factors side by side."""
    factors = [each.operator.as_product() for each in family]
    firsts = [flatten(first)[0][0] for first, *_ in factors]  # (n, r_i)
    rest: tuple[AbstractMatrix, ...] = tuple(second for _, *more in factors for second in more)
    widths = tuple(weight.shape[1] for weight in firsts)
    return Siblings(firsts[0].shape[0], (Dense(torch.cat(firsts, 1)),), widths, rest, biases(family))


def region_site(family: Sequence[Link]) -> Site:
    """The last one's, around all of the family's nodes."""
    places = [each.site.places[0] for each in family]
    nodes = tuple(node for place in places for node in place.nodes)
    region = Region(nodes, (Port(places[0].x),), tuple(Port(place.y) for place in places))
    return replace(family[-1].site, region=region, places=())
