"""Some values of a program from others: node by node on real tensors, all floats in the float type of what is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from rewriter.backends.files.archive import one_line
from rewriter.errors import RewriteError


def compute(wanted: Sequence[Node], given: Mapping[Node, Tensor], const: Callable[[Node], Tensor | None]) -> list[Tensor]:
    """See rewriter.graph.Graph.compute."""
    dtype = next((t.dtype for t in given.values() if isinstance(t, Tensor) and t.is_floating_point()), torch.float32)
    known: dict[Node, Any] = dict(given)
    with torch.no_grad():
        for node in _order(wanted, known):
            known[node] = _value(node, known, dtype, const)
    return [known[node] for node in wanted]


def _order(wanted: Sequence[Node], known: Mapping[Node, Any]) -> list[Node]:
    """What has to be computed, operands first."""
    needed: set[Node] = set()
    stack = [n for n in wanted if n not in known]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(n for n in node.all_input_nodes if n not in known)
    return [n for n in wanted[0].graph.nodes if n in needed] if needed else []


def _value(node: Node, known: Mapping[Node, Any], dtype: torch.dtype, const: Callable[[Node], Tensor | None]) -> Any:
    stored = const(node)
    if stored is not None:
        return _float(stored, dtype)
    if node.op != "call_function":
        raise RewriteError(f"{node.name} is neither given nor stored")

    def real(argument: Any) -> Any:
        """A cast to a float type goes to the float type at hand."""
        return dtype if isinstance(argument, torch.dtype) and argument.is_floating_point else argument

    args, kwargs = map_arg((node.args, node.kwargs), lambda n: known[n])
    try:
        return _float(node.target(*map(real, args), **{k: real(v) for k, v in kwargs.items()}), dtype)  # type: ignore[operator]
    except Exception as problem:
        raise RewriteError(f"{node.name} cannot be computed: {one_line(problem)}") from problem


def _float(result: Any, dtype: torch.dtype) -> Any:
    """What is made from nothing has torch's default type."""
    return result.to(dtype) if isinstance(result, Tensor) and result.is_floating_point() else result
