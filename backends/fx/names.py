"""One spelling an idea: which aten targets mean linear, matmul, attention …, and where their operands and options stand."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from string import ascii_letters
from typing import Any

import torch
from torch.fx import Node

OPERATIONS: dict[str, str] = {
    "aten.linear": "linear",
    "aten.matmul": "matmul",
    "aten.mm": "matmul",
    "aten.bmm": "matmul",
    "aten.mv": "matmul",
    "aten.addmm": "addmm",
    "aten.baddbmm": "addmm",
    "aten.einsum": "einsum",
    "aten.tensordot": "einsum",
    "aten.inner": "einsum",
    "aten.linalg_multi_dot": "einsum",
    "aten.conv1d": "conv",
    "aten.conv2d": "conv",
    "aten.conv3d": "conv",
    "aten.convolution": "conv",
    "aten.add": "add",
    "aten.mul": "mul",
    "aten.sub": "sub",
    "aten.rsub": "rsub",
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
    "aten.where": "where",
    "aten.masked_fill": "masked_fill",
    "aten.logical_not": "not",
    "aten.bitwise_not": "not",
    "aten.pow": "pow",
    "aten.repeat": "repeat",
    "aten.tile": "repeat",
    "aten.repeat_interleave": "repeat_interleave",
    "aten.sym_size": "shape",
    "aten.full": "fill",
    "aten.full_like": "fill",
    "aten.new_full": "fill",
    "aten.scalar_tensor": "fill",
    "aten.embedding": "embedding",
    "aten.softmax": "softmax",
    "aten._softmax": "softmax",
    "aten._safe_softmax": "safe_softmax",
    "aten.select": "select",
    "aten.unbind": "unbind",
    "aten.split": "split",
    "aten.chunk": "split",
    "aten.split_with_sizes": "split",
    "aten.exp": "exp",
    "aten.log": "log",
    "aten.neg": "neg",
    "aten.sigmoid": "sigmoid",
    "aten.tanh": "tanh",
    "aten.relu": "relu",
    "aten.silu": "silu",
    "aten.softplus": "softplus",
    "aten.sqrt": "sqrt",
    "aten.abs": "abs",
    "aten.reciprocal": "reciprocal",
    "aten.stack": "stack",
    "aten.cat": "concat",
    "aten.outer": "outer",
    "aten.zeros": "zeros",
    "aten.new_zeros": "zeros",
    "aten.zeros_like": "zeros",
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
    "structured.map": "structured",
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
    if node.target is torch.ops.aten.full.default and node.args[1] == 0:
        return "zeros"
    return _named(node.target)


@functools.lru_cache(maxsize=4096)
def _named(target: Callable[..., Any]) -> str:
    if target is operator.getitem:
        return "getitem"
    name = f"{target.namespace}.{target.overloadpacket.__name__}" if isinstance(target, torch._ops.OpOverload) else str(target)
    return OPERATIONS.get(name, name)


def operands(node: Node) -> Sequence[Node | None]:
    """Tensor operands in the order that the Graph protocol fixes."""
    name = operation(node)
    if node.target in (torch.ops.aten.einsum.default, torch.ops.aten.linalg_multi_dot.default):
        return list(node.args[-1])  # type: ignore[arg-type]
    if name in ("matmul", "einsum", "add", "mul", "sub", "div", "pow", "embedding"):
        return _tensors(node.args[:2])
    if name in ("linear", "addmm", "conv", "where", "masked_fill"):
        return _tensors(node.args[:3])
    if name == "attention":
        return _tensors((*node.args[:3], node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")))
    if name in ("concat", "stack"):
        return list(node.args[0])  # type: ignore[arg-type]
    if name in ("layer_norm", "rms_norm"):
        return _tensors((node.args[0], *node.args[2 : 4 if name == "layer_norm" else 3]))
    if name in _RECURRENT:
        x, *others = node.all_input_nodes
        weights = _weights(node)
        return [x, *weights, *(v for v in others if v not in weights)]
    return node.all_input_nodes


def _tensors(given: Sequence[Any]) -> list[Node | None]:
    return [a if isinstance(a, Node) else None for a in given]


def attributes(node: Node) -> Mapping[str, Any]:
    """The options, under the protocol's names where it has some."""
    name, kwargs = operation(node), node.kwargs
    if name == "einsum":
        return {"equation": _equation(node)}
    if name == "addmm":
        return {"alpha": kwargs.get("alpha", 1), "beta": kwargs.get("beta", 1)}
    if name == "conv":
        return _conv(node)
    plain = [a for a in node.args if not isinstance(a, Node)]
    special = _OPTIONS[name](node) if name in _OPTIONS else {}
    return {"arguments": tuple(map(str, plain)), **{k: str(v) for k, v in kwargs.items()}, **special}


