"""h_t = a_t o h_{t-1} + b_t entry by entry, a and b given token by token: RG-LRU, minGRU, Mamba's selective scan (Gu and Dao 2023).

With a query c_t the result is y_t = H_t c_t, H the state as (rows, width): Mamba reads `width` states for each of its `rows` channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from rewriter.operator import AbstractRecurrence, Dims
from rewriter.ops import AnySequenceOps


@dataclass(frozen=True)
class DiagonalRecurrence(AbstractRecurrence):
    """decay and drive (batch, time, rows*width), query (batch, time, width) -> (batch, time, rows*width), or (batch, time, rows) read."""

    rows: int
    width: int = 1
    read: bool = False  # by a query
    carried: bool = True

    def sequences(self) -> Mapping[str, Dims]:
        n = self.rows * self.width
        query: Mapping[str, Dims] = {"query": ("batch", "time", self.width)} if self.read else {}
        return {"decay": ("batch", "time", n), "drive": ("batch", "time", n), **query}

    def results(self) -> Mapping[str, Dims]:
        return {"output": ("batch", "time", self.rows if self.read else self.rows * self.width)}

    def states(self) -> Mapping[str, Dims]:
        return {"state": ("batch", self.rows * self.width)}

    def step(self, ops: AnySequenceOps, states: Sequence[Any], xs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        (h,), (a, b, *query) = states, xs
        h = ops.add(ops.mul(h, a), b)
        if not query:
            return [h], [h]
        return [h], [ops.fold(ops.contract(ops.unfold(h, self.rows, self.width), ops.unfold(query[0], self.width, 1)))]

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(3, 5, read=True)
