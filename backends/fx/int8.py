"""The dynamic int8 form of a dense program: every linear with a stored weight runs as quantized::linear_dynamic.

The baseline that a torch user already has (torch.ao.quantization.quantize_dynamic), at graph level: weights per channel, activations per
call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.fx.interpreter import run
from rewriter.errors import RewriteError


def quantised(graph: FxGraph) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A runner of the program with its aten.linear nodes in int8; RewriteError where this build of torch or the model has none."""
    if torch.backends.quantized.engine in ("none", ""):
        raise RewriteError("this build of torch has no int8 engine")
    packed = {node: _pack(graph, node) for node in graph.nodes() if graph.op(node) == "linear" and _fits(graph, node)}
    if not packed:
        raise RewriteError("the model has no float32 linear that torch runs in int8")
    names = graph.output_names()
    return lambda feeds: dict(zip(names, run(graph.program, feeds, {}, packed), strict=True))


def _fits(graph: FxGraph, node: Node) -> bool:
    weight, bias = (list(graph.inputs(node)) + [None])[1:3]
    stored = weight is not None and graph.is_const(weight) and graph.dtype(weight) == torch.float32
    return bool(stored and (bias is None or graph.is_const(bias)))


def _pack(graph: FxGraph, node: Node) -> Callable[[Tensor], Tensor]:
    weight, bias = (list(graph.inputs(node)) + [None])[1:3]
    assert weight is not None
    dense = graph.const(weight)
    assert dense is not None
    scale = (dense.abs().amax(1) / 127).clamp_min(1e-12).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch is about to move its quantised tensors elsewhere
        rounded = torch.quantize_per_channel(dense, scale, torch.zeros(len(scale), dtype=torch.int64), 0, torch.qint8)
    pack = torch.ops.quantized.linear_prepack(rounded, graph.const(bias) if bias is not None else None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, pack, False)
