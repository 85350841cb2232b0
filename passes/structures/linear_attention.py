"""Linear attention and the delta rule, S_t = e^{g_t} S_{t-1}, then for each of n_h factors S += k (beta (v - S^T k))^T; o = scale S^T q.

With rule "delta" the transition is e^g prod_j (I - beta_j k_j k_j^T), a product of generalised Householder factors: DeltaNet at one
factor, DeltaProduct at more (Siems et al. 2025, arXiv:2502.10297); with rule "plain" v is added as it is: linear attention, RetNet, GLA,
Mamba-2 (k = B, q = C, v = dt x, g = dt A). Decay is in log space, per head or per entry of the key.

The chunked form is the WY one (Yang et al. 2024, arXiv:2406.06484): within a chunk, G the running sum of g, D_ij = e^{G_i - G_j}, i >= j,
T = (I + strict_lower((beta K) K^T o D))^{-1}, V' = T (beta V) - T (beta K e^G) S, o = e^G (Q S) + (Q K^T o D) V', and across chunks
S' = e^{G_C} S + K^T (e^{G_C - G} V').
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from rewriter.operator import AbstractRecurrence, Dims
from rewriter.ops import AnySequenceOps

CHUNK = 32  # sub-steps; the inverse costs the cube of it, and the scan across chunks runs the less often
RESET = -1e4  # a logarithm whose exponential is 0; an infinite one would make 0 times infinity of sums


@dataclass(frozen=True)
class LinearAttention(AbstractRecurrence):
    """query (batch, time, queries*key), key (batch, time, factors*keys*key), value (batch, time, factors*heads*width), decay (batch, time,
    heads) or (batch, time, heads*key), beta (batch, time, factors*heads), state (batch, heads, key, width) -> o (batch, time, outs*width).

    `queries` and `keys` divide `heads` (shared by neighbours) or, queries only, are a multiple of it (grouped queries): outs is the larger.
    """

    heads: int  # of states
    key: int  # width of q and k per head
    width: int  # of v per head
    queries: int  # heads of q
    keys: int  # heads of k
    factors: int = 1  # Householder factors of one token, n_h
    rule: str = "delta"  # "delta" | "plain"
    decay: str = ""  # "" | "head" | "key"
    scale: float = 1.0
    carried: bool = True

    @property
    def group(self) -> int:
        """Queries that read one state."""
        return max(1, self.queries // self.heads)

    @property
    def tokens(self) -> int:
        """Of one chunk."""
        return max(1, CHUNK // self.factors)

    def sequences(self) -> Mapping[str, Dims]:
        widths = {
            "query": self.queries * self.key,
            "key": self.factors * self.keys * self.key,
            "value": self.factors * self.heads * self.width,
            "decay": {"": 0, "head": self.heads, "key": self.heads * self.key}[self.decay],
            "beta": self.factors * self.heads if self.rule == "delta" else 0,
        }
        return {name: ("batch", "time", n) for name, n in widths.items() if n}

    def results(self) -> Mapping[str, Dims]:
        return {"output": ("batch", "time", self.heads * self.group * self.width)}

    def states(self) -> Mapping[str, Dims]:
        return {"state": ("batch", self.heads, self.key, self.width)}

    def forms(self) -> tuple[str, ...]:
        return ("sequential",) if self.decay == "key" else ("sequential", "chunked")

    def named(self, xs: Sequence[Any]) -> dict[str, Any]:
        """The sequences by name."""
        return dict(zip(self.sequences(), xs, strict=True))

    def step(self, ops: AnySequenceOps, states: Sequence[Any], xs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        (state,), x = states, self.named(xs)
        if self.decay:
            per = (self.heads, 1, 1) if self.decay == "head" else (self.heads, self.key, 1)
            state = ops.mul(state, ops.exp(ops.unfold(x["decay"], *per)))
        keys = self._pieces(ops, x["key"], self.keys * self.key)
        values = self._pieces(ops, x["value"], self.heads * self.width)
        betas = self._pieces(ops, x["beta"], self.heads) if self.rule == "delta" else [None] * self.factors
        for k, v, beta in zip(keys, values, betas, strict=True):
            row = ops.unfold(self._shared(ops, k, self.keys), self._apart(self.keys), 1, self.key)
            v = ops.unfold(v, self.heads, 1, self.width)
            if self.rule == "delta":
                v = ops.mul(ops.sub(v, ops.contract(row, state)), ops.unfold(beta, self.heads, 1, 1))
            state = ops.add(state, ops.contract(ops.swap(row), v))
        query = ops.unfold(self._scaled(ops, x["query"]), self._apart(self.queries), self.group, self.key)
        return [state], [ops.fold(ops.contract(query, state), 3)]

    def _pieces(self, ops: AnySequenceOps, x: Any, width: int) -> Sequence[Any]:
        """One for each factor."""
        return [x] if self.factors == 1 else ops.split(x, [width] * self.factors)

    def _shared(self, ops: AnySequenceOps, x: Any, have: int) -> Any:
        """(..., have*key) -> (..., heads*key) where neighbours share; one that all share is broadcast."""
        if have >= self.heads or have == 1:
            return x
        ones = ops.literal(torch.ones(self.heads // have, 1), x)
        return ops.fold(ops.mul(ops.unfold(x, have, 1, self.key), ones), 3)

    def _apart(self, have: int) -> int:
        """The heads that `_shared` leaves."""
        return 1 if have == 1 else self.heads

    def _scaled(self, ops: AnySequenceOps, query: Any) -> Any:
        if self.scale != 1.0:
            query = ops.mul(query, ops.literal(torch.full((1,), self.scale, dtype=torch.float64), query))
        return self._shared(ops, query, self.queries)

    def chunked(self, ops: AnySequenceOps, states: Sequence[Any], xs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        (state,), x = states, self.named(xs)
        size = self.tokens
        keys = [self._shared(ops, k, self.keys) for k in self._pieces(ops, x["key"], self.keys * self.key)]
        key = keys[0] if self.factors == 1 else ops.concat(keys)
        q = self._rows(ops, self._scaled(ops, x["query"]), size, self._apart(self.queries), self.group, self.key, major=False)
        k = self._rows(ops, key, size, self._apart(self.keys), self.factors, self.key)
        v = self._rows(ops, x["value"], size, self.heads, self.factors, self.width)
        decay = self._decay(ops, x["decay"], size) if self.decay else None
        since, between = decay or (None, ops.literal(torch.ones(size, size).tril(), q))
        sees = self._repeated(ops, between, size, self.group, self.factors)
        rows = {"query": q, "key": ops.swap(k), "attention": ops.mul(ops.contract(q, ops.swap(k)), sees)}
        if decay:
            rows["since"], rows["all"] = self._repeated(ops, since, size, self.group), ops.last(since, -2)
            rows["until"] = self._repeated(ops, ops.swap(ops.last(between, -2)), size, self.factors)
        if self.rule == "delta":
            beta = self._rows(ops, x["beta"], size, self.heads, self.factors, 1)
            v, rows["erase"] = self._wy(ops, k, v, beta, decay)
        rows["write"] = v

        def chunk(carry: Sequence[Any], given: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
            (s,), row = carry, dict(zip(rows, given, strict=True))
            write = ops.sub(row["write"], ops.contract(row["erase"], s)) if "erase" in row else row["write"]
            read, inside = ops.contract(row["query"], s), ops.contract(row["attention"], write)
            if decay:
                read, write, s = ops.mul(read, row["since"]), ops.mul(write, row["until"]), ops.mul(s, row["all"])
            return [ops.add(s, ops.contract(row["key"], write))], [ops.add(read, inside)]

        last, (out,) = ops.recurrence(chunk, [state], list(rows.values()))  # (batch, chunks, heads, size*group, width)
        out = ops.swap(ops.unfold(ops.fold(out), size, self.group, self.width), -4, -3)
        return last, [ops.joined(ops.fold(out, 3), x["query"], 1)]

    @staticmethod
    def _rows(ops: AnySequenceOps, x: Any, size: int, heads: int, inner: int, width: int, major: bool = True) -> Any:
        """(batch, time, inner*heads*width), or heads*inner*width, -> (batch, chunks, heads, size*inner, width)."""
        x = ops.chunks(x, size, 1)
        x = ops.swap(ops.unfold(x, inner, heads, width), -3, -2) if major else ops.unfold(x, heads, inner, width)
        return ops.unfold(ops.fold(ops.swap(x, -4, -3), 3), size * inner, width)

    def _decay(self, ops: AnySequenceOps, g: Any, size: int) -> tuple[Any, Any]:
        """e^{G_i} (.., heads, tokens, 1) and D (.., heads, tokens, tokens) within a chunk.

        Sums from a token on, never differences of sums from the begin: after a reset those are of numbers too large to differ.
        """
        g = self._rows(ops, ops.at_least(g, RESET), size, self.heads, 1, 1)
        below = ops.literal(torch.ones(size, size).tril(-1), g)
        between = ops.exp(ops.cumulate(ops.mul(g, below), -2))
        return ops.exp(ops.cumulate(g, -2)), ops.mul(between, ops.literal(torch.ones(size, size).tril(), g))

    @staticmethod
    def _repeated(ops: AnySequenceOps, x: Any, size: int, rows: int, columns: int = 1) -> Any:
        """(.., size, n) with each row, and for n = size each column, so many times."""
        eye = torch.eye(size)
        if rows > 1:
            x = ops.contract(ops.literal(eye.repeat_interleave(rows, 0), x), x)
        return ops.contract(x, ops.literal(eye.repeat_interleave(columns, 1), x)) if columns > 1 else x

    def _wy(self, ops: AnySequenceOps, k: Any, v: Any, beta: Any, decay: tuple[Any, Any] | None) -> tuple[Any, Any]:
        """T (beta V) and T (beta K e^G); what scales the rows of V and K scales the columns of T, which are fewer."""
        size, rows = self.tokens, self.tokens * self.factors
        lower = ops.mul(ops.contract(k, ops.swap(k)), ops.literal(torch.ones(rows, rows).tril(-1), k))
        if decay:
            lower = ops.mul(lower, self._repeated(ops, decay[1], size, self.factors, self.factors))
        inverse = ops.mul(ops.unit_lower_inverse(ops.mul(lower, beta)), ops.swap(beta))
        write = ops.contract(inverse, v)
        if decay:
            inverse = ops.mul(inverse, ops.swap(self._repeated(ops, decay[0], size, self.factors)))
        return write, ops.contract(inverse, k)

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return cls(heads=2, key=5, width=3, queries=4, keys=1, factors=2, decay="head", scale=0.5)
