"""One spelling an idea: which ONNX operators mean matmul, attention, rms_norm …, and what their options are called."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from rewriter.backends.onnx.opaque import is_opaque

SCOPES = "pkg.torch.onnx.name_scopes"
OUTPUT = ir.Node("rewriter", "Output", [])  # the user of a value that leaves its body

STANDARD: dict[str, str] = {
    "MatMul": "matmul",
    "Gemm": "gemm",
    "Conv": "conv",
    "Einsum": "einsum",
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "Transpose": "transpose",
    "Reshape": "reshape",
    "Flatten": "reshape",
    "Expand": "expand",
    "Unsqueeze": "unsqueeze",
    "Squeeze": "squeeze",
    "Slice": "slice",
    "Split": "split",
    "Concat": "concat",
    "Cast": "cast",
    "CastLike": "cast",
    "Identity": "identity",
    "Dropout": "identity",
    "Gather": "gather",
    "Where": "where",
    "Not": "not",
    "Pow": "pow",
    "Tile": "repeat",
    "Shape": "shape",
    "ConstantOfShape": "fill",
    "Softmax": "softmax",
    "Attention": "attention",
    "LayerNormalization": "layer_norm",
    "RMSNormalization": "rms_norm",
    "SimplifiedLayerNormalization": "rms_norm",
    "RNN": "rnn",
    "LSTM": "lstm",
    "GRU": "gru",
    "Exp": "exp",
    "Log": "log",
    "Neg": "neg",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Relu": "relu",
    "Softplus": "softplus",
    "Sqrt": "sqrt",
    "Abs": "abs",
    "Reciprocal": "reciprocal",
    "LinearAttention": "linear_attention",
    "Scan": "scan",
    "Loop": "loop",
    "If": "cond",
}
MICROSOFT: dict[str, str] = {
    "Attention": "attention",
    "MultiHeadAttention": "attention",
    "GroupQueryAttention": "attention",
    "PackedAttention": "attention",
    "PackedMultiHeadAttention": "attention",
    "DecoderMaskedMultiHeadAttention": "attention",
    "LinearAttention": "linear_attention",
    "SimplifiedLayerNormalization": "rms_norm",
}
_SKIPPED = {"SkipLayerNormalization": "layer_norm", "SkipSimplifiedLayerNormalization": "rms_norm"}  # norms of (x + skip)
_TABLES = {"": STANDARD, "ai.onnx": STANDARD, "com.microsoft": MICROSOFT}


def operation(node: ir.Node) -> str:
    """The normalised name; an operator without a common one keeps its own, with its domain."""
    if node is OUTPUT:
        return "output"
    if is_opaque(node):
        return "structured"
    if node.domain == "com.microsoft" and node.op_type in _SKIPPED and not any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return _SKIPPED[node.op_type]
    if node.op_type == "ConstantOfShape" and not ("value" in node.attributes and node.attributes["value"].as_tensor().numpy().any()):
        return "zeros"
    own = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return _TABLES.get(node.domain, {}).get(node.op_type, own)


def operands(node: ir.Node) -> Sequence[ir.Value | None]:
    """The inputs in the normalised order, which is ONNX's own but for a norm that takes a second summand, and for attention."""
    if node.op_type in _SKIPPED and operation(node) in _SKIPPED.values():
        return (node.inputs[0], *node.inputs[2:4])
    if operation(node) == "attention":
        mask = 5 if node.domain else 3
        return (*node.inputs[:3], node.inputs[mask] if len(node.inputs) > mask else None)
    return node.inputs


def attributes(node: ir.Node) -> Mapping[str, Any]:
    """Normalised options; those of other operators under their own names, bodies left out."""
    special = _OPTIONS.get(operation(node))
    return special(node) if special else plain(node)


def plain(node: ir.Node) -> dict[str, Any]:
    """The attributes as ONNX has them."""
    bodies = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return {name: a.value for name, a in node.attributes.items() if not a.is_ref() and a.type not in bodies}


