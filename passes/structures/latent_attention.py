"""Attention whose keys and values are products of a latent (DeepSeek-V2, arXiv:2405.04434, section 2.1): K_h = [c U_h^T, r], V_h = c W_h.

A cache holds the latent c and the rotated part r, which all heads share. Expanded: K and V first, then attention; what a call of many
queries wants. Absorbed, for a call of few: q_h K_h^T = (q_h U_h) c^T + q'_h r^T and P V_h = (P c) W_h, so nothing that is as long as the
cache is computed per head but the scores, and the heads are rows of one product with the latent. A latent may serve a group of heads only
(Palu, arXiv:2407.21118): it then needs fewer numbers for what is computed with it.
"""

from __future__ import annotations

import abc
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


class AbstractLatentAttention(AbstractMap):
    """Two ways to one attention, of which `few` says up to how many queries the absorbed one is taken."""

    attention: Attention
    few: int
    cached: int
    groups: int

    def booleans(self) -> tuple[str, ...]:
        return self.attention.booleans()

    def outputs(self) -> Mapping[str, Dims]:
        return self.attention.outputs()

    def masks(self) -> Mapping[str, Dims]:
        """Those of the attention."""
        return {name: dims for name, dims in self.attention.inputs().items() if name not in ("query", "key", "value")}

    def forms(self) -> tuple[str, ...]:
        return ("expanded", "absorbed", "dispatched")

    def offered(self) -> tuple[str, ...]:
        return ("expanded" if self.few == 0 else "absorbed" if self.few >= ALWAYS else "dispatched",)

    def lengths(self, tokens: int) -> Mapping[str, int]:
        return {"batch": 1, "time": tokens, "keys": self.cached + tokens}

    def spelled(self, form: str, ops: AnySequenceOps, *inputs: Any) -> tuple[Any, ...]:
        spelling = {"expanded": self.expanded, "absorbed": self.absorbed, "dispatched": self._dispatched}[form]
        return (spelling(ops, *inputs),)

    @abc.abstractmethod
    def expanded(self, ops: AnySequenceOps, *inputs: Any) -> Any:
        """The output, from keys and values of all heads."""

    @abc.abstractmethod
    def absorbed(self, ops: AnySequenceOps, *inputs: Any) -> Any:
        """The output, from latents."""

    def _dispatched(self, ops: AnySequenceOps, *inputs: Any) -> Any:
        def few(*given: Any) -> Any:
            return self.absorbed(ops, *given)

        def many(*given: Any) -> Any:
            return self.expanded(ops, *given)

        return ops.by_length(inputs[0], -2, self.few, few, many, inputs)

    def up(self, ops: AnySequenceOps, weight: Any, latent: Any) -> Any:
        """(batch, groups, keys, rank) times (shared, rank, n): (batch, shared, keys, n)."""
        if self.groups == 1:
            return ops.contract(latent, weight)
        stacked = ops.unfold(ops.swap(weight), 1, -1)  # (shared, n, 1, rank)
        stacked = ops.regroup(ops.swap(ops.swap(stacked, -2, -3), -3, -4), self.groups)  # (1, groups, heads of a group times n, rank)
        return ops.swap(ops.regroup(ops.contract(stacked, ops.swap(latent)), self.attention.shared))

    @property
    def rows(self) -> Attention:
        """The heads of a group are rows of one product."""
        return replace(self.attention, shared=self.groups)

    def weighed(self, ops: AnySequenceOps, scores: Any, memory: Any, weight: Any, masks: Sequence[Any]) -> Any:
        """From scores of `rows` on: the output, memory being mixed before it is multiplied by (shared, rank, width)."""
        heads, mixed = self.attention, self.rows.weighed(ops, scores, memory, masks)  # (batch, heads, time, rank)
        return heads.apart(ops, ops.contract(heads.stacked(ops, mixed), weight))


@dataclass(frozen=True)
class LatentAttention(AbstractLatentAttention):
    """query (batch, heads, time, nope + rope), latent (batch, groups, keys, rank), rotated (batch, 1, keys, rope) where there is one,
    memory (batch, groups, keys, rank') where the values have latents of their own, masks as the attention says -> output (batch, heads,
    time, width). Each latent serves shared / groups neighbouring heads of keys and values.

    Law: absorbed equals expanded, which is the attention of expanded keys and values.
    """

    attention: Attention  # of the expanded keys and values; without a rotated part its key is nope
    key_up: Tensor  # (shared, nope, rank): U
    value_up: Tensor  # (shared, rank', width): W
    few: int  # queries up to which the absorbed form is used
    joint: bool = True  # keys and values are of one latent
    cached: int = CACHED  # keys before a call's own that its forms are timed and counted with
    groups: int = 1  # divides the attention's shared

    @property
    def rope(self) -> int:
        """The width of the rotated part."""
        return self.attention.key - self.key_up.shape[1]

    def inputs(self) -> Mapping[str, Dims]:
        query = self.attention.inputs()["query"]
        rotated: dict[str, Dims] = {"rotated": ("batch", 1, "keys", self.rope)} if self.rope else {}
        memory: dict[str, Dims] = {} if self.joint else {"memory": ("batch", self.groups, "keys", self.value_up.shape[1])}
        return {"query": query, "latent": ("batch", self.groups, "keys", self.key_up.shape[2]), **rotated, **memory, **self.masks()}

    def expanded(self, ops: AnySequenceOps, *inputs: Any) -> Any:
        query, latent, rotated, memory, masks = self._named(inputs)
        key = self.up(ops, ops.swap(ops.const(self.key_up)), latent)
        if rotated is not None:  # for every head
            key = ops.concat([key, ops.add(rotated, ops.literal(torch.zeros(self.attention.shared, 1, self.rope), rotated))])
        return ops.attend(self.attention, query, key, self.up(ops, ops.const(self.value_up), memory), *masks)

    def absorbed(self, ops: AnySequenceOps, *inputs: Any) -> Any:
        query, latent, rotated, memory, masks = self._named(inputs)
        heads, rows = self.attention, self.rows
        nope, *turned = ops.split(query, [self.key_up.shape[1], self.rope]) if self.rope else [query]
        low = heads.apart(ops, ops.contract(heads.stacked(ops, nope), ops.const(self.key_up)))  # (batch, heads, time, rank)
        scores = ops.contract(rows.stacked(ops, low), ops.swap(latent))
        for part in turned:
            scores = ops.add(scores, ops.contract(rows.stacked(ops, part), ops.swap(rotated)))
        return self.weighed(ops, scores, memory, ops.const(self.value_up), masks)

    def _named(self, inputs: Sequence[Any]) -> tuple[Any, Any, Any, Any, Sequence[Any]]:
        given = dict(zip(self.inputs(), inputs, strict=True))
        query, latent, rotated = given.pop("query"), given.pop("latent"), given.pop("rotated", None)
        return query, latent, rotated, given.pop("memory", latent), list(given.values())

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        attention = Attention(heads=4, shared=2, key=5, width=3, scale=0.5)
        key_up, value_up = torch.randn(2, 3, 6, generator=rng), torch.randn(2, 6, 3, generator=rng)
        return cls(attention, key_up, value_up, few=1)
