"""A part of a model as a model of its own, for timing: what comes in from outside is an input, what goes out is an output.

Floats are stored as float32, whatever the model's type is: times are a question of shapes, and not every type has a product on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from rewriter.backends.onnx.constants import SMALL, Constants
from rewriter.backends.onnx.opaque import SPEC, is_opaque
from rewriter.backends.onnx.tensors import from_torch

FLOAT = ir.TensorType(ir.DataType.FLOAT)
Dims = Sequence[int | str | None]


def part(nodes: Sequence[ir.Node], dims: Mapping[ir.Value, Dims], constants: Constants, opset: int, copies: int = 1) -> ir.Model:
    """The nodes, in order, `copies` times, each with weights and inputs of its own. `dims`: of what is no constant.

    Copy i has rows of its weights rolled by i, so that nobody can store two copies once.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="part")
    for copy in range(copies):
        known: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            for value in node.inputs:
                if value is None or value in known:
                    continue
                if constants.is_const(value):
                    known[value] = _stored(graph, constants, value, f"w{len(known)}_{copy}", copy)
                else:
                    known[value] = _of(value, ir.Value(name=f"x{len(known)}_{copy}"), dims)
                    graph.inputs.append(known[value])
            given = [None if value is None else known[value] for value in node.inputs]
            made = _like(node, given)
            graph.append(made)
            for old, new in zip(node.outputs, made.outputs, strict=True):
                new.name = f"v{len(known)}_{copy}"
                known[old] = _of(old, new, dims) if old in dims else new
                if leaves(old, nodes):
                    graph.outputs.append(new)
    return ir.Model(graph, ir_version=10)


def leaves(value: ir.Value, nodes: Sequence[ir.Node]) -> bool:
    """Whether it is read outside."""
    return value.is_graph_output() or any(use.node not in nodes for use in value.uses())


def _like(node: ir.Node, given: Sequence[ir.Value | None]) -> ir.Node:
    options, meta, outputs = list(node.attributes.values()), node.metadata_props, len(node.outputs)
    return ir.Node(
        node.domain,
        node.op_type,
        given,
        options,
        overload=node.overload,
        version=node.version,
        num_outputs=outputs,
        metadata_props=meta,
    )


def _of(value: ir.Value, made: ir.Value, dims: Mapping[ir.Value, Dims]) -> ir.Value:
    """With the shape and the type of a value."""
    made.shape = ir.Shape(dims[value])
    made.type = FLOAT if value.dtype is None or value.dtype.is_floating_point() else ir.TensorType(value.dtype)
    return made


def _stored(graph: ir.Graph, constants: Constants, value: ir.Value, name: str, copy: int) -> ir.Value:
    tensor = constants.load(value)
    if copy and tensor.numel() > SMALL:
        tensor = tensor.roll(copy, 0)
    held = from_torch(tensor.float() if tensor.is_floating_point() else tensor, name)
    made = ir.Value(name=name, shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(held.dtype), const_value=held)
    graph.register_initializer(made)
    return made


def text(nodes: Sequence[ir.Node], constants: Constants) -> str:
    """What the time of a part depends on: its nodes, how they are joined, their options and what they hold, but no names."""
    number: dict[ir.Value, int] = {}
    lines = []
    for node in nodes:
        read = [_told(v, constants) or number.setdefault(v, len(number)) for v in node.inputs if v is not None]
        held = node.metadata_props[SPEC] if is_opaque(node) else sorted(map(_option, node.attributes.values()))
        number |= {v: len(number) + i for i, v in enumerate(node.outputs)}
        lines.append(f"{node.domain} {node.op_type} {read} {held} {[leaves(v, nodes) for v in node.outputs]}")
    return "\n".join(lines)


def _option(option: ir.Attr) -> str:
    """A file rounds floats to 32 bits."""
    return f"{option.name}={option.value:.6g}" if option.type == ir.AttributeType.FLOAT else f"{option.name}={option.value}"


def _told(value: ir.Value, constants: Constants) -> str:
    """A constant's shape, and what it holds where that is little: sizes, axes, scales."""
    if not constants.is_const(value):
        return ""
    tensor = constants.load(value)
    return f"{tensor.dtype} {list(tensor.shape)}{f' {tensor.tolist()}' if tensor.numel() <= SMALL else ''}"
