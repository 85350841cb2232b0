"""One form for every model: opset at least 13, functions inlined, weights as initialisers of the main graph, every name unique."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TypeAlias

import onnx_ir as ir
from onnx_ir.passes import common as passes

from rewriter.backends.files.archive import one_line
from rewriter.backends.onnx.opaque import DOMAIN, SPEC
from rewriter.errors import RewriteError

LEAST_OPSET = 13  # what the function bodies are spelled in
MAX_UNFOLDED = 1_000_000  # nodes that inlining makes
MAX_RENAMING = 100_000_000  # the inliner tries every number that a name has had: about a minute
_Body: TypeAlias = ir.OperatorIdentifier | None  # a function, or the main graph


def normalised(model: ir.Model) -> ir.Model:
    """A copy in one form: opset at least 13, functions inlined, weights in the main graph and out of its inputs, names unique."""
    model = model.clone()
    _drop_own_functions(model)
    _check_unfolding(model)
    try:
        passes.InlinePass(criteria=lambda function: _inlined(function.identifier()))(model)
    except Exception as problem:
        raise RewriteError(f"the model's local functions cannot be inlined: {one_line(problem)}; export it without functions") from problem
    for step in (
        passes.NameFixPass(),
        passes.RemoveInitializersFromInputsPass(),
        passes.LiftConstantsToInitializersPass(),
        passes.LiftSubgraphInitializersToMainGraphPass(),
    ):
        step(model)
    if model.graph.opset_imports.get("", LEAST_OPSET) < LEAST_OPSET:
        _raise_opset(model)
    return model


def _check_unfolding(model: ir.Model) -> None:
    """The inliner copies a body at every call, so functions that call the next one twice double at every level: count before copying."""
    nodes: dict[_Body, list[ir.Node]] = {None: list(model.graph.all_nodes())}
    nodes |= {key: list(function.all_nodes()) for key, function in model.functions.items()}
    copies = _copies(model, nodes)
    if sum(count * len(nodes[key]) for key, count in copies.items() if _inlined(key)) > MAX_UNFOLDED:
        text = f"the model's local functions unfold to more than {MAX_UNFOLDED:,} nodes"
        raise RewriteError(f"{text}; that many are allowed, export it without functions")
    names: Counter[tuple[str, str]] = Counter()
    for key, count in copies.items():
        for node in nodes[key] if _inlined(key) else ():
            names["node", node.name or ""] += count
            names.update({("value", value.name or ""): count for value in node.outputs})
    if sum(count * count for count in names.values()) // 2 > MAX_RENAMING:
        most, count = names.most_common(1)[0]
        text = f"the model's local functions make {count:,} copies of the {most[0]} {most[1]!r} and too many like it"
        raise RewriteError(f"{text}; a few thousand are allowed, export it without functions")


def _copies(model: ir.Model, nodes: Mapping[_Body, Sequence[ir.Node]]) -> Counter[_Body]:
    """How often each body stands in the model once everything is inlined; functions that nothing calls are dropped from `model`."""
    calls = {
        key: Counter(called for node in body if (called := node.op_identifier()) in model.functions and _inlined(called))
        for key, body in nodes.items()
    }
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError as problem:
        circle = one_line(" -> ".join(key[1] for key in problem.args[1]))
        raise RewriteError(f"the model's local functions call each other in a circle ({circle}); export it without functions") from problem
    copies: Counter[_Body] = Counter(key for key in nodes if not _inlined(key))
    for key in reversed(order):
        for called, count in calls[key].items():
            copies[called] = min(copies[called] + count * copies[key], MAX_UNFOLDED + 1)  # a clipped count stays a small number
    for key in [key for key in model.functions if not copies[key]]:
        del model.functions[key]
    return +copies


def _inlined(key: _Body) -> bool:
    return key is not None and key[0] != DOMAIN


def _raise_opset(model: ir.Model) -> None:
    from onnxscript.version_converter import convert_version

    own = model.graph.opset_imports[""]
    convert_version(model, LEAST_OPSET, fallback=True)
    if model.graph.opset_imports[""] < LEAST_OPSET:
        raise RewriteError(f"the model is of opset {own}, which cannot be converted; export it again with opset {LEAST_OPSET} or higher")


def _drop_own_functions(model: ir.Model) -> None:
    """Bodies that this package attached are made again at emission."""
    ours = {node.op_identifier() for node in model.graph.all_nodes() if node.domain == DOMAIN and SPEC in node.metadata_props}
    for identifier in ours & set(model.functions):
        del model.functions[identifier]
