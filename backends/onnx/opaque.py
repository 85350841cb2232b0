"""One opaque node per site: domain "structured", the operator's name, its factors as inputs, its spec as metadata.

The overload names the spec, the rank of x and, once it is settled, the lowering, because a body bakes them in; so equal sites share one
function.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
from torch import Tensor

from rewriter.operator import AbstractMatrix, skeleton

DOMAIN = "structured"
VERSION = 1
SPEC = "rewriter.spec"
SITE = "rewriter.site"
RANK = "rewriter.rank"


def is_opaque(node: ir.Node) -> bool:
    """Whether the node holds an operator."""
    return node.domain == DOMAIN and SPEC in node.metadata_props


def kind(spec: str) -> str:
    """The operator's name."""
    return str(json.loads(spec)["operator"])


def overload(spec: str, rank: int, lowering: str = "") -> str:
    """What tells the bodies of one operator apart."""
    return f"{hashlib.sha256(spec.encode()).hexdigest()[:10]}_{rank}{lowering and f'_{lowering}'}"


def opaque(inputs: Sequence[ir.Value], factors: Sequence[ir.Value], spec: str, site: str, rank: int, outputs: int = 1) -> ir.Node:
    """y = operator(x); `rank` is that of a matrix's x, and 0 for maps, whose inputs say their own."""
    meta = {SPEC: spec, SITE: site, RANK: str(rank)}
    given = [*inputs, *factors]
    return ir.Node(DOMAIN, kind(spec), given, overload=overload(spec, rank), version=VERSION, num_outputs=outputs, metadata_props=meta)


def lowering_of(node: ir.Node) -> str:
    """What its overload says of the lowering; empty where it was not settled yet. That of a map ends in how many outputs are wanted."""
    said = node.overload.split("_", 2)[2:]
    return "" if not said else said[0] if spec_of(node)[1] else said[0].rpartition("_")[0]


def spec_of(node: ir.Node) -> tuple[str, int]:
    """The spec and the rank that an opaque node holds."""
    return node.metadata_props[SPEC], int(node.metadata_props[RANK])


def matrix_skeleton(spec: str) -> tuple[AbstractMatrix, list[Tensor]]:
    """The same of a matrix."""
    operator, leaves = skeleton(spec)
    assert isinstance(operator, AbstractMatrix)
    return operator, leaves


def field_paths(spec: str) -> list[str]:
    """Where each tensor stands in the operator: `right`, `factors.0.blocks`."""
    return [path for _, path in sorted(_paths(json.loads(spec), ""))]


def _paths(value: Any, path: str) -> Iterator[tuple[int, str]]:
    if not isinstance(value, dict):
        return
    if "tensor" in value:
        yield value["tensor"], path
        return
    inner = value["fields"].items() if "operator" in value else enumerate(value["tuple"])
    for name, item in inner:
        yield from _paths(item, f"{path}.{name}".lstrip("."))
