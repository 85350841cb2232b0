"""Two ways to one value, by how many rows a call brings: If(Size(x) <= most * width), each way in a body that sees what is around it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.tape import Tape

from rewriter.algebra import ByTokens
from rewriter.backends.onnx.opaque import SITE, is_opaque, opaque, spec_of
from rewriter.operator import AbstractMatrix, flatten, skeleton

BRANCHES = ("then_branch", "else_branch")  # few and many rows
Way = tuple[Sequence[ir.Node], ir.Value]  # nodes, and the one of their outputs that is the value


def either(tape: Tape, x: ir.Value, most: int, width: int, few: Way, many: Way) -> ir.Value:
    """`few` where x, whose last axis is `width` long, has at most `most` rows, else `many`."""
    bound = tape.op("Constant", [], {"value_int": most * width})
    return chosen(tape, tape.op("LessOrEqual", [tape.op("Size", [x]), bound]), few, many)


def chosen(tape: Tape, condition: ir.Value, then: Way, other: Way) -> ir.Value:
    """`then` where a boolean without axes holds, else `other`."""
    bodies = {
        branch: ir.Graph([], [value], nodes=nodes, name=branch) for branch, (nodes, value) in zip(BRANCHES, (then, other), strict=True)
    }
    return tape.op("If", [condition], bodies)


def name_inside(graph: ir.Graph) -> None:
    """Each value by a name of its own: tapes count for themselves, and a body sees what is around it."""
    for i, value in enumerate(v for node in graph.all_nodes() for v in node.outputs):
        value.name = f"v{i}"


def parted(model: ir.Model) -> list[ir.Node]:
    """In place: what holds two forms becomes an If over two opaque nodes, so that each is seen alone; gives those."""
    found: list[ir.Node] = []
    for node in list(model.graph.all_nodes()):
        if (operator := _two_forms(node)) is None:
            continue
        x, *factors = (value for value in node.inputs if value is not None)
        cut = len(flatten(operator.few)[0])  # its factors come first
        few, many = _alone(node, operator.few, [x, *factors[:cut]], "few"), _alone(node, operator.many, [x, *factors[cut:]], "many")
        tape = Tape()
        y = either(tape, x, operator.most, operator.shape[1], ([few], few.outputs[0]), ([many], many.outputs[0]))
        _stand_in(node, y, tape)
        found += [few, many]
    return found


def _two_forms(node: ir.Node) -> ByTokens | None:
    """None where there are none, or where the node has other inputs than its spec says."""
    if not is_opaque(node):
        return None
    try:
        operator, leaves = skeleton(spec_of(node)[0])
    except Exception:  # a file may say anything of its nodes
        return None
    fits = len(node.inputs) == 1 + len(leaves) and None not in node.inputs
    return operator if fits and isinstance(operator, ByTokens) else None


def _alone(node: ir.Node, form: AbstractMatrix, inputs: Sequence[ir.Value], name: str) -> ir.Node:
    made = opaque(inputs, [], flatten(form)[1], node.metadata_props.get(SITE, ""), spec_of(node)[1])
    made.name = made.outputs[0].name = f"{node.outputs[0].name}.{name}"
    made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    return made


def _stand_in(node: ir.Node, y: ir.Value, tape: Tape) -> None:
    """In the node's place and under its output's name."""
    old = node.outputs[0]
    for i, made in enumerate(tape.nodes):
        made.name = made.outputs[0].name = f"{old.name}.either{i}"
    assert node.graph is not None
    node.graph.insert_after(node, tape.nodes)
    y.shape, y.type = old.shape, old.type
    old.replace_all_uses_with(y, replace_graph_outputs=True)
    old.name, y.name = y.name, old.name
    node.graph.remove(node, safe=True)
