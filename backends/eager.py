"""Torch eager: each word one or two tensor operations; the oracle that every other interpretation must match.

A recurrence is a Python loop, a choice by length a plain `if`; where the length is a symbol (under torch.export) they are torch's `scan`
and `cond`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewriter.ops import Choice, Step
from rewriter.packing import nibbles, scaled, unpack

R = TypeVar("R")


class EagerOps:
    """Plain tensors; differentiable, so a structure trains as it stands."""

    def __init__(self) -> None:
        self._used: dict[int, Tensor] = {}  # stored tensors by id
        self._inside: dict[int, Tensor] = {}  # what stands for them in the body that is traced

    def const(self, tensor: Tensor) -> Tensor:
        self._used[id(tensor)] = tensor
        return self._inside.get(id(tensor), tensor)

    def matmul(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    def block_matmul(self, x: Tensor, w: Tensor) -> Tensor:
        k, q, p = w.shape
        rows = x.reshape(-1, k, q).transpose(0, 1)  # (k, tokens, q)
        return torch.bmm(rows, w).transpose(0, 1).reshape(*x.shape[:-1], k * p)

    def scatter(self, values: Tensor, positions: Tensor, n: int, m: int) -> Tensor:
        rows, columns = values.shape
        places = unpack(positions, rows, m)
        if places.shape[1] < columns:  # a copy is slow, and this runs at every call
            places = places.repeat_interleave(columns // places.shape[1], 1)
        places = places.view(-1, n, columns)
        spread = values.new_zeros(len(places), m, columns).scatter(1, places, values.view(places.shape))
        return spread.flatten(0, 1)

    def nibbles(self, packed: Tensor) -> Tensor:
        return nibbles(packed)

    def scaled(self, values: Tensor, scales: Tensor) -> Tensor:
        return scaled(values, scales)

    def shuffle(self, x: Tensor, k: int) -> Tensor:
        rows: Tensor = x.unflatten(-1, (k, -1))
        return rows.transpose(-1, -2).flatten(-2)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def mul(self, x: Tensor, w: Tensor) -> Tensor:
        return x * w

    def gather(self, x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(-1, index)

    def concat(self, xs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(xs), -1)

    def split(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        return torch.split(x, list(sizes), -1)

    def pad(self, x: Tensor, width: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))

    def by_rows(self, x: Tensor, most: int, few: Callable[[Tensor], Tensor], many: Callable[[Tensor], Tensor]) -> Tensor:
        rows = math.prod(x.shape[:-1])
        if not isinstance(rows, torch.SymInt):
            return (few if rows <= most else many)(x)
        return self._either(rows, most, few, many, [x])

    def literal(self, tensor: Tensor, like: Tensor) -> Tensor:
        return tensor.to(like)

    def unfold(self, x: Tensor, *sizes: int) -> Tensor:
        return x.reshape(*x.shape[:-1], *sizes)

    def fold(self, x: Tensor, axes: int = 2) -> Tensor:
        return x.flatten(-axes)

    def swap(self, x: Tensor, a: int = -1, b: int = -2) -> Tensor:
        return x.transpose(a, b)

    def contract(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def sub(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b

    def exp(self, x: Tensor) -> Tensor:
        return x.exp()

    def log(self, x: Tensor) -> Tensor:
        return x.log()

    def at_least(self, x: Tensor, bound: float) -> Tensor:
        return x.clamp(min=bound)

    def where(self, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition, a, b)

    def triangle(self, like: Tensor) -> Tensor:
        return torch.ones(like.shape[-2], like.shape[-1], dtype=torch.bool, device=like.device).tril()

    def regroup(self, x: Tensor, heads: int) -> Tensor:
        return x.reshape(x.shape[0], heads, x.shape[1] * x.shape[2] // heads, x.shape[3])

    def softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)

    def total(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True)

    def cumulate(self, x: Tensor, axis: int) -> Tensor:
        return x.cumsum(axis)

    def last(self, x: Tensor, axis: int) -> Tensor:
        return x.narrow(axis, x.shape[axis] - 1, 1)

    def unit_lower_inverse(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # LAPACK has no halves
        eye = torch.eye(x.shape[-1], dtype=wide.dtype, device=x.device)
        solved: Tensor = torch.linalg.solve_triangular(eye + wide, eye.expand_as(wide), upper=False, unitriangular=True)
        return solved.to(x.dtype)

    def chunks(self, x: Tensor, size: int, axis: int) -> Tensor:
        count = -(-x.shape[axis] // size)
        if isinstance(count, torch.SymInt):
            count = torch.sym_max(count, 2)  # a size that is 1 in the example becomes a constant
        padded = torch.nn.functional.pad(x, [0, 0] * (x.dim() - axis - 1) + [0, count * size - x.shape[axis]])
        cut: Tensor = padded.unflatten(axis, (count, size))
        return cut

    def joined(self, x: Tensor, like: Tensor, axis: int) -> Tensor:
        return x.flatten(axis, axis + 1).narrow(axis, 0, like.shape[axis])

    def tail(self, x: Tensor, size: int, axis: int) -> Tensor:
        start = (x.shape[axis] - 1) // size * size
        return x.narrow(axis, start, x.shape[axis] - start)

    def at_tail(self, x: Tensor, like: Tensor, size: int) -> Tensor:
        return x.select(1, (like.shape[1] - 1) // size)

    def steady(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype).expand(*like.shape[:2], -1)

    def zeros(self, like: Tensor, *sizes: int) -> Tensor:
        return like.new_zeros(like.shape[0], *sizes)

    def attend(self, attention: Any, *inputs: Tensor) -> Tensor:
        found: Tensor = attention.apply(self, *inputs)[0]
        return found

    def by_length(self, x: Tensor, axis: int, most: int, few: Choice[Tensor], many: Choice[Tensor], given: Sequence[Tensor]) -> Tensor:
        size = x.shape[axis]
        if not isinstance(size, torch.SymInt):
            return (few if size <= most else many)(*given)
        return self._either(size, most, few, many, given)

    def recurrence(self, step: Step[Tensor], states: Sequence[Tensor], xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if isinstance(xs[0].shape[1], torch.SymInt):
            return self._scan(step, states, xs)
        rows: list[Sequence[Tensor]] = []
        for t in range(xs[0].shape[1]):
            states, ys = step(states, [x[:, t] for x in xs])
            rows.append(ys)
        return list(states), [torch.stack(column, 1) for column in zip(*rows, strict=True)]

    def _scan(self, step: Step[Tensor], states: Sequence[Tensor], xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        from torch._higher_order_ops.scan import scan_op  # a prototype of torch's, needed only where a length is a symbol

        stored, count = self._stored(lambda: step(states, [x[:, 0] for x in xs])), len(states)

        def body(*given: Tensor) -> list[Tensor]:
            new, ys = self._within(stored, given[count + len(xs) :], lambda: step(given[:count], given[count : count + len(xs)]))
            # scan forbids outputs that alias, and states whose strides change
            return [v.clone(memory_format=torch.contiguous_format) for v in (*new, *ys)]

        found = scan_op(body, [s.contiguous() for s in states], [x.movedim(1, 0) for x in xs], tuple(stored.values()))
        return list(found[:count]), [y.movedim(0, 1) for y in found[count:]]

    def _either(self, size: torch.SymInt, most: int, few: Choice[Tensor], many: Choice[Tensor], given: Sequence[Tensor]) -> Tensor:
        """One of two ways, the choice left to each call."""
        from torch._higher_order_ops.cond import cond_op  # torch.cond compiles what it runs; here it is traced already

        stored, count = self._stored(lambda: (few(*given), many(*given))), len(given)

        def branch(form: Choice[Tensor]) -> Callable[..., tuple[Tensor]]:
            def body(*operands: Tensor) -> tuple[Tensor]:
                made = self._within(stored, operands[count:], lambda: form(*operands[:count]))
                return (made.clone(memory_format=torch.contiguous_format),)

            return body

        # as a tensor: torch.export takes every symbol for at least 2, and would decide here and now that there are more
        short = torch.scalar_tensor(size, dtype=torch.int64) <= most  # type: ignore[arg-type]  # it takes symbols too
        y: Tensor
        (y,) = cond_op(short, branch(few), branch(many), (*[x.contiguous() for x in given], *stored.values()))
        return y

    def _stored(self, made: Callable[[], object]) -> dict[int, Tensor]:
        """The stored tensors that something is made with, by id."""
        self._used.clear()
        made()
        return dict(self._used)

    def _within(self, stored: Mapping[int, Tensor], given: Sequence[Tensor], made: Callable[[], R]) -> R:
        """What is made in a body that is traced, where the given tensors stand for the stored ones."""
        self._inside = dict(zip(stored, given, strict=True))
        try:
            return made()
        finally:
            self._inside = {}
