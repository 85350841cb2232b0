"""Softmax attention, o = softmax(scale Q K^T + mask) V, per head; heads of K and V may be shared by groups of queries.

Groups need no copies of K and V: the queries of one group lie above one another, as more rows of one product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from rewriter.operator import AbstractMap, Dims
from rewriter.ops import AnySequenceOps


@dataclass(frozen=True)
class Attention(AbstractMap):
    """query (batch, heads, time, key), key (batch, shared, keys, key), value (batch, shared, keys, width), mask and bias as they say ->
    output (batch, heads, time, width).

    A boolean mask is true where a key is seen, the others score `hidden`; else the mask is added to the scores. A bias is added last.
    `empty`: what a row becomes all of whose scores are -inf: "" where there can be none, "nan" as the softmax gives it, "zero".
    """

    heads: int
    shared: int  # heads of key and value; divides heads
    key: int
    width: int
    scale: float
    causal: bool = False  # query i sees keys up to i, counted from the first of both
    mask: Dims = ()  # the mask's four axes, 1 where it is broadcast; () without one
    boolean: bool = False
    hidden: float = -math.inf
    bias: Dims = ()  # as mask
    empty: str = ""

    def inputs(self) -> Mapping[str, Dims]:
        added = {"mask": self.mask, "bias": self.bias}
        return {
            "query": ("batch", self.heads, "time", self.key),
            "key": ("batch", self.shared, "keys", self.key),
            "value": ("batch", self.shared, "keys", self.width),
            **{name: dims for name, dims in added.items() if dims},
        }

    def booleans(self) -> tuple[str, ...]:
        return ("mask",) if self.boolean else ()

    def outputs(self) -> Mapping[str, Dims]:
        return {"output": ("batch", self.heads, "time", self.width)}

    def forms(self) -> tuple[str, ...]:
        return ("naive",)

    def spelled(self, form: str, ops: AnySequenceOps, *inputs: Any) -> tuple[Any, ...]:
        query, key, value, *masks = inputs
        return (self.weighed(ops, ops.contract(self.stacked(ops, query), ops.swap(key)), value, masks),)

    def weighed(self, ops: AnySequenceOps, scores: Any, value: Any, masks: Sequence[Any]) -> Any:
        """From stacked Q K^T (batch, shared, queries of a group, keys) and value (batch, shared, keys, n) on: (batch, heads, time, n)."""
        if self.scale != 1:
            scores = ops.mul(scores, self._number(ops, self.scale, scores))
        if self.causal or self.mask:
            given = dict(zip(list(self.inputs())[3:], masks, strict=True))
            weights = self.stacked(ops, self._weights(ops, self.apart(ops, scores), given))
        else:
            weights = ops.softmax(scores)
        return self.apart(ops, ops.contract(weights, value))

    def _weights(self, ops: AnySequenceOps, scores: Any, given: Mapping[str, Any]) -> Any:
        """(batch, heads, time, keys)."""
        if self.causal:
            scores = ops.where(ops.triangle(scores), scores, self._number(ops, -math.inf, scores))
        if self.boolean:
            scores = ops.where(given["mask"], scores, self._number(ops, self.hidden, scores))
        for name in ("mask", "bias"):
            if name in given and name not in self.booleans():
                scores = ops.add(scores, given[name])
        weights = ops.softmax(scores)
        return ops.where(given["mask"], weights, self._number(ops, 0.0, weights)) if self.empty == "zero" else weights

    def stacked(self, ops: AnySequenceOps, x: Any) -> Any:
        """(batch, heads, time, n) -> (batch, shared, queries of a group, n)."""
        return x if self.heads == self.shared else ops.regroup(x, self.shared)

    def apart(self, ops: AnySequenceOps, x: Any) -> Any:
        """The inverse of `stacked`."""
        return x if self.heads == self.shared else ops.regroup(x, self.heads)

    @staticmethod
    def _number(ops: AnySequenceOps, number: float, like: Any) -> Any:
        return ops.literal(torch.full((1,), number, dtype=torch.float64), like)

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(heads=4, shared=2, key=5, width=3, scale=0.5)
