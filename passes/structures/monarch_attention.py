"""MonarchAttention (Yaras et al. 2025, arXiv:2505.18698), o = P V with P[(l,j),(k,i)] = L[j,k,l] R[k,j,i], sum_i R = sum_k L = 1.

Tokens lie in m blocks of b: query (l, j), key (k, i). P maximises <P, S> + H(P), S = scale Q K^T + mask, in R and in L by turns, each in
closed form; from L = identity,
    R[k,j,:] = softmax_i(K_ki . a_kj + mask_ki),              a_kj = sum_l u_lj L[j,k,l] Q_lj / sum_l u_lj L[j,k,l],
    L[j,:,l] = softmax_k(Q_lj . sum_i R K_ki + sum_i R (mask_ki - log R)),
so that softmax(S) V costs N (b + m) d instead of N^2 d. With b = 1 or b >= N it is exact. u is 1 at tokens that the mask shows, else 0:
the others neither give nor get a say, and what comes out at their own places is no attention of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from rewriter.operator import AbstractMap, Dims
from rewriter.ops import AnySequenceOps

DEPTH = 256.0  # e^(mask / DEPTH) is a token's weight u, DEPTH log(u + LEAST) its mask again, finite where that was -inf
LEAST = 6e-8  # above 0 in float16, and lost beside 1 in float32


@dataclass(frozen=True)
class MonarchAttention(AbstractMap):
    """query (batch, heads, time, key), key (batch, shared, time, key), value (batch, shared, time, width), mask as `mask` says ->
    output (batch, heads, time, width).

    Laws: the rows of P sum to 1; hidden keys get nothing; tokens that the mask hides change nothing, as if they were not there.
    """

    heads: int
    shared: int  # heads of key and value; divides heads
    key: int
    width: int
    scale: float
    block: int  # b
    iterations: int = 2
    mask: Dims = ()  # the mask's four axes, () without one; it has to be the same for every query
    boolean: bool = False  # true where a key is seen; else the mask is added to the scores

    def inputs(self) -> Mapping[str, Dims]:
        masks = {"mask": self.mask} if self.mask else {}
        return {
            "query": ("batch", self.heads, "time", self.key),
            "key": ("batch", self.shared, "time", self.key),
            "value": ("batch", self.shared, "time", self.width),
            **masks,
        }

    def booleans(self) -> tuple[str, ...]:
        return ("mask",) if self.boolean else ()

    def outputs(self) -> Mapping[str, Dims]:
        return {"output": ("batch", self.heads, "time", self.width)}

    def forms(self) -> tuple[str, ...]:
        return ("blocks",)

    def spelled(self, form: str, ops: AnySequenceOps, *inputs: Any) -> tuple[Any, ...]:
        query, key, value, *mask = inputs
        key, value = self._spread(ops, key), self._spread(ops, value)
        seen = ops.chunks(self._seen(ops, key, *mask), self.block, 2)  # u: (.., k, i, 1), 0 behind the last token
        hidden = ops.swap(self._times(ops, ops.log(self._plus(ops, seen, LEAST)), DEPTH))  # (.., k, 1, i)
        q = ops.swap(ops.chunks(self._times(ops, query, self.scale), self.block, 2), -3, -2)  # (.., j, l, key)
        k, v = ops.chunks(key, self.block, 2), ops.chunks(value, self.block, 2)
        left, right = self._solved(ops, q, k, seen, hidden)
        out = ops.contract(left, ops.swap(ops.contract(right, v), -3, -2))  # (.., j, l, width)
        return (ops.joined(ops.swap(out, -3, -2), query, 2),)

    def _solved(self, ops: AnySequenceOps, q: Any, k: Any, seen: Any, hidden: Any) -> tuple[Any, Any]:
        """L (.., j, l, k) and R (.., k, j, i)."""
        weight, across = ops.swap(seen, -3, -2), ops.swap(k)
        weighted = ops.mul(q, weight) if self.mask else q  # what lies behind the last token is 0 already
        mean = ops.swap(weighted, -3, -2)
        if self.mask:
            mean = self._mean(ops, mean, seen)
        for step in range(self.iterations):
            right = ops.softmax(ops.add(ops.contract(mean, across), hidden))
            gain = ops.total(ops.mul(right, ops.sub(hidden, ops.log(self._plus(ops, right, LEAST)))))  # (.., k, j, 1)
            pulled = ops.swap(ops.swap(ops.contract(right, k), -3, -2))  # (.., j, key, k)
            left = ops.softmax(ops.add(ops.contract(q, pulled), ops.swap(ops.swap(gain, -3, -2))))
            if step + 1 < self.iterations:
                back = ops.swap(left)
                mean = ops.swap(self._mean(ops, ops.contract(back, weighted), ops.contract(back, weight)), -3, -2)
        return left, right

    def _mean(self, ops: AnySequenceOps, total: Any, mass: Any) -> Any:
        """total / mass, 0 where both are; in two halves, since 1 / LEAST is infinite in float16."""
        half = ops.exp(self._times(ops, ops.log(self._plus(ops, mass, LEAST)), -0.5))
        return ops.mul(ops.mul(total, half), half)

    def _seen(self, ops: AnySequenceOps, key: Any, mask: Any | None = None) -> Any:
        """u, (.., time, 1)."""
        if mask is None:
            return ops.exp(self._times(ops, ops.last(key, -1), 0.0))  # ones, as many as there are tokens
        row = ops.swap(mask if self.mask[2] == 1 else ops.last(mask, -2))
        if self.boolean:
            return ops.where(row, ops.literal(torch.ones(1), key), ops.literal(torch.zeros(1), key))
        return ops.exp(self._times(ops, row, 1 / DEPTH))

    def _spread(self, ops: AnySequenceOps, x: Any) -> Any:
        """(batch, shared, time, n) -> (batch, heads, time, n)."""
        if self.shared == self.heads:
            return x
        ones = ops.literal(torch.ones(1, self.heads // self.shared), x)
        return ops.swap(ops.fold(ops.mul(ops.unfold(ops.swap(x, 1, -1), self.shared, 1), ones)), 1, -1)

    @staticmethod
    def _times(ops: AnySequenceOps, x: Any, factor: float) -> Any:
        return ops.mul(x, ops.literal(torch.full((1,), factor, dtype=torch.float64), x))

    @staticmethod
    def _plus(ops: AnySequenceOps, x: Any, term: float) -> Any:
        return ops.add(x, ops.literal(torch.full((1,), term, dtype=torch.float64), x))

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(heads=4, shared=2, key=5, width=3, scale=0.5, block=3)
