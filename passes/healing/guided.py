"""Self-guided training: y = a W x + (1 - a) W' x, a from 1 to 0, W the ORIGINAL dense weight, so that the factors learn beside it.

Source: self-guided training of Wei, Moalla, Pascanu and Gulcehre (StructuredFFN, 2024), which starts from W = U V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from rewriter.algebra import Dense
from rewriter.operator import AbstractMatrix
from rewriter.ops import AnyOps


@dataclass(frozen=True)
class Guided(AbstractMatrix):
    """Both weights side by side. It lives while a model trains and is never emitted; `mix` changes its shares in place."""

    student: AbstractMatrix
    original: Dense
    teaching: Tensor  # (m,) a
    learning: Tensor  # (m,) 1 - a

    @classmethod
    def of(cls, student: AbstractMatrix, weight: Tensor) -> Guided:
        """All of the dense (m, n) weight, to begin with."""
        return cls(student, Dense(weight.T.contiguous()), torch.ones(len(weight)), torch.zeros(len(weight)))

    def mix(self, share: float) -> None:
        """`share` of the dense weight from here on."""
        self.teaching.fill_(share)
        self.learning.fill_(1 - share)

    @property
    def shape(self) -> tuple[int, int]:
        return self.student.shape

    def product(self, ops: AnyOps, x: Any) -> Any:
        dense = ops.mul(self.original.product(ops, x), ops.const(self.teaching))
        return ops.add(dense, ops.mul(self.student.product(ops, x), ops.const(self.learning)))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        made = cls(Dense.random(rng), Dense.random(rng), torch.ones(5), torch.zeros(5))
        made.mix(0.25)
        return made
