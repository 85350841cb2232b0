"""A part of a model as a model of its own, for timing: what comes in from outside is an input, what goes out is an output.

Constants are stored as float32, whatever the model's type is: times are a question of shapes, and not every type has a product on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from rewriter.backends.onnx.constants import Constants
from rewriter.backends.onnx.opaque import SPEC, is_opaque
from rewriter.backends.onnx.tensors import from_torch

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def part(
    nodes: Sequence[ir.Node], widths: Mapping[ir.Value, int], rank: int, constants: Constants, opset: int, copies: int = 1
) -> ir.Model:
    """The nodes, in order, `copies` times, each with weights and inputs of its own. `widths`: the features of what is no constant."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="part")
    leading = [f"d{i}" for i in range(rank - 1)]
    for copy in range(copies):
        known: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            for value in node.inputs:
                if value is None or value in known:
                    continue
                if constants.is_const(value):
                    known[value] = _stored(graph, constants, value, f"w{len(known)}_{copy}")
                else:
                    known[value] = ir.val(f"x{len(known)}_{copy}", ir.DataType.FLOAT, [*leading, widths[value]])
                    graph.inputs.append(known[value])
            given = [None if value is None else known[value] for value in node.inputs]
            options = list(node.attributes.values())
            made = ir.Node(node.domain, node.op_type, given, options, version=node.version, metadata_props=node.metadata_props)
            graph.append(made)
            old, new = node.outputs[0], made.outputs[0]
            new.name, new.type, new.shape = f"v{len(known)}_{copy}", FLOAT, ir.Shape([*leading, widths[old]])
            known[old] = new
            if _leaves(old, nodes):
                graph.outputs.append(new)
    return ir.Model(graph, ir_version=10)


def _leaves(value: ir.Value, nodes: Sequence[ir.Node]) -> bool:
    """Whether it is read outside."""
    return value.is_graph_output() or any(use.node not in nodes for use in value.uses())


def _stored(graph: ir.Graph, constants: Constants, value: ir.Value, name: str) -> ir.Value:
    tensor = constants.load(value)
    held = from_torch(tensor.float() if tensor.is_floating_point() else tensor, name)
    made = ir.Value(name=name, shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(held.dtype), const_value=held)
    graph.register_initializer(made)
    return made


def text(nodes: Sequence[ir.Node], constants: Constants) -> str:
    """What the time of a part depends on: its nodes, how they are joined, their options and what they hold, but no names."""
    number: dict[ir.Value, int] = {}
    lines = []
    for node in nodes:
        read = [number.setdefault(v, len(number)) for v in node.inputs if v is not None and not constants.is_const(v)]
        held = node.metadata_props[SPEC] if is_opaque(node) else sorted(str(option) for option in node.attributes.values())
        number[node.outputs[0]] = len(number)
        lines.append(f"{node.op_type} {read} {held} {_leaves(node.outputs[0], nodes)}")
    return "\n".join(lines)