def _gemm(node: ir.Node) -> dict[str, Any]:
    given = plain(node)
    return {
        "alpha": float(given.get("alpha", 1.0)),
        "beta": float(given.get("beta", 1.0)),
        "trans_a": bool(given.get("transA", 0)),
        "trans_b": bool(given.get("transB", 0)),
    }


def _conv(node: ir.Node) -> dict[str, Any]:
    given = plain(node)
    weight = node.inputs[1]
    axes = len(weight.shape) - 2 if weight is not None and weight.shape is not None else len(given.get("kernel_shape", ()))
    automatic = given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    moved = any(s != 1 for s in given.get("strides", ()))
    return {
        "strides": tuple(given.get("strides", (1,) * axes)),
        # SAME pads a 1x1 kernel only where it moves
        "pads": (1,) * 2 * axes if automatic and moved else tuple(given.get("pads", (0,) * 2 * axes)),
        "dilations": tuple(given.get("dilations", (1,) * axes)),
        "groups": int(given.get("group", 1)),
    }


def _transpose(node: ir.Node) -> dict[str, Any]:
    x = node.inputs[0]
    rank = len(x.shape) if x is not None and x.shape is not None else 0
    return {"axes": tuple(plain(node).get("perm", range(rank - 1, -1, -1)))}


def _fill(node: ir.Node) -> dict[str, Any]:
    given = node.attributes.get("value")
    return {"scalar": 0.0 if given is None else float(given.as_tensor().numpy().item())}


def _attention(node: ir.Node) -> dict[str, Any]:
    """`heads` and `shared` are those of inputs without an axis for them."""
    given, inputs = plain(node), [*node.inputs, *[None] * 8]
    heads = given.get("q_num_heads", given.get("num_heads", 0))
    shared, causal = given.get("kv_num_heads", heads), given.get("is_causal", given.get("unidirectional", 0))
    if node.domain == "com.microsoft":
        plainly = node.op_type == "MultiHeadAttention" and inputs[2] is not None and not any([*inputs[3:5], *inputs[6:]])
        beyond = "it holds more than attention" if not plainly else "its causal mask is counted from the last query" if causal else ""
    else:
        windows = [given.get(side, -1) for side in ("left_window_size", "right_window_size")]
        extra = any(inputs[4:]) or any(given.get(name) for name in ("softcap", "qk_matmul_output_mode")) or windows != [-1, -1]
        beyond = "it holds a cache, a window or a cap" if extra else ""
    used = [v for v in node.outputs[1:] if v.uses() or v.is_graph_output()]
    return {
        "scale": given.get("scale") or None,
        "causal": bool(causal),
        "heads": int(heads),
        "shared": int(shared),
        "empty": "nan" if node.domain else "zero",
        "beyond": beyond or ("more than its first result is used" if used else ""),
    }


def _measured(node: ir.Node) -> dict[str, Any]:
    given, value = plain(node), node.inputs[0]
    axes = range(0 if value is None or value.shape is None else len(value.shape))
    return {"axes": tuple(axes[given.get("start", 0) : given.get("end")])}


_OPTIONS: dict[str, Callable[[ir.Node], dict[str, Any]]] = {
    "gemm": _gemm,
    "conv": _conv,
    "transpose": _transpose,
    "einsum": lambda node: {"equation": str(plain(node)["equation"])},
    "gather": lambda node: {"axis": int(plain(node).get("axis", 0))},
    "fill": _fill,
    "zeros": lambda node: {"scalar": 0.0},
    "attention": _attention,
    "shape": _measured,
    "softmax": lambda node: {"axis": int(plain(node).get("axis", -1))},
}


def scope(node: ir.Node) -> str:
    """The module path in the exporter's name scopes: "['', 'encoder', 'encoder.dense', 'linear']" gives encoder.dense."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ""
    if not isinstance(scopes, list | tuple):
        return ""
    path = str(scopes[-2]) if len(scopes) >= 2 else ""
    return path.removeprefix("L['self'].").removeprefix("L__self___")
