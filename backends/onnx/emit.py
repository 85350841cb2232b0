"""From opaque nodes to a model that stands alone: opset converted first, bodies attached last, checked.

torch.onnx.export and the version converters inline every function, so a body is only ever attached to a finished model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import onnx_ir as ir
from onnx_ir.passes import common as passes

from rewriter.backends.files.archive import one_line
from rewriter.backends.files.quiet import muted
from rewriter.backends.onnx.attention import DOMAIN as CONTRIB_DOMAIN
from rewriter.backends.onnx.contrib import NAME as CONTRIB_NAME
from rewriter.backends.onnx.contrib import takes
from rewriter.backends.onnx.nibbles import NBITS
from rewriter.backends.onnx.opaque import DOMAIN, VERSION, is_opaque, kind, opaque, overload, spec_of
from rewriter.backends.onnx.ops import LOWERINGS, function
from rewriter.backends.onnx.sequence_ops import lowerings, map_function, map_overload
from rewriter.backends.onnx.shapes import infer
from rewriter.errors import RewriteError
from rewriter.operator import skeleton

Choose = Callable[[str, int], str]  # (spec, rank) -> lowering
Together = Callable[[ir.Model], Mapping[ir.Node, str]]  # lowerings of nodes that are chosen with their neighbours
NONE: Mapping[ir.Node, str] = MappingProxyType({})
FIRST_IR_WITH_OVERLOADS = 10
_PATHS = ("stack_trace", "fx_node")  # metadata that shows where on the maker's disk a model was built


def default_lowering(spec: str, rank: int) -> str:
    """Where nothing was measured."""
    return LOWERINGS[0] if rank else lowerings(spec)[-1]


def finish(
    model: ir.Model,
    opset: int,
    flatten: bool = False,
    choose: Choose = default_lowering,
    provenance: Mapping[str, str] | None = None,
    together: Together = lambda model: NONE,
) -> ir.Model:
    """The model ready to be saved, edited in place. A model of a higher opset keeps it: operators cannot be taken back."""
    adopt_sites(model)
    convert(model, opset)
    passes.RemoveUnusedNodesPass()(model)
    if any(v.shape is None for node in model.graph for v in node.outputs):
        infer(model)  # while nobody can see into a body: kernels go by what the file says
    attach(model, choose, together(model))
    if flatten:
        passes.InlinePass(criteria=lambda f: f.domain == DOMAIN)(model)
        model.graph.opset_imports.pop(DOMAIN, None)
    strip(model)
    model.metadata_props.update({f"rewriter.{key}": value for key, value in (provenance or {}).items()})
    check(model)
    return model


def adopt_sites(model: ir.Model) -> None:
    """`structured::Site` nodes, as the torch exporter writes them, become opaque nodes under their operator's name."""
    for node in list(model.graph.all_nodes()):
        if node.domain != DOMAIN or node.op_type != "Site":
            continue
        x = node.inputs[0]
        spec, site = node.attributes["spec"].as_string(), node.attributes["site"].as_string()
        shape = x.shape if x is not None and x.shape is not None else node.outputs[0].shape
        if x is None or shape is None or any(v is None for v in node.inputs):
            raise RewriteError(f"site {site}: the exporter lost its shape or its factors; write a .pt2 with --target torch instead")
        rank = 0 if node.attributes["map"].as_string() else len(shape)
        node.op_type, node.overload = kind(spec), overload(spec, rank)
        node.metadata_props.update(opaque([x], [], spec, site, rank).metadata_props)
        node.attributes.clear()


