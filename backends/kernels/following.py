"""What follows a product and can be done with it: a constant bias, then an activation, whatever it is spelled with.

An activation is recognised by its values: the elementwise nodes between one value and the next that all of them lead to are evaluated
on a grid and compared with those that the kernel has.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.backends.kernels.naive import ACTIVATED
from rewriter.backends.onnx.compute import compute
from rewriter.backends.onnx.constants import Constants
from rewriter.tolerances import EQUAL

ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Neg", "Erf", "Gelu", "Relu", "Sigmoid", "Tanh", "Pow", "Exp", "Swish"}
MOST = 12  # nodes of an activation
_GRID = torch.linspace(-10, 10, 2001)


def bias_after(value: ir.Value, width: int, constants: Constants) -> tuple[Tensor, ir.Value] | None:
    """The (width,) bias that the value's only user adds, and the sum."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "Add":
        return None
    node = uses[0].node
    other = node.inputs[1 - uses[0].idx]
    if other is None or not constants.is_const(other) or node.domain not in ("", "ai.onnx"):
        return None
    bias = constants.load(other)
    if bias.dim() > 1 or bias.numel() not in (1, width) or bias.dtype != torch.float32:
        return None
    return bias.reshape(-1).expand(width).contiguous(), node.outputs[0]


def activation_after(value: ir.Value, constants: Constants) -> tuple[str, ir.Value] | None:
    """The activation of the value that nodes behind it compute, and its result."""
    rtol, atol = EQUAL[torch.float32]
    for end in _ends(value, constants):
        (found,) = compute([end], {value: _GRID}, constants)
        for name, function in ACTIVATED.items():
            if name and found.shape == _GRID.shape and torch.allclose(found, function(_GRID), rtol, atol):
                return name, end
    return None


def _ends(value: ir.Value, constants: Constants) -> Iterator[ir.Value]:
    """The values that are computed from this one elementwise and that all its users lead to, nearest first."""
    inside: set[ir.Value] = {value}
    while len(inside) <= MOST and not any(v.is_graph_output() for v in inside):
        readers = [use.node for v in inside for use in v.uses()]
        ready = [node for node in readers if _computes(node, inside, constants) and node.outputs[0] not in inside]
        if not ready:
            return
        made = ready[0].outputs[0]
        within = {node.outputs[0] for node in readers}
        if within <= inside | {made}:  # nothing but `made` is read outside
            yield made
        inside.add(made)


def _computes(node: ir.Node, inside: set[ir.Value], constants: Constants) -> bool:
    """Whether the node's one output follows from values inside and single numbers."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ELEMENTWISE or len(node.outputs) != 1:
        return False
    return all(v is not None and (v in inside or _single(v, constants)) for v in node.inputs)


def _single(value: ir.Value, constants: Constants) -> bool:
    return constants.is_const(value) and constants.load(value).numel() == 1
