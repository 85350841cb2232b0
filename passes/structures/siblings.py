"""Linears that read one value, as one map: y_i = W_i x + b_i, what they have in common done once.

dense: [W_1; W_2; ..] x, cut into the y_i;    thin: [D_1; D_2; ..] x, cut, each part times its U_i
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from rewriter.algebra import Dense
from rewriter.operator import AbstractMap, AbstractMatrix, Dims
from rewriter.ops import AnySequenceOps


@dataclass(frozen=True)
class Siblings(AbstractMap):
    """x (batch, time, n) -> output0 (batch, time, m_0), output1 and so on.

    `first`: none, or one matrix whose image is cut into `widths`; `each`: none, or one for each output, of its part of that or of x itself.
    """

    features: int
    first: tuple[AbstractMatrix, ...]
    widths: Dims
    each: tuple[AbstractMatrix, ...]
    biases: tuple[Tensor, ...]  # none, or (m_i,) for each output

    def inputs(self) -> Mapping[str, Dims]:
        return {"x": ("batch", "time", self.features)}

    def outputs(self) -> Mapping[str, Dims]:
        widths = [matrix.shape[0] for matrix in self.each] or self.widths
        return {f"output{i}": ("batch", "time", width) for i, width in enumerate(widths)}

    def forms(self) -> tuple[str, ...]:
        return ("together",)

    def spelled(self, form: str, ops: AnySequenceOps, *inputs: Any) -> tuple[Any, ...]:
        (x,) = inputs
        count = len(self.outputs())
        parts = ops.split(self.first[0].product(ops, x), [int(width) for width in self.widths]) if self.first else [x] * count
        found = [matrix.product(ops, part) for matrix, part in zip(self.each, parts, strict=True)] if self.each else list(parts)
        return tuple(ops.add(y, ops.const(bias)) for y, bias in zip(found, self.biases, strict=True)) if self.biases else tuple(found)

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        first = Dense(torch.randn(7, 5, generator=rng))
        each = (Dense(torch.randn(2, 4, generator=rng)), Dense(torch.randn(3, 6, generator=rng)))
        return cls(7, (first,), (2, 3), each, (torch.randn(4, generator=rng), torch.randn(6, generator=rng)))
