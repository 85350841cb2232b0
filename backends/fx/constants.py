"""Constants of an exported program: parameters and everything computed from them alone, across nested bodies.

A value is constant when it is a parameter, a buffer or a lifted tensor, made of nothing (`eye`, `ones`) in a known size, or a pure
operation whose tensor operands are all constant: so `x @ w.T`, packed weights cut by `chunk`, weight norms and dequantised weights all look
like the stored weight that they come from. One walk
answers every question (which values are constant, from which parameter, used where) and reads no weight; an edit drops what it found.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node

STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
LARGEST = 1 << 24  # entries of a constant that is made from nothing
_CALLS = {  # their operands follow the body
    "invoke_subgraph", "tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint", "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
}  # fmt: skip


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
    name, args = str(call.target), list(call.args)
    if name == "cond":
        return list(args[3])  # type: ignore[arg-type]
    if name == "while_loop":
        return [None] * len(args[2]) + list(args[3])  # type: ignore[arg-type]
    if name == "scan":
        return [None] * (len(args[1]) + len(args[2])) + list(args[3])  # type: ignore[arg-type]
    if name == "map_impl":
        return [None] * len(args[1]) + list(args[2])  # type: ignore[arg-type]
    if name == "associative_scan":
        return [None] * (2 * len(args[1])) + list(args[2] if len(args) > 2 else ())  # type: ignore[arg-type]
    if name in _CALLS:
        body = next(i for i, a in enumerate(args) if isinstance(a, Node) and a.op == "get_attr")
        return [a for a in args[body + 1 :] if not isinstance(a, str)]
    return []


@dataclass
class _Index:
    """What one walk finds."""

    seen: set[Node] = field(default_factory=set)
    stored: dict[Node, str] = field(default_factory=dict)  # placeholder of the main body -> the parameter's name
    outer: dict[Node, Node] = field(default_factory=dict)  # nested placeholder -> the caller's operand
    roots: dict[Node, Node] = field(default_factory=dict)  # constant value -> what is behind it, stored or made; all constants are keys
    users: dict[object, list[tuple[Node, Node]]] = field(default_factory=dict)  # memory -> (user, operand)


class Constants:
    """Answers which values of a program are constant, and loads them one at a time."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self._found = _Index()
        self._stale = True

    def forget(self) -> None:
        """The graph changed: look again at the next question that the change could touch."""
        self._stale = True

    @property
    def _index(self) -> _Index:
        if self._stale:
            self._found, self._stale = self._walk(), False
        return self._found

    def _index_of(self, value: Node) -> _Index:
        """An edit adds and drops nodes; what a node that stays is computed from does not change."""
        return self._found if value in self._found.seen else self._index

    @property
    def stored(self) -> dict[Node, str]:
        """The parameter that each placeholder of the main body holds."""
        return self._index.stored

    def is_const(self, value: Node) -> bool:
        return value in self._index_of(value).roots

    def root(self, value: Node) -> str:
        """The stored parameter behind a constant value; the largest where several go in; without one, the largest that is made."""
        index = self._index_of(value)
        return index.stored.get(index.roots[value], index.roots[value].name)

    def outermost(self, value: Node) -> Node:
        """The caller's operand that a nested placeholder is bound to, through every body between; else the value itself."""
        outer = self._index_of(value).outer
        while value in outer:
            value = outer[value]
        return value

    def users(self, value: Node) -> Sequence[tuple[Node, Node]]:
        """(node, operand) wherever what is behind a constant value is used, under any tied name, through constant operations and bodies."""
        index = self._index
        return index.users.get(self._origin(index, index.roots[value]), [])

    def load(self, value: Node) -> Tensor:
        """The tensor of a constant value: what it is computed from first, each once."""
        index, known, waiting = self._index_of(value), dict[Node, Tensor](), [value]
        while waiting:
            node = waiting[-1]
            if node in known:
                waiting.pop()
                continue
            if node in index.stored:
                known[node] = self._stored(index.stored[node])
                continue
            needed = [index.outer[node]] if node in index.outer else node.all_input_nodes
            missing = [n for n in needed if n not in known]
            if missing:
                waiting += missing
            else:
                known[node] = known[needed[0]] if node in index.outer else _evaluate(node, known)
        return known[value]

    def _stored(self, name: str) -> Tensor:
        state = self.program.state_dict
        tensor: Tensor = state[name] if name in state else self.program.constants[name]
        return tensor.detach()

    def _memory(self, name: str) -> object:
        """Where a parameter begins: tied names begin at one address, also as views of another shape."""
        return self._stored(name).data_ptr() or name

    def _origin(self, index: _Index, root: Node) -> object:
        """What is the same for all that one tensor is behind: its memory, or the node that makes it, as bodies use one name twice."""
        return self._memory(index.stored[root]) if root in index.stored else root

    def _walk(self) -> _Index:
        index = _Index()
        signature = self.program.graph_signature
        names = {s.arg.name: s.target for s in signature.input_specs if s.kind in STORED and s.target}
        mutated = set(signature.buffers_to_mutate.values())
        origins: dict[Node, frozenset[Node]] = {}  # constant value -> all that is stored, or made from nothing, and goes into it
        for body in bodies(self.program):
            placeholders = [n for n in body.module.graph.nodes if n.op == "placeholder"]
            if body.call is None:
                index.stored = {n: names[n.name] for n in placeholders if n.name in names}
                origins.update({n: frozenset([n]) for n, name in index.stored.items() if name not in mutated})
            else:
                bound = zip(placeholders, operands(body.call), strict=False)
                index.outer.update({p: o for p, o in bound if isinstance(o, Node)})
                origins.update({p: origins[index.outer[p]] for p in placeholders if index.outer.get(p) in origins})
            for node in body.module.graph.nodes:
                index.seen.add(node)
                inputs = node.all_input_nodes
                if node.op != "call_function" or not _pure(node):
                    continue
                if inputs and all(n in origins for n in inputs):
                    origins[node] = frozenset().union(*(origins[n] for n in inputs))
                elif _made(node):
                    origins[node] = frozenset([node])
        order = {n: i for i, n in enumerate([*index.stored, *(v for v in origins if not v.all_input_nodes)])}
        index.roots = {v: max(behind, key=lambda n: (n in index.stored, _numel(n), -order[n])) for v, behind in origins.items()}
        self._note_users(index, origins)
        return index

    def _note_users(self, index: _Index, origins: dict[Node, frozenset[Node]]) -> None:
        memory = {n: self._origin(index, n) for behind in origins.values() for n in behind}
        for value, behind in origins.items():
            for user in value.users:
                if user in origins or (isinstance(user.target, torch._ops.HigherOrderOperator) and value in operands(user)):
                    continue
                for key in {memory[n] for n in behind}:
                    index.users.setdefault(key, []).append((user, value))


def _evaluate(node: Node, known: dict[Node, Tensor]) -> Tensor:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    with torch.no_grad():
        result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def _numel(node: Node) -> int:
    fake = node.meta.get("val")
    return fake.numel() if isinstance(fake, Tensor) else 0


def _made(node: Node) -> bool:
    """From nothing, of a size that can be held; `empty` has no numbers yet."""
    fake = node.meta.get("val")
    if node.all_input_nodes or not isinstance(fake, Tensor) or "empty" in str(node.target):
        return False
    return all(isinstance(n, int) for n in fake.shape) and fake.numel() <= LARGEST


def _pure(node: Node) -> bool:
    """Gives the same result from the same operands. (Constants have constant sizes: a symbolic one would be an operand that varies.)"""
    if node.target is operator.getitem:
        return True
    if node.target in (torch.ops.aten.dropout.default, torch.ops.aten.feature_dropout.default):
        return node.args[2] is False
    return isinstance(node.target, torch._ops.OpOverload) and _pure_target(node.target)


@functools.lru_cache(maxsize=4096)
def _pure_target(target: torch._ops.OpOverload) -> bool:
    known = target.namespace in ("aten", "prims", "quantized_decomposed")
    return known and not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
