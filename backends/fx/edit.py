"""Edits of an ExportedProgram's graph: new parameters, new nodes with their fake values, operands threaded into nested bodies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, Node

from rewriter.backends.fx.constants import Body
from rewriter.graph import Layout


def fake_mode(program: ExportedProgram) -> FakeTensorMode:
    """The mode that the program's shapes live in."""
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    return FakeTensorMode()


def call(graph: Graph, mode: FakeTensorMode, target: Any, *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
    """A call with its fake value; `like` lends its module path, so that the layer stays known in what is exported."""
    node = graph.call_function(target, args, kwargs)
    fakes = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    with mode:
        node.meta["val"] = target(*fakes, **kwargs)
    if like is not None:
        node.meta.update({k: like.meta[k] for k in ("nn_module_stack", "torch_fn") if k in like.meta})
    return node


def resize(mode: FakeTensorMode, past: Node, present: Node, heads: int, width: int) -> None:
    """A cache (batch, heads, length, width) of these sizes, from the input to the output."""
    with mode:
        fake = past.meta["val"]
        past.meta["val"] = fake.new_empty((fake.shape[0], heads, fake.shape[2], width))
    moved = {past}
    for node in past.graph.nodes:
        if moved.intersection(node.all_input_nodes) and isinstance(node.meta.get("val"), Tensor):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with mode:
                node.meta["val"] = node.target(*args, **kwargs)
            moved.add(node)
        if node is present:
            return


def features(call: Callable[..., Node], x: Node, layout: Layout) -> Node:
    """The features of x along its last axis."""
    if layout.before:
        x = call(torch.ops.aten.permute.default, x, list(layout.before))
    return call(torch.ops.aten.flatten.using_ints, x, -layout.join, -1) if layout.join > 1 else x


def as_before(call: Callable[..., Node], y: Node, layout: Layout) -> Node:
    """A product with the features where a place has them."""
    if layout.spread:
        y = call(torch.ops.aten.unflatten.int, y, -1, list(layout.spread))
    return call(torch.ops.aten.permute.default, y, list(layout.after)) if layout.after else y


def add_parameter(program: ExportedProgram, mode: FakeTensorMode, name: str, tensor: Tensor) -> Node:
    """A new parameter (a buffer where it is an index) in front of the program's inputs."""
    graph = program.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        node: Node = graph.placeholder("p_" + "".join(c if c.isalnum() else "_" for c in name))
    node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    floating = tensor.is_floating_point()
    kind = InputKind.PARAMETER if floating else InputKind.BUFFER
    spec = InputSpec(kind, TensorArgument(name=node.name), name, None if floating else True)
    program.graph_signature.input_specs.insert(0, spec)
    program.state_dict[name] = torch.nn.Parameter(tensor, requires_grad=False) if floating else tensor
    return node


def remove_parameters(program: ExportedProgram, nodes: Sequence[Node]) -> None:
    """Drop unused parameters, from the graph and from what is stored."""
    signature, gone = program.graph_signature, {n.name for n in nodes}
    dropped = [s.target for s in signature.input_specs if s.arg.name in gone]
    signature.input_specs[:] = [s for s in signature.input_specs if s.arg.name not in gone]
    for node in nodes:
        program.graph.erase_node(node)
    left = {s.target for s in signature.input_specs}
    for name in dropped:
        if name not in left:
            program.state_dict.pop(str(name), None)
            program.constants.pop(str(name), None)


def thread(value: Node, body: Body) -> Node:
    """The value as seen inside a nested cond body: one more operand of the call, one more placeholder in each of its branches."""
    if body.call is None or value.graph is body.module.graph:
        return value
    assert body.parent is not None
    outer = thread(value, body.parent)
    predicate, yes, no, given = body.call.args
    assert isinstance(given, Sequence)
    if outer in given:
        return _placeholders(body.module.graph)[list(given).index(outer)]
    body.call.args = (predicate, yes, no, (*given, outer))
    for branch in (yes, no):
        assert isinstance(branch, Node)
        graph = getattr(body.parent.module, str(branch.target)).graph
        last = _placeholders(graph)
        with graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes))):
            inner = graph.placeholder(value.name)
        inner.meta["val"] = value.meta["val"]
    return _placeholders(body.module.graph)[-1]


def _placeholders(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op == "placeholder"]


def drop_unused_operands(body: Body) -> None:
    """Take operands that no branch of a cond reads out of the call and out of its branches."""
    assert body.call is not None and body.parent is not None
    predicate, yes, no, given = body.call.args
    assert isinstance(given, Sequence)
    branches = [getattr(body.parent.module, str(b.target)).graph for b in (yes, no)]  # type: ignore[union-attr]
    columns = list(zip(*[_placeholders(g) for g in branches], strict=True))
    keep = [any(p.users for p in column) for column in columns]
    if all(keep):
        return
    body.call.args = (predicate, yes, no, tuple(g for g, kept in zip(given, keep, strict=True) if kept))
    for graph, row in zip(branches, zip(*columns, strict=True), strict=True):
        for placeholder, kept in zip(row, keep, strict=True):
            if not kept:
                graph.erase_node(placeholder)
