"""One spelling an idea: which aten targets mean linear, matmul, attention …, and where their operands and options stand."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

OPERATIONS: dict[str, str] = {
    "aten.linear": "linear",
    "aten.matmul": "matmul",
    "aten.mm": "matmul",
    "aten.bmm": "matmul",
    "aten.addmm": "addmm",
    "aten.einsum": "einsum",
    "aten.conv1d": "conv",
    "aten.conv2d": "conv",
    "aten.conv3d": "conv",
    "aten.convolution": "conv",
    "aten.add": "add",
    "aten.mul": "mul",
    "aten.sub": "sub",
    "aten.div": "div",
    "aten.permute": "transpose",
    "aten.transpose": "transpose",
    "aten.t": "transpose",
    "aten.numpy_T": "transpose",
    "aten.view": "reshape",
    "aten.reshape": "reshape",
    "aten._unsafe_view": "reshape",
    "aten.flatten": "reshape",
    "aten.unflatten": "reshape",
    "aten.expand": "expand",
    "aten.unsqueeze": "unsqueeze",
    "aten.squeeze": "squeeze",
    "aten.slice": "slice",
    "aten.clone": "identity",
    "aten.contiguous": "identity",
    "aten.alias": "identity",
    "aten.dropout": "identity",
    "aten.to": "cast",
    "aten._to_copy": "cast",
    "aten.type_as": "cast",
    "aten.embedding": "embedding",
    "aten.softmax": "softmax",
    "aten._softmax": "softmax",
    "aten.rsqrt": "rsqrt",
    "aten.layer_norm": "layer_norm",
    "aten.rms_norm": "rms_norm",
    "aten.scaled_dot_product_attention": "attention",
    "aten._native_multi_head_attention": "attention",
    "aten.lstm": "lstm",
    "aten.gru": "gru",
    "aten.rnn_tanh": "rnn",
    "aten.rnn_relu": "rnn",
    "aten.lstm_cell": "lstm_cell",
    "aten.gru_cell": "gru_cell",
    "aten.rnn_tanh_cell": "rnn_cell",
    "aten.rnn_relu_cell": "rnn_cell",
    "structured.site": "structured",
    "cond": "cond",
    "scan": "scan",
    "while_loop": "loop",
    "getitem": "getitem",
}

_CONV = ("strides", "pads", "dilations")


def operation(node: Node) -> str:
    """The normalised name; placeholders, outputs and unknown targets keep their own."""
    if node.op != "call_function":
        return node.op
    if node.target is operator.getitem:
        return "getitem"
    if isinstance(node.target, torch._ops.OpOverload):
        packet = node.target.overloadpacket
        name = f"{node.target.namespace}.{packet.__name__}"
        return OPERATIONS.get(name, name)
    return OPERATIONS.get(str(node.target), str(node.target))


def operands(node: Node) -> Sequence[Node | None]:
    """Tensor operands in the order that the Graph protocol fixes."""
    if operation(node) == "einsum":
        return list(node.args[1])  # type: ignore[arg-type]
    if operation(node) in ("linear", "addmm", "conv"):
        return [a if isinstance(a, Node) else None for a in node.args[:3]]
    if operation(node) == "layer_norm":
        return [a if isinstance(a, Node) else None for a in (node.args[0], *node.args[2:4])]
    if operation(node) == "rms_norm":
        return [a if isinstance(a, Node) else None for a in (node.args[0], *node.args[2:3])]
    return node.all_input_nodes if operation(node) not in ("matmul", "add", "mul", "sub", "div", "embedding") else _pair(node)


def _pair(node: Node) -> Sequence[Node | None]:
    return [a if isinstance(a, Node) else None for a in node.args[:2]]


def attributes(node: Node) -> Mapping[str, Any]:
    """The options of linears, under the protocol's names."""
    name, args, kwargs = operation(node), node.args, node.kwargs
    if name == "einsum":
        return {"equation": args[0]}
    if name == "addmm":
        return {"alpha": kwargs.get("alpha", 1), "beta": kwargs.get("beta", 1)}
    if name in ("add", "sub"):
        return {"alpha": kwargs.get("alpha", 1)}
    if name == "conv":
        return _conv(node)
    return {}


def _conv(node: Node) -> Mapping[str, Any]:
    given = dict(zip((*_CONV, "groups"), node.args[3:7], strict=False))
    if node.target is torch.ops.aten.convolution.default:
        if node.args[6]:
            return {"strides": (0,), "pads": (0,), "dilations": (1,), "groups": 0}  # transposed: no linear spelling of ours
        given["groups"] = node.args[8]
    given |= {k: v for k, v in node.kwargs.items() if k in given or k == "groups"}
    spelled = {key: given.get(key, 1 if key != "pads" else 0) for key in (*_CONV, "groups")}
    if isinstance(spelled["pads"], str):
        spelled["pads"] = 0  # "same" and "valid" are both 0 for the 1x1 kernels that ask
    return {k: (v if k == "groups" else tuple(v) if isinstance(v, list | tuple) else (v,)) for k, v in spelled.items()}
