"""LinearAttention as one ONNX node, ai.onnx's (since opset 27) or com.microsoft's, read by its attributes.

S_t = e^{g_t} S_{t-1} + k_t (beta_t (v_t - (e^{g_t} S_{t-1})^T k_t))^T, o_t = scale S_t^T q_t. A runtime without a kernel for the standard
one expands it into a Scan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rewriter.graph import Graph, Node, Port, Region, Value
from rewriter.passes.detect.matrix_state import describe
from rewriter.passes.detect.reading import Reading
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.structure import NoMatch

RULES = {"linear": ("plain", False), "gated": ("plain", True), "delta": ("delta", False), "gated_delta": ("delta", True)}
INPUTS = ("query", "key", "value", "state", "decay", "beta")


def read_linear_attention(graph: Graph, node: Node) -> Reading | NoMatch:
    """The node's operator, or what of it is not read."""
    options = graph.attributes(node)
    given = {name: v for name, v in zip(INPUTS, graph.inputs(node), strict=False) if v is not None}
    if options.get("state_window") or len(graph.inputs(node)) > len(INPUTS) or len(graph.outputs(node)) > 2:
        return NoMatch("LinearAttention that keeps more than one state")
    form = _form(options, {name: _width(graph, v) for name, v in given.items() if name != "state"}, "state" in given)
    if isinstance(form, NoMatch):
        return form
    wanted = {name: dims[-1] for name, dims in form.sequences().items()}
    for name, width in wanted.items():
        if name not in given or _width(graph, given[name]) != width:
            return NoMatch(f"LinearAttention whose {name} is not (batch, time, {width})")
    inputs = tuple(Port(given[name]) for name in form.inputs())
    outputs = [Port(v) if v is not None and graph.users(v) else None for v in (*graph.outputs(node), None)[:2]]
    return Reading(form, Region((node,), inputs, tuple(outputs)), describe(form))


def _form(options: Mapping[str, Any], widths: Mapping[str, int], carried: bool) -> LinearAttention | NoMatch:
    rule = options.get("update_rule", "gated_delta")
    rule = rule.decode() if isinstance(rule, bytes) else rule
    queries, heads = int(options.get("q_num_heads", 0)), int(options.get("kv_num_heads", 0))
    if rule not in RULES or queries < 1 or heads < 1:
        return NoMatch(f"LinearAttention of update rule {rule!r} with {queries} query and {heads} key heads")
    if not all(widths.get(name, 0) > 0 for name in ("query", "key", "value")):
        return NoMatch("LinearAttention of unknown widths")
    kind, gated = RULES[rule]
    key = widths["query"] // queries
    keys, left = divmod(widths["key"], key or 1)
    if left or not keys or heads % keys or (heads % queries and queries % heads):
        return NoMatch(f"LinearAttention of {queries} query heads, {widths['key']} key features and {heads} value heads")
    decay = ("head" if widths.get("decay") == heads else "key") if gated else ""
    scale = float(options.get("scale") or key**-0.5)
    return LinearAttention(heads, key, widths["value"] // heads, queries, keys, 1, kind, decay, scale, carried)


def _width(graph: Graph, value: Value) -> int:
    """Of the last axis of (batch, time, n); 0 where unknown."""
    shape = graph.shape(value)
    return shape[-1] if shape is not None and len(shape) == 3 and isinstance(shape[-1], int) else 0
