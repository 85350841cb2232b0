"""W = U V with thin factors: y = (x @ down) @ up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from rewriter.operator import AbstractMatrix
from rewriter.ops import AnyOps


@dataclass(frozen=True)
class LowRank(AbstractMatrix):
    """Rank r, r (m + n) numbers."""

    down: Tensor  # (n, r)
    up: Tensor  # (r, m)

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[1], self.down.shape[0]

    def product(self, ops: AnyOps, x: Any) -> Any:
        return ops.matmul(ops.matmul(x, ops.const(self.down)), ops.const(self.up))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(torch.randn(7, 2, generator=rng), torch.randn(2, 5, generator=rng))
