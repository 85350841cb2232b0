"""Attention whose keys and values are products of a latent (DeepSeek-V2, arXiv:2405.04434, section 2.1): K_h = [c U_h^T, r], V_h = c W_h.

A cache holds the latent c and the rotated part r, which all heads share. Expanded: K and V first, then attention; what a call of many
queries wants. Absorbed, for a call of few: q_h K_h^T = (q_h U_h) c^T + q'_h r^T and P V_h = (P c) W_h, so nothing that is as long as the
cache is computed per head but the scores, and the heads are rows of one product with the latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from rewriter.operator import AbstractMap, Dims
from rewriter.ops import AnySequenceOps
from rewriter.passes.structures.attention import Attention

ALWAYS = 1 << 31  # queries: more than any call has
CACHED = 2048  # keys before a call's own, where nothing else is said


@dataclass(frozen=True)
class LatentAttention(AbstractMap):
    """query (batch, heads, time, nope + rope), latent (batch, 1, keys, rank), rotated (batch, 1, keys, rope) where there is one, memory
    (batch, 1, keys, rank') where the values have a latent of their own, masks as the attention says -> output (batch, heads, time, width).

    Law: absorbed equals expanded, which is the attention of expanded keys and values.
    """

    attention: Attention  # of the expanded keys and values; without a rotated part its key is nope
    key_up: Tensor  # (shared, nope, rank): U
    value_up: Tensor  # (shared, rank', width): W
    few: int  # queries up to which the absorbed form is used
    joint: bool = True  # keys and values are of one latent
    cached: int = CACHED  # keys before a call's own that its forms are timed and counted with

    @property
    def rope(self) -> int:
        """The width of the rotated part."""
        return self.attention.key - self.key_up.shape[1]

    def inputs(self) -> Mapping[str, Dims]:
        of_attention = dict(self.attention.inputs())
        query = of_attention.pop("query")
        masks = {name: dims for name, dims in of_attention.items() if name not in ("key", "value")}
        rotated: dict[str, Dims] = {"rotated": ("batch", 1, "keys", self.rope)} if self.rope else {}
        memory: dict[str, Dims] = {} if self.joint else {"memory": ("batch", 1, "keys", self.value_up.shape[1])}
        return {"query": query, "latent": ("batch", 1, "keys", self.key_up.shape[2]), **rotated, **memory, **masks}

    def booleans(self) -> tuple[str, ...]:
        return self.attention.booleans()

    def outputs(self) -> Mapping[str, Dims]:
        return self.attention.outputs()

    def forms(self) -> tuple[str, ...]:
        return ("expanded", "absorbed", "dispatched")

    def offered(self) -> tuple[str, ...]:
        return ("expanded" if self.few == 0 else "absorbed" if self.few >= ALWAYS else "dispatched",)

    def lengths(self, tokens: int) -> Mapping[str, int]:
        return {"batch": 1, "time": tokens, "keys": self.cached + tokens}

    def spelled(self, form: str, ops: AnySequenceOps, *inputs: Any) -> tuple[Any, ...]:
        spelling = {"expanded": self._expanded, "absorbed": self._absorbed, "dispatched": self._dispatched}[form]
        return (spelling(ops, *inputs),)

    def _dispatched(self, ops: AnySequenceOps, *inputs: Any) -> Any:
        def few(*given: Any) -> Any:
            return self._absorbed(ops, *given)

        def many(*given: Any) -> Any:
            return self._expanded(ops, *given)

        return ops.by_length(inputs[0], -2, self.few, few, many, inputs)

    def _expanded(self, ops: AnySequenceOps, *inputs: Any) -> Any:
        query, latent, rotated, memory, masks = self._named(inputs)
        key = ops.contract(latent, ops.swap(ops.const(self.key_up)))
        if rotated is not None:  # for every head
            key = ops.concat([key, ops.add(rotated, ops.literal(torch.zeros(self.attention.shared, 1, self.rope), rotated))])
        return ops.attend(self.attention, query, key, ops.contract(memory, ops.const(self.value_up)), *masks)

    def _absorbed(self, ops: AnySequenceOps, *inputs: Any) -> Any:
        query, latent, rotated, memory, masks = self._named(inputs)
        groups, rows = self.attention, replace(self.attention, shared=1)
        nope, *turned = ops.split(query, [self.key_up.shape[1], self.rope]) if self.rope else [query]
        low = groups.apart(ops, ops.contract(groups.stacked(ops, nope), ops.const(self.key_up)))  # (batch, heads, time, rank)
        scores = ops.contract(rows.stacked(ops, low), ops.swap(latent))
        for part in turned:
            scores = ops.add(scores, ops.contract(rows.stacked(ops, part), ops.swap(rotated)))
        mixed = rows.weighed(ops, scores, memory, masks)  # (batch, heads, time, rank')
        return groups.apart(ops, ops.contract(groups.stacked(ops, mixed), ops.const(self.value_up)))

    def _named(self, inputs: Sequence[Any]) -> tuple[Any, Any, Any, Any, Sequence[Any]]:
        given = dict(zip(self.inputs(), inputs, strict=True))
        query, latent, rotated = given.pop("query"), given.pop("latent"), given.pop("rotated", None)
        return query, latent, rotated, given.pop("memory", latent), list(given.values())

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        attention = Attention(heads=4, shared=2, key=5, width=3, scale=0.5)
        key_up, value_up = torch.randn(2, 3, 6, generator=rng), torch.randn(2, 6, 3, generator=rng)
        return cls(attention, key_up, value_up, few=1)
