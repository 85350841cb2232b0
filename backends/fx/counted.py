"""torch's while_loop that counts, read as a loop over sequences: i = 0; while i < len(x): …; i + 1.

x.index_select(dim, i) is one step of a sequence from outside, y.index_copy(dim, i, row) writes one of a result. (An index that is no tensor
of its own, x[:, i], is more than torch exports.)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from rewriter.graph import Carry, Loop, Slice

aten = torch.ops.aten
_SAME = (aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.clone.default)


def counted(node: Node, cond: GraphModule, body: GraphModule, stored: Callable[[Node], Tensor | None]) -> Loop | str:
    """The loop, or what of it is none. `stored` gives the tensor of a constant value, else None."""
    _, _, initial, outside = node.args
    assert isinstance(initial, Sequence) and isinstance(outside, Sequence)
    formal = [n for n in body.graph.nodes if n.op == "placeholder"]
    (results,) = body.graph.output_node().args
    items: dict[Any, Node] = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    assert isinstance(results, Sequence)
    number = next((k for k, (b, e) in enumerate(zip(formal, results, strict=False)) if _plus_one(e, b)), None)
    if number is None or not _zero(initial[number], stored) or (number in items and items[number].users):
        return "torch's while_loop without a counter from 0 in steps of 1"
    count = _count(cond, number, [*initial, *outside])
    if count is None:
        return "torch's while_loop that ends by more than its counter and a length"
    held = dict(zip(formal[len(initial) :], outside, strict=False))
    taken: list[Slice] = []
    written: dict[int, Slice] = {}
    for user in _readers(formal[number]):
        if user is results[number]:
            continue
        if user.target is aten.index_select.default and user.args[0] in held:
            taken += _slices(user, held[user.args[0]], _axis(user))
        elif user.target is aten.index_copy.default and user in results and user.args[0] is formal[results.index(user)]:
            k = results.index(user)
            written[k] = _slice(user.args[3], items.get(k, user), _axis(user))
        else:
            return f"torch's while_loop that uses its counter in {user.name}"
    given = [y for k, y in written.items() if k in items]
    if any(len(formal[k].users) > 1 for k in written):
        return "torch's while_loop that reads what it has written"
    if not all(_size(s.outer, s.axis) == count for s in (*taken, *given)):
        return "torch's while_loop whose count is not the length of its sequences"
    carried = [k for k in range(len(initial)) if k != number and k not in written]
    carries = [Carry(formal[k], results[k], initial[k], items[k] if k in items and items[k].users else None) for k in carried]
    return Loop((node, *items.values()), tuple(carries), tuple(taken), tuple(given))


def _slices(cut: Node, outer: Node, axis: int) -> Iterator[Slice]:
    """One step of a sequence as the body uses it: without its axis, or with it."""
    for user in cut.users:
        if user.target is aten.squeeze.dim and _axis(user) == axis:
            yield Slice(user, outer, axis)
    if any(user.target is not aten.squeeze.dim or _axis(user) != axis for user in cut.users):
        yield Slice(cut, outer, axis, kept=True)


def _slice(row: Any, outer: Node, axis: int) -> Slice:
    """One step of a result, before it gets an axis."""
    if row.target is aten.unsqueeze.default and row.args[1] % len(row.meta["val"].shape) == axis:
        return Slice(row.args[0], outer, axis)
    return Slice(row, outer, axis, kept=True)


def _axis(node: Node) -> int:
    """The axis that it names, of its operand, from the front."""
    operand: Any = node.args[0]
    axis: Any = node.args[1] if len(node.args) > 1 else 0
    return int(axis) % max(1, len(operand.meta["val"].shape))


def _plus_one(end: Any, begin: Node) -> bool:
    return isinstance(end, Node) and end.target is aten.add.Tensor and end.args == (begin, 1) and not end.kwargs


def _zero(value: Any, stored: Callable[[Node], Tensor | None]) -> bool:
    """A number that is 0, stored or made."""
    held = stored(value)
    made: bool = value.target in (aten.zeros.default, aten.zeros_like.default) or (value.target is aten.full.default and value.args[1] == 0)
    return made or (held is not None and int(held) == 0)


def _readers(number: Node) -> Iterator[Node]:
    """What uses it, through changes of shape."""
    for user in number.users:
        if user.target in _SAME:
            yield from _readers(user)
        elif user.op != "output":
            yield user


def _count(cond: GraphModule, number: int, operands: Sequence[Any]) -> object:
    """What the counter stays below: a size, or a whole number; None where the condition is another."""
    formal = [n for n in cond.graph.nodes if n.op == "placeholder"]
    (result,) = cond.graph.output_node().args
    if not isinstance(result, Node) or result.target not in (aten.lt.Scalar, aten.lt.Tensor) or result.args[0] is not formal[number]:
        return None
    limit: Any = result.args[1]
    if limit in formal:  # a size that was taken outside
        limit = operands[formal.index(limit)]
        return str(limit.meta["val"]) if isinstance(limit, Node) and isinstance(limit.meta.get("val"), torch.SymInt | int) else None
    if isinstance(limit, Node) and limit.target is aten.sym_size.int and limit.args[0] in formal:
        return _size(operands[formal.index(limit.args[0])], limit.args[1])  # type: ignore[arg-type]
    return str(limit) if isinstance(limit, int) else None


def _size(value: Node, axis: int) -> str:
    return str(value.meta["val"].shape[axis])
