"""The cost of a map: its form is run on tensors without numbers, and every word counts what it would execute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.backends.eager import EagerOps
from rewriter.cost import Cost
from rewriter.operator import AbstractMap, AbstractRecurrence, flatten, tensors, unflatten
from rewriter.ops import Step

_FREE = {
    "const", "literal", "steady", "unfold", "fold", "swap", "last", "chunks", "joined", "zeros", "tail", "at_tail", "triangle", "regroup",
    "split", "concat", "pad", "gather", "shuffle", "where", "scatter", "nibbles", "scaled", "by_length",
    "attend",
}  # fmt: skip


class CountingOps(EagerOps):
    """FLOPs, 2 per multiply-add, 1 per number that an elementwise word gives; moving numbers is free."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.times = 1

    def __getattribute__(self, name: str) -> Any:
        word = super().__getattribute__(name)
        if name.startswith("_") or name in _FREE or name == "recurrence" or not callable(word):
            return word

        def counted(*args: Any) -> Any:
            found = word(*args)
            width = {"matmul": args[0].shape[-1], "contract": args[0].shape[-1], "unit_lower_inverse": args[0].shape[-1] // 3 or 1}
            inner = args[1].shape[1] if name == "block_matmul" else width.get(name, 0)
            self.flops += self.times * found.numel() * (2 * inner or 1)
            return found

        return counted

    def recurrence(self, step: Step[Tensor], states: Sequence[Tensor], xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        count = xs[0].shape[1]
        self.times *= count
        states, ys = step(states, [x[:, 0] for x in xs])
        self.times //= count
        return list(states), [y.unsqueeze(1).expand(y.shape[0], count, *y.shape[1:]) for y in ys]


def counted(operator: AbstractMap, tokens: int) -> Cost:
    """For one sequence of `tokens` tokens (and as many keys), of the last form; of a recurrence step by step: chunks round tokens up."""
    leaves, spec = flatten(operator)
    bare: Any = unflatten(spec, [leaf.to("meta", torch.float32 if leaf.is_floating_point() else leaf.dtype) for leaf in leaves])
    ops = CountingOps()
    sizes = operator.lengths(tokens)
    shapes = {x: [n if isinstance(n, int) else sizes[n] for n in dims] for x, dims in operator.inputs().items()}
    types = {x: torch.bool for x in operator.booleans()}
    form = bare.forms()[0] if isinstance(bare, AbstractRecurrence) else bare.offered()[-1]
    bare.spelled(form, ops, *[torch.empty(shape, dtype=types.get(x, torch.float32), device="meta") for x, shape in shapes.items()])
    stored = tensors(operator)
    return Cost(sum(t.numel() for t in stored), ops.flops, sum(t.nbytes for t in stored))
