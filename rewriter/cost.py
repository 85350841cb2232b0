"""Costs by interpreting the vocabulary on widths alone: stored numbers, bytes, operations executed (2 per multiply-add)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """What a site costs: params = stored numbers, flops = 2 per multiply-add, nbytes = weights and indices as stored.

    A weight of which few entries are stored is multiplied as a dense one."""

    params: int = 0
    flops: int = 0
    nbytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.flops + other.flops, self.nbytes + other.nbytes)

    def of(self, unit: str) -> int:
        """The figure in one unit: params, flops or nbytes."""
        return {"params": self.params, "flops": self.flops, "nbytes": self.nbytes}[unit]


class Width(NamedTuple):
    """All that the count knows of a value: its features, or a constant's shape."""

    shape: tuple[int, ...]

    @property
    def features(self) -> int:
        return self.shape[-1]


class CostOps:
    """Counts while the operator is spelled; sizes that do not fit together are an assertion here, before any target sees them."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.params = self.flops = self.nbytes = 0

    def const(self, tensor: Tensor) -> Width:
        self.nbytes += tensor.numel() * tensor.element_size()
        if tensor.is_floating_point() or tensor.dtype == torch.int8:
            self.params += tensor.numel()
        return Width(tuple(tensor.shape))

    def matmul(self, x: Width, w: Width) -> Width:
        n, m = w.shape
        assert x.features == n, f"matmul of {x.features} features with {w.shape}"
        self.flops += 2 * self.tokens * n * m
        return Width((m,))

    def block_matmul(self, x: Width, w: Width) -> Width:
        k, q, p = w.shape
        assert x.features == k * q, f"block_matmul of {x.features} features with {w.shape}"
        self.flops += 2 * self.tokens * k * q * p
        return Width((k * p,))

    def scatter(self, values: Width, positions: Width, n: int, m: int) -> Width:
        rows, columns = values.shape
        assert rows % n == 0 and columns % positions.features == 0, f"scatter of {values.shape} by {n}:{m} at {positions.shape}"
        return Width((rows // n * m, columns))

    def nibbles(self, packed: Width) -> Width:
        *blocks, rows, columns = packed.shape
        self.params += 2 * math.prod(packed.shape)
        return Width((*blocks, 2 * rows, columns))

    def scaled(self, values: Width, scales: Width) -> Width:
        *blocks, rows, p = values.shape
        *others, groups, columns = scales.shape
        assert (others, columns) == (blocks, p) and rows % groups == 0, f"scaled {values.shape} by {scales.shape}"
        return Width(values.shape)

    def shuffle(self, x: Width, k: int) -> Width:
        assert x.features % k == 0, f"shuffle of {x.features} features by {k}"
        return x

    def add(self, a: Width, b: Width) -> Width:
        assert a.features == b.features, f"add of {a.features} and {b.features} features"
        self.flops += self.tokens * a.features
        return a

    def mul(self, x: Width, w: Width) -> Width:
        assert (x.features,) == w.shape, f"mul of {x.features} features with {w.shape}"
        self.flops += self.tokens * x.features
        return x

    def gather(self, x: Width, index: Width) -> Width:
        return Width(index.shape)

    def concat(self, xs: Sequence[Width]) -> Width:
        return Width((sum(x.features for x in xs),))

    def split(self, x: Width, sizes: Sequence[int]) -> list[Width]:
        assert x.features == sum(sizes), f"split of {x.features} features into {list(sizes)}"
        return [Width((size,)) for size in sizes]

    def pad(self, x: Width, width: int) -> Width:
        assert width >= x.features, f"pad of {x.features} features to {width}"
        return Width((width,))

    def by_rows(self, x: Width, most: int, few: Callable[[Width], Width], many: Callable[[Width], Width]) -> Width:
        """Both are stored, one is executed."""
        flops, runs, other = self.flops, *((few, many) if self.tokens <= most else (many, few))
        skipped = other(x)
        self.flops = flops
        made = runs(x)
        assert made == skipped, f"by_rows of {made.features} and {skipped.features} features"
        return made


def count(product: Callable[[Any, Any], Any], features: int, tokens: int) -> Cost:
    """The cost of a product on `tokens` rows of `features` numbers."""
    ops = CostOps(tokens)
    product(ops, Width((features,)))
    return Cost(ops.params, ops.flops, ops.nbytes)


def dense_cost(shape: tuple[int, int], itemsize: int, tokens: int = 1, places: int = 1) -> Cost:
    """What a dense (m, n) weight costs where it stands: stored once, multiplied at each of its places."""
    m, n = shape
    return Cost(m * n, 2 * tokens * m * n * places, m * n * itemsize)
