"""What follows a product and can be done with it: a constant bias, an activation whatever it is spelled with, a sum with another value,
and a LayerNorm of that sum; between them once a Reshape that leaves the features alone, as exporters put around matrices of two axes.

An activation is recognised by its values: the elementwise nodes between one value and the next that all of them lead to are evaluated
on a grid and compared with those that the kernel has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.backends.kernels.naive import ACTIVATED
from rewriter.backends.kernels.plan import Ending, Norm
from rewriter.backends.onnx.compute import compute
from rewriter.backends.onnx.constants import Constants
from rewriter.tolerances import EQUAL

ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Neg", "Erf", "Gelu", "Relu", "Sigmoid", "Tanh", "Pow", "Exp", "Swish"}
MOST = 12  # nodes of an activation
_GRID = torch.linspace(-10, 10, 2001)


@dataclass(frozen=True)
class Following:
    """Up to which value, and what it takes beside."""

    end: ir.Value
    ending: Ending
    skip: ir.Value | None = None
    reshape: ir.Node | None = None

    @property
    def said(self) -> tuple[str, ...]:
        """In the order in which it is done."""
        ending = self.ending
        parts = (("bias", ending.bias is not None), (ending.activation, ending.activation), ("sum", ending.skip), ("norm", ending.norm))
        return tuple(name for name, there in parts if there)


def following(value: ir.Value, width: int, constants: Constants) -> Following:
    """As much as there is, in this order."""
    bias, activation, skip, norm = None, "", None, None
    value, reshape = _reshaped(value, width, None)
    if (found := bias_after(value, width, constants)) is not None:
        bias, value = found
        value, reshape = _reshaped(value, width, reshape)
    if (acts := activation_after(value, constants)) is not None:
        activation, value = acts
        value, reshape = _reshaped(value, width, reshape)
    if (sums := sum_after(value, constants)) is not None:
        skip, value = sums
    if (norms := norm_after(value, width, constants)) is not None:
        norm, value = norms
    return Following(value, Ending(bias, activation, skip is not None, norm), skip, reshape)


def _reshaped(value: ir.Value, width: int, before: ir.Node | None) -> tuple[ir.Value, ir.Node | None]:
    """What the Reshape that is the value's only user gives, and that node; after one there is no second."""
    use = None if before is not None else _only_use(value, "Reshape")
    if use is None or use[1] != 0 or len(use[0].inputs) != 2:
        return value, before
    made = use[0].outputs[0]
    kept = made.shape is not None and len(made.shape) > 0 and made.shape[-1] == width
    return (made, use[0]) if kept else (value, None)


def _only_use(value: ir.Value, kind: str) -> tuple[ir.Node, int] | None:
    """The value's only user and which input it is there, where that is a standard node of this kind."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != kind or uses[0].node.domain not in ("", "ai.onnx"):
        return None
    return uses[0].node, uses[0].idx


def bias_after(value: ir.Value, width: int, constants: Constants) -> tuple[Tensor, ir.Value] | None:
    """The (width,) bias that the value's only user adds, and the sum."""
    if (use := _only_use(value, "Add")) is None:
        return None
    node, at = use
    other = node.inputs[1 - at]
    if other is None or not constants.is_const(other):
        return None
    bias = constants.load(other)
    if bias.dim() > 1 or bias.numel() not in (1, width) or bias.dtype != torch.float32:
        return None
    return bias.reshape(-1).expand(width).contiguous(), node.outputs[0]


def sum_after(value: ir.Value, constants: Constants) -> tuple[ir.Value, ir.Value] | None:
    """The value of the same shape that the value's only user adds, and the sum; that shape has to be known."""
    if (use := _only_use(value, "Add")) is None or value.shape is None:
        return None
    node, at = use
    other = node.inputs[1 - at]
    if other is None or constants.is_const(other) or value.shape != other.shape or other.dtype != ir.DataType.FLOAT:
        return None
    unknown = any(isinstance(d, ir.SymbolicDim) and d.value is None for d in value.shape)
    return None if unknown else (other, node.outputs[0])


def norm_after(value: ir.Value, width: int, constants: Constants) -> tuple[Norm, ir.Value] | None:
    """The LayerNormalization over the features that the value's only user is, and its result."""
    use = _only_use(value, "LayerNormalization")
    if use is None or use[1] != 0 or value.shape is None:
        return None
    node, _ = use
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if axis not in (-1, len(value.shape) - 1) or any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return None
    given = [v for v in node.inputs[1:] if v is not None]
    if not given or not all(constants.is_const(v) for v in given):
        return None
    gamma, beta = constants.load(given[0]), constants.load(given[1]) if len(given) > 1 else torch.zeros(width)
    if gamma.shape != (width,) or beta.shape != (width,) or gamma.dtype != torch.float32:
        return None
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    return Norm(gamma, beta, epsilon), node.outputs[0]


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