def convert(model: ir.Model, opset: int) -> None:
    """Up to `opset`; bodies of ours must not be attached yet."""
    own = model.graph.opset_imports.get("", opset)
    if own >= opset:
        return
    from onnxscript.version_converter import convert_version

    ours = {node.outputs[0].name: node for node in model.graph.all_nodes() if is_opaque(node)}
    try:
        with muted():
            convert_version(model, opset, fallback=True)
    except Exception as problem:
        raise RewriteError(
            f"the model cannot be converted from opset {own} to {opset}: {one_line(problem)}; give --opset {own}"
        ) from problem
    if model.graph.opset_imports[""] != opset:
        raise RewriteError(f"the model cannot be converted from opset {own} to {opset}; give --opset {max(own, 18)}")
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:  # onnx's own converter, the fallback, drops what it does not know
            before = ours[node.outputs[0].name]
            node.overload = before.overload
            node.metadata_props.update(before.metadata_props)


def attach(model: ir.Model, choose: Choose = default_lowering, lowered: Mapping[ir.Node, str] = NONE) -> None:
    """One function for each distinct operator and lowering, in place; a node's own lowering, where it has one, is in `lowered`."""
    nodes = [node for node in model.graph.all_nodes() if is_opaque(node)]
    if not nodes:
        model.graph.opset_imports.pop(DOMAIN, None)
        return
    for node in nodes:
        spec, rank = spec_of(node)
        if rank == 0:
            _attach_map(model, node, spec, choose(spec, 0))
        else:
            attach_matrix(model, node, lowered.get(node) or choose(spec, rank))
    passes.RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[DOMAIN] = VERSION
    model.ir_version = max(model.ir_version, FIRST_IR_WITH_OVERLOADS)


def attach_matrix(model: ir.Model, node: ir.Node, lowering: str = LOWERINGS[0]) -> None:
    """The function of one node."""
    spec, rank = spec_of(node)
    node.overload = overload(spec, rank, lowering)
    if lowering == NBITS:
        model.graph.opset_imports[CONTRIB_DOMAIN] = 1
    if node.op_identifier() not in model.functions:
        body = function(spec, rank, model.graph.opset_imports[""], lowering)
        model.functions[body.identifier()] = body


def _attach_map(model: ir.Model, node: ir.Node, spec: str, lowering: str) -> None:
    """The node's overload names its lowering: a target's own takes some types only, and other nodes of the same spec get a form.

    A last state that nobody reads is not computed.
    """
    first = node.inputs[0]
    if not takes(lowering, skeleton(spec)[0], first.dtype if first is not None else None):
        lowering = default_lowering(spec, 0)
    node.resize_outputs(1 + max(i for i, v in enumerate(node.outputs) if i == 0 or v.uses() or v.is_graph_output()))
    node.overload = map_overload(spec, lowering, len(node.outputs))
    if lowering == CONTRIB_NAME:
        model.graph.opset_imports[CONTRIB_DOMAIN] = 1
    if node.op_identifier() not in model.functions:
        body = map_function(spec, model.graph.opset_imports[""], lowering, len(node.outputs))
        model.functions[body.identifier()] = body


def strip(model: ir.Model) -> None:
    """Drop build paths and the exporter's source text; name scopes and what is ours stay."""
    nodes = [*model.graph.all_nodes(), *(node for f in model.functions.values() for node in f.all_nodes())]
    for properties in [model.metadata_props, model.graph.metadata_props, *(node.metadata_props for node in nodes)]:
        for key in [k for k in properties if k.endswith(_PATHS) or k.startswith("pkg.torch.export")]:
            del properties[key]
    for node in nodes:
        node.doc_string = None


def check(model: ir.Model) -> None:
    """onnx.checker with shape inference, weights left out so that size does not matter.

    Shapes that the source states for inner values are hints, and some exporters' are wrong: those that inference refutes are dropped.
    """
    full = passes.CheckerPass(full_check=True)
    try:
        full(model)
        return
    except Exception:
        for node in model.graph.all_nodes():
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None
        infer(model)  # what it can say by itself; kernels ask for shapes
    try:
        full(model)
    except Exception as problem:
        cause = problem.__cause__ or problem
        raise RewriteError(f"onnx.checker refuses the rewritten model: {one_line(cause)}") from problem
