"""`fuse-attention`: attention spelled out around a softmax becomes one operation of the target; exact.

aten.scaled_dot_product_attention in a .pt2, the standard Attention from opset 23 on, com.microsoft.MultiHeadAttention where ONNX Runtime is
the target and it is faster; below that the same products in one function.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rewriter.cost import Cost
from rewriter.graph import Graph, Region, Site
from rewriter.operator import AbstractMap
from rewriter.passes.detect.attention import said
from rewriter.passes.detect.scores import readers
from rewriter.passes.structures.attention import Attention
from rewriter.rule import AbstractPass, Context, Decision


@dataclass(frozen=True)
class FuseAttention(AbstractPass):
    """Replaces every attention that was read and is not one operation of the target already."""

    name: ClassVar[str] = "fuse-attention"
    summary: ClassVar[str] = "attention spelled out becomes one operation: aten SDPA, ONNX Attention, com.microsoft's; exact"

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        return context.decide("attention", lambda site: self._fused(graph, context, site))

    @staticmethod
    def _fused(graph: Graph, context: Context, site: Site) -> Decision:
        form, region = site.form, site.region
        if not isinstance(form, Attention) or region is None:
            return Decision(site, site.reason)
        cost = per_token(form, max(context.tokens))
        reason = why_not(graph, context, region)
        if reason:
            return Decision(site, reason, cost, cost)
        graph.splice(site, form)
        return Decision(site, f"one operation: {said(form)}", cost, cost, form, "attention", True, 0.0)


def why_not(graph: Graph, context: Context, region: Region) -> str:
    """ "" where one operation can take the region's place and nothing that it computes would be computed twice."""
    whole = graph.op(region.nodes[0]) == "attention"
    if whole and (graph.format == "onnx" or context.target.name == "torch"):  # the exporter of torch takes its own apart
        return "already one operation"
    return not_free(graph, region)


def not_free(graph: Graph, region: Region) -> str:
    """ "" where the region can be replaced and nothing inside it is read elsewhere."""
    inside = {id(node) for node in region.nodes}
    results = {id(port.value) for port in region.outputs if port is not None}
    for node in region.nodes:
        for value in graph.outputs(node):
            if id(value) not in results and any(id(user) not in inside for user in readers(graph, value)):
                return f"{graph.op(node)} inside it is used elsewhere, too ({graph.name(value)}): one operation would not give it"
    return graph.can_splice(region)


def per_token(form: AbstractMap, tokens: int) -> Cost:
    """Operations for one token among as many; nothing is stored."""
    return Cost(0, form.cost(tokens).flops // tokens, 0)
