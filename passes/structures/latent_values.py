"""Attention whose values alone are products of a latent, V_h = c_g W_h, beside keys that are what they are: rotated by position, say.

Expanded: V first, then attention. Absorbed, for a call of few queries: (P c_g) W_h, the heads of a group as rows of one product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from rewriter.operator import Dims
from rewriter.ops import AnySequenceOps
from rewriter.passes.structures.attention import Attention
from rewriter.passes.structures.latent_attention import CACHED, AbstractLatentAttention


@dataclass(frozen=True)
class LatentValues(AbstractLatentAttention):
    """query (batch, heads, time, key), key (batch, shared, keys, key), memory (batch, groups, keys, rank), masks as the attention says ->
    output (batch, heads, time, width). Each latent serves shared / groups neighbouring heads of values.

    Law: absorbed equals expanded, which is the attention of expanded values.
    """

    attention: Attention
    value_up: Tensor  # (shared, rank, width): W
    few: int  # queries up to which the absorbed form is used
    cached: int = CACHED  # keys before a call's own that its forms are timed and counted with
    groups: int = 1  # divides the attention's shared

    def inputs(self) -> Mapping[str, Dims]:
        given = self.attention.inputs()
        memory: Dims = ("batch", self.groups, "keys", self.value_up.shape[1])
        return {"query": given["query"], "key": given["key"], "memory": memory, **self.masks()}

    def expanded(self, ops: AnySequenceOps, *inputs: Any) -> Any:
        query, key, memory, *masks = inputs
        return ops.attend(self.attention, query, key, self.up(ops, ops.const(self.value_up), memory), *masks)

    def absorbed(self, ops: AnySequenceOps, *inputs: Any) -> Any:
        query, key, memory, *masks = inputs
        heads, rows = self.attention, self.rows
        scores = ops.contract(heads.stacked(ops, query), ops.swap(key))
        if heads.shared != rows.shared:
            scores = rows.stacked(ops, heads.apart(ops, scores))
        return self.weighed(ops, scores, memory, ops.const(self.value_up), masks)

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        attention = Attention(heads=8, shared=4, key=5, width=3, scale=0.5)
        return cls(attention, torch.randn(4, 6, 3, generator=rng), few=1, groups=2)