def _scalars(node: Node) -> dict[str, Any]:
    """The numbers that stand in place of operands."""
    numbers = tuple(float(a) if isinstance(a, int | float) else None for a in node.args[:3])
    rounded = {"rounding": node.kwargs["rounding_mode"]} if node.kwargs.get("rounding_mode") else {}
    return {"alpha": node.kwargs.get("alpha", 1), "scalars": numbers, **rounded}


def _fill(node: Node) -> dict[str, Any]:
    value = next((a for a in reversed(node.args) if isinstance(a, int | float)), None)
    return {} if value is None else {"scalar": float(value)}


def _transpose(node: Node) -> dict[str, Any]:
    rank = node.meta["val"].dim()
    axes = list(range(rank))
    if node.target is torch.ops.aten.permute.default:
        axes = [a % rank for a in node.args[1]]  # type: ignore[union-attr]
    elif node.target is torch.ops.aten.transpose.int:
        a, b = node.args[1:3]
        axes[a], axes[b] = axes[b], axes[a]  # type: ignore[index]
    else:
        axes.reverse()
    return {"axes": tuple(axes)}


def _weights(node: Node) -> list[Node]:
    """The matrices and biases of a recurrent layer or cell: a layer's are its last list."""
    found = next((a for a in reversed(node.args) if isinstance(a, list | tuple)), ())
    return [a for a in (node.args[2:6] if operation(node).endswith("_cell") else found) if isinstance(a, Node)]


def _attention(node: Node) -> dict[str, Any]:
    given = dict(zip(("dropout", "causal"), node.args[4:6], strict=False))
    dropped = given.get("dropout", node.kwargs.get("dropout_p", 0.0))
    own = node.target is torch.ops.aten.scaled_dot_product_attention.default
    beyond = "it holds its own projections" if not own else "it drops weights at random" if dropped else ""
    causal = bool(given.get("causal", node.kwargs.get("is_causal", False)))
    return {"scale": node.kwargs.get("scale"), "causal": causal, "empty": "zero", "beyond": beyond}


_RECURRENT = ("rnn", "lstm", "gru", "rnn_cell", "lstm_cell", "gru_cell")
_OPTIONS: dict[str, Callable[[Node], dict[str, Any]]] = {
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "pow", "where", "masked_fill"), _scalars),
    "fill": _fill,
    "zeros": lambda node: {"scalar": 0.0},
    "shape": lambda node: {"axes": (node.args[1],)},
    "transpose": _transpose,
    "softmax": lambda node: {"axis": node.args[1]},
    "safe_softmax": lambda node: {"axis": node.args[1]},
    "attention": _attention,
    **dict.fromkeys(_RECURRENT, lambda node: {"weights": len(_weights(node))}),
}


def _equation(node: Node) -> str:
    """An einsum's own; inner, tensordot and multi_dot spelled as one."""
    if node.target is torch.ops.aten.einsum.default:
        return str(node.args[0])
    letters = iter(ascii_letters)
    terms = [[next(letters) for _ in range(value.meta["val"].dim())] for value in operands(node) if value is not None]
    pairs: Any = ([-1], [-1])  # inner
    if node.target is torch.ops.aten.linalg_multi_dot.default:
        pairs = ([-1], [0])
    if node.target is torch.ops.aten.tensordot.default:
        pairs = node.args[2:4]
    for left, right in pairwise(terms):
        for a, b in zip(*pairs, strict=True):
            right[b] = left[a]
    together = [c for term in terms for c in term]
    return f"{','.join(map(''.join, terms))}->{''.join(c for c in together if together.count(c) == 1)}"


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
