"""What stands in for a site: layout changes, the opaque node, the bias; and the initialisers that it needs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor

from rewriter.backends.onnx.constants import Constants
from rewriter.backends.onnx.names import SCOPES
from rewriter.backends.onnx.opaque import field_paths, opaque
from rewriter.backends.onnx.tensors import from_torch
from rewriter.graph import Layout, Place, Site
from rewriter.operator import AbstractOperator, flatten


class Names:
    """Names that nothing in the model has, at any depth."""

    def __init__(self, model: ir.Model) -> None:
        self.taken = {value.name for graph in model.graphs() for value in [*graph.inputs, *graph.initializers.values()]}
        self.taken |= {value.name for node in model.graph.all_nodes() for value in node.outputs}
        self.taken |= {node.name for node in model.graph.all_nodes()}

    def unused(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self.taken:
            number += 1
            candidate = f"{name}_{number}"
        self.taken.add(candidate)
        return candidate


def store(model: ir.Model, names: Names, tensor: Tensor, name: str) -> ir.Value:
    """A new initialiser of the main graph, which every nested body sees."""
    name = names.unused(name)
    held = from_torch(tensor, name)
    value = ir.Value(name=name, shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(held.dtype), const_value=held)
    model.graph.register_initializer(value)
    return value


def store_factors(model: ir.Model, names: Names, site: str, operator: AbstractOperator) -> tuple[list[ir.Value], str]:
    """The operator's tensors as `<site>.<field>`, and its spec."""
    leaves, spec = flatten(operator)
    return [store(model, names, leaf, f"{site}.{path}") for leaf, path in zip(leaves, field_paths(spec), strict=True)], spec


class Bias:
    """bias * scale + shift: one new constant where the bias is constant, else as few nodes as it takes; equal places share."""

    def __init__(self, model: ir.Model, names: Names, constants: Constants, site: Site, shift: Tensor | None) -> None:
        self.model, self.names, self.constants = model, names, constants
        self.site, self.shift = site, shift
        self._made: dict[tuple[ir.Value | None, float], ir.Value] = {}

    def add(self, tape: Tape, y: ir.Value, bias: ir.Value | None, scale: float) -> ir.Value:
        """y plus all of it."""
        assert self.site.shape is not None
        width = self.site.shape[0]
        folds = bias is None or (self.constants.is_const(bias) and self.constants.load(bias).numel() in (1, width))
        if bias is None and self.shift is None:
            return y
        if folds and (self.shift is None and scale == 1.0):
            assert bias is not None
            return tape.op("Add", [y, self._flat(bias, width)])
        if folds:
            return tape.op("Add", [y, self._total(bias, scale, width)])
        assert bias is not None
        scaled = bias if scale == 1.0 else tape.op("Mul", [bias, self._scalar(scale)])
        total = tape.op("Add", [y, scaled])
        return total if self.shift is None else tape.op("Add", [total, self._total(None, 1.0, width)])

    def _flat(self, bias: ir.Value, width: int) -> ir.Value:
        """The bias itself, unless it has axes that would change the rank of the sum."""
        return bias if bias.shape is not None and len(bias.shape) <= 1 else self._total(bias, 1.0, width)

    def _total(self, bias: ir.Value | None, scale: float, width: int) -> ir.Value:
        if (bias, scale) not in self._made:
            old = torch.zeros(1) if bias is None else self.constants.load(bias).double() * scale
            total = old.reshape(-1) if self.shift is None else old.reshape(-1) + self.shift.double()
            assert self.site.dtype is not None
            stored = total.expand(width).to(self.site.dtype).contiguous()
            self._made[bias, scale] = store(self.model, self.names, stored, f"{self.site.name}.bias")
        return self._made[bias, scale]

    def _scalar(self, scale: float) -> ir.Value:
        assert self.site.dtype is not None
        return store(self.model, self.names, torch.tensor(scale, dtype=self.site.dtype), f"{self.site.name}.bias_scale")


def stand_in(
    tape: Tape, site: Site, place: Place, x: ir.Value, bias: ir.Value | None, factors: Sequence[ir.Value], spec: str, total: Bias
) -> ir.Value:
    """Emit a place's replacement onto the tape; its last value is what the place's y was."""
    assert site.shape is not None
    value, shape = features(tape, place.layout, x, site.shape[1])
    node = opaque([value], factors, spec, site.name, len(shape))
    scopes = place.nodes[0].metadata_props.get(SCOPES)
    if scopes:
        node.metadata_props[SCOPES] = scopes
    tape._nodes.append(node)  # a tape makes nodes, it cannot be handed one
    value = node.outputs[0]
    _typed(value, [*shape[:-1], site.shape[0]], x)
    return as_before(tape, place.layout, total.add(tape, value, bias, place.bias_scale), len(shape))


def resize(past: ir.Value, present: ir.Value, heads: int, width: int) -> None:
    """A cache (batch, heads, length, width) of these sizes, from the input to the output, what is put into it along with it."""
    stack = [present]
    while stack:
        value = stack.pop()
        if value.is_initializer() or value.shape is None or len(value.shape) != 4:
            continue
        value.shape = ir.Shape([value.shape[0], heads, value.shape[2], width])
        node = value.producer()
        if value is not past and node is not None and node.op_type in ("Concat", "Identity", "Cast"):
            stack += [v for v in node.inputs if v is not None]


def features(tape: Tape, layout: Layout, x: ir.Value, width: int) -> tuple[ir.Value, list[object]]:
    """The features of x along its last axis, and its shape then."""
    value, shape = x, list[object](x.shape or ())
    if layout.before:
        value = tape.op("Transpose", [value], {"perm": list(layout.before)})
        shape = [shape[axis] for axis in layout.before]
        _typed(value, shape, x)
    if layout.join > 1:
        shape = [*shape[: -layout.join], width]
        value = tape.op("Reshape", [value, ints(tape, *[0] * (len(shape) - 1), width)])
        _typed(value, shape, x)
    return value, shape


def as_before(tape: Tape, layout: Layout, y: ir.Value, rank: int) -> ir.Value:
    """A product of that rank with the features where a place has them."""
    if layout.spread:
        y = tape.op("Reshape", [y, ints(tape, *[0] * (rank - 1), *layout.spread)])
    return tape.op("Transpose", [y], {"perm": list(layout.after)}) if layout.after else y


def _typed(value: ir.Value, shape: Sequence[object], like: ir.Value) -> None:
    value.shape, value.type = ir.Shape(shape), like.type  # type: ignore[arg-type]


def ints(tape: Tape, *numbers: int) -> ir.Value:
    """A constant list of whole numbers."""
    return tape.op("Constant", [], {"value_ints": list(numbers)})
