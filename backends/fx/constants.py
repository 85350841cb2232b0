"""Constants of an exported program: parameters and everything computed from them alone, across nested bodies.

A value is constant when it is a parameter, a buffer or a lifted tensor, or a pure operation whose tensor operands are all constant: so `x @ w.T`,
packed weights cut by `chunk`, weight norms and dequantised weights all look like the stored weight that they come from.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
BRANCHES = {"cond"}  # every body gets the operands as they are, so a body's placeholder is the call's operand


@dataclass(frozen=True)
class Body:
    """A graph module and the call that owns it; the main body has none."""

    name: str
    module: GraphModule
    call: Node | None = None
    parent: Body | None = None


def bodies(program: ExportedProgram) -> list[Body]:
    """The main body and every nested one, callers first."""
    found = [Body("", program.graph_module)]
    for body in found:
        for node in body.module.graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                for arg in node.all_input_nodes:
                    nested = getattr(body.module, str(arg.target), None) if arg.op == "get_attr" else None
                    if isinstance(nested, GraphModule):
                        found.append(Body(f"{body.name}{'.' if body.name else ''}{arg.target}", nested, node, body))
    return found


def operands(call: Node) -> list[Any]:
    """What the placeholders of a call's bodies are bound to, None where the binding changes from step to step."""
    name = str(call.target)
    if name == "cond":
        return list(call.args[3])  # type: ignore[arg-type]
    if name == "while_loop":
        return [None] * len(call.args[2]) + list(call.args[3])  # type: ignore[arg-type]
    if name == "scan":
        first = next(iter(call.args))
        assert isinstance(first, Node)
        return [None] * (len(call.args[1]) + len(call.args[2])) + list(call.args[3])  # type: ignore[arg-type]
    return []


class Constants:
    """Answers which values of a program are constant, and loads them one at a time."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.stored: dict[Node, str] = {}  # placeholder or get_attr -> the parameter's name
        self.outer: dict[Node, Node] = {}  # nested placeholder -> the caller's operand
        self.known: dict[Node, bool] = {}
        self.index()

    def index(self) -> None:
        """Read the program's placeholders again, after an edit."""
        self.known.clear()
        names = {s.arg.name: s.target for s in self.program.graph_signature.input_specs if s.kind in STORED and s.target}
        for body in bodies(self.program):
            placeholders = [n for n in body.module.graph.nodes if n.op == "placeholder"]
            if body.call is None:
                self.stored.update({n: names[n.name] for n in placeholders if n.name in names})
                continue
            bound = operands(body.call)
            self.outer.update({p: o for p, o in zip(placeholders, bound, strict=False) if isinstance(o, Node)})

    def is_const(self, value: Node) -> bool:
        if value not in self.known:
            self.known[value] = self._is_const(value)
        return self.known[value]

    def _is_const(self, node: Node) -> bool:
        if node in self.stored:
            return True
        if node in self.outer:
            return self.is_const(self.outer[node])
        if node.op != "call_function" or not node.all_input_nodes or not _pure(node):
            return False
        return all(self.is_const(n) for n in node.all_input_nodes)

    def load(self, value: Node) -> Tensor:
        """The tensor of a constant value."""
        if value in self.stored:
            return self._stored(self.stored[value])
        if value in self.outer:
            return self.load(self.outer[value])
        args, kwargs = torch.fx.node.map_arg((value.args, value.kwargs), self.load)
        with torch.no_grad():
            result: Tensor = value.target(*args, **kwargs)  # type: ignore[operator]
        return result

    def _stored(self, name: str) -> Tensor:
        state = self.program.state_dict
        tensor = state[name] if name in state else self.program.constants[name]
        return tensor.detach()  # type: ignore[union-attr]

    def root(self, value: Node) -> str:
        """The stored parameter behind a constant value; the first one where several go in."""
        while value not in self.stored:
            value = self.outer[value] if value in self.outer else value.all_input_nodes[0]
        return self.stored[value]

    def tied(self, name: str) -> set[str]:
        """Every stored name that shares memory with this one."""
        key = _memory(self._stored(name))
        return {other for other in self.stored.values() if _memory(self._stored(other)) == key}

    def users(self, name: str) -> Iterator[tuple[Node, Node]]:
        """(node, operand) wherever the parameter is used under any tied name, seen through constant operations and nested bodies."""
        names = self.tied(name)
        front = [n for n, stored in self.stored.items() if stored in names]
        inner: dict[Node, list[Node]] = {}
        for placeholder, outer in self.outer.items():
            inner.setdefault(outer, []).append(placeholder)
        while front:
            value = front.pop()
            front.extend(inner.get(value, []))
            for user in value.users:
                if self.is_const(user):
                    front.append(user)
                elif not isinstance(user.target, torch._ops.HigherOrderOperator):
                    yield user, value


def _memory(tensor: Tensor) -> tuple[int, int, tuple[int, ...]]:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape)


def _pure(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace not in ("aten", "prims", "quantized_decomposed"):
        return False
    symbolic = any(isinstance(a, torch.SymInt) for a in node.args)
    return not (node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags or symbolic)
