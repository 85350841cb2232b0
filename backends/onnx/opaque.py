"""One opaque node per site: domain "structured", the operator's name, its factors as inputs, its spec as metadata.

The overload names the spec and the rank of x, because a body bakes both in; so equal sites share one function.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.operator import AbstractMatrix, unflatten

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


def overload(spec: str, rank: int) -> str:
    """What tells the bodies of one operator apart."""
    return f"{hashlib.sha256(spec.encode()).hexdigest()[:10]}_{rank}"


def opaque(x: ir.Value, factors: Sequence[ir.Value], spec: str, site: str, rank: int) -> ir.Node:
    """y = operator(x)."""
    meta = {SPEC: spec, SITE: site, RANK: str(rank)}
    return ir.Node(DOMAIN, kind(spec), [x, *factors], overload=overload(spec, rank), version=VERSION, num_outputs=1, metadata_props=meta)


def spec_of(node: ir.Node) -> tuple[str, int]:
    """The spec and the rank that an opaque node holds."""
    return node.metadata_props[SPEC], int(node.metadata_props[RANK])


def skeleton(spec: str) -> tuple[AbstractMatrix, list[Tensor]]:
    """The operator with shapes and no numbers."""
    shapes: dict[int, list[int]] = {}

    def note(value: dict[str, Any]) -> dict[str, Any]:
        if isinstance(value.get("tensor"), int):
            shapes[value["tensor"]] = value["shape"]
        return value

    json.loads(spec, object_hook=note)
    leaves = [torch.empty(shapes[i], device="meta") for i in range(len(shapes))]
    operator = unflatten(spec, leaves)
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
