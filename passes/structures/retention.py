"""Linear attention or a delta rule whose decay is stored, S_t = e^r S_{t-1} + …: retention (Sun et al. 2023, arXiv:2307.08621, eq. 1).

It is LinearAttention with the same log decay r at every token: per head, or per entry of the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from rewriter.operator import Dims
from rewriter.ops import AnySequenceOps
from rewriter.passes.structures.linear_attention import LinearAttention

NONE = torch.zeros(0)


@dataclass(frozen=True)
class Retention(LinearAttention):
    """Inputs and results of LinearAttention, less `decay`."""

    rates: Tensor = NONE  # (heads,) or (heads*key,), logarithms

    def moving(self) -> LinearAttention:
        """The same with the decay as a sequence."""
        return LinearAttention(**{f.name: getattr(self, f.name) for f in fields(LinearAttention)})

    def sequences(self) -> Mapping[str, Dims]:
        return {name: dims for name, dims in super().sequences().items() if name != "decay"}

    def with_decay(self, inputs: Sequence[Any], decay: Any) -> list[Any]:
        """The inputs of `moving`, in its order."""
        given = dict(zip(self.inputs(), inputs, strict=False)) | {"decay": decay}
        return [given[name] for name in self.moving().inputs() if name in given]

    def step(self, ops: AnySequenceOps, states: Sequence[Any], xs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        return self.moving().step(ops, states, self.with_decay(xs, ops.const(self.rates)))

    def spelled(self, form: str, ops: AnySequenceOps, *inputs: Any) -> tuple[Any, ...]:
        decay = ops.steady(ops.const(self.rates), inputs[0])
        return self.moving().spelled(form, ops, *self.with_decay(inputs, decay))

    @classmethod
    def of(cls, form: LinearAttention, rates: Tensor) -> Self:
        """`form`, which takes its decay as a sequence, at these rates."""
        return cls(**{f.name: getattr(form, f.name) for f in fields(LinearAttention)}, rates=rates)

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        form = replace(LinearAttention.random(rng), rule="plain", factors=1)
        return cls.of(form, -torch.rand(form.heads, generator=rng))
