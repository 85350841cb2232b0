"""The vocabulary: the few words in which every structure spells its product.

An interpretation gives each word a meaning: eager tensors, ONNX nodes, fx nodes, a count of operations. Words are rank-free: a value is
(..., n), features last, and the leading dimensions are never read as numbers. Weights are stored as they are applied, x @ w. A word enters
only when a structure cannot be said without it, and every interpretation gains it in the same commit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor

V = TypeVar("V")


class Ops(Protocol[V]):
    """One interpretation. `const` takes a field of the operator itself, never a tensor derived from it, so that weights stay weights."""

    def const(self, tensor: Tensor) -> V:
        """A stored weight or index of the operator."""
        ...

    def matmul(self, x: V, w: V) -> V:
        """(..., n), const (n, m) -> (..., m)."""
        ...

    def block_matmul(self, x: V, w: V) -> V:
        """(..., k*q), const (k, q, p) -> (..., k*p): block b of x times w[b]. Each target lowers it once, its own best way."""
        ...

    def scatter(self, values: V, positions: V, n: int, m: int) -> V:
        """const (g*n, p) kept weights -> const (g*m, p): n of every m rows, zeros between; for matmul to take.

        positions: const uint8 (., p/s) of rewriter.packing: the row in its group of each value, the same for s neighbouring columns.
        Values and positions are what is stored; a runtime that folds constants then applies a dense weight.
        """
        ...

    def nibbles(self, packed: V) -> V:
        """const uint8 (..., q, p) of rewriter.packing -> whole numbers in -8..7 (..., 2 q, p), for scaled to take."""
        ...

    def scaled(self, values: V, scales: V) -> V:
        """const int8 or nibbles (..., q, p), const (..., g, p) -> the weight values * scales, each scale for q / g neighbouring rows; for
        matmul and block_matmul to take.

        A target may multiply integers: it then rounds inputs to 8 bits at each call, which its error shows.
        """
        ...

    def shuffle(self, x: V, k: int) -> V:
        """(..., k*m) -> (..., m*k): the stride permutation, out[j*k + i] = x[i*m + j]."""
        ...

    def add(self, a: V, b: V) -> V:
        """Elementwise sum of two values of one shape."""
        ...

    def mul(self, x: V, w: V) -> V:
        """(..., n) times const (n,), elementwise."""
        ...

    def gather(self, x: V, index: V) -> V:
        """(..., n), const int64 (m,) -> (..., m): out[j] = x[index[j]]."""
        ...

    def concat(self, xs: Sequence[V]) -> V:
        """Values side by side along the features."""
        ...

    def split(self, x: V, sizes: Sequence[int]) -> Sequence[V]:
        """The inverse of concat: consecutive pieces of the features."""
        ...

    def pad(self, x: V, width: int) -> V:
        """(..., n) -> (..., width), zeros behind; width >= n."""
        ...

    def by_rows(self, x: V, most: int, few: Callable[[V], V], many: Callable[[V], V]) -> V:
        """few(x) in a call where the leading dimensions of x have at most `most` entries together, else many(x), of the same width."""
        ...


class SequenceOps(Ops[V], Protocol[V]):
    """The words of maps on sequences. Values are (batch, time, n), states (batch, ...); axes are counted from the end, sizes of weights,
    heads and chunks are numbers, batch and time never are."""

    def literal(self, tensor: Tensor, like: V) -> V:
        """A fixed tensor that is no weight (a mask, a factor), in the type of `like`."""
        ...

    def unfold(self, x: V, *sizes: int) -> V:
        """(..., n) -> (..., *sizes): the last axis unfolded; one size may be -1."""
        ...

    def fold(self, x: V, axes: int = 2) -> V:
        """(..., a, b) -> (..., a*b): the last `axes` axes joined; their sizes are numbers."""
        ...

    def swap(self, x: V, a: int = -1, b: int = -2) -> V:
        """Two axes exchanged."""
        ...

    def contract(self, a: V, b: V) -> V:
        """(..., i, j), (..., j, k) -> (..., i, k), leading axes broadcast."""
        ...

    def add(self, a: V, b: V) -> V:
        """Elementwise sum, broadcast."""
        ...

    def mul(self, x: V, w: V) -> V:
        """Elementwise product, broadcast; w may be any value."""
        ...

    def sub(self, a: V, b: V) -> V:
        """Elementwise difference, broadcast."""
        ...

    def exp(self, x: V) -> V: ...

    def log(self, x: V) -> V: ...

    def at_least(self, x: V, bound: float) -> V:
        """The larger of each entry and a number."""
        ...

    def where(self, condition: V, a: V, b: V) -> V:
        """a where a boolean value holds, else b; broadcast."""
        ...

    def triangle(self, like: V) -> V:
        """(time, keys) booleans for scores (..., time, keys): true where the key is not behind the query."""
        ...

    def regroup(self, x: V, heads: int) -> V:
        """(batch, a, t, n) -> (batch, heads, a*t/heads, n): neighbouring heads above one another, or apart again."""
        ...

    def softmax(self, x: V) -> V:
        """Along the last axis."""
        ...

    def total(self, x: V) -> V:
        """(..., n) -> (..., 1): the sum along the last axis."""
        ...

    def cumulate(self, x: V, axis: int) -> V:
        """Running sums along an axis whose size is a number."""
        ...

    def last(self, x: V, axis: int) -> V:
        """The last slice along an axis, which becomes 1 long."""
        ...

    def unit_lower_inverse(self, x: V) -> V:
        """(..., c, c) strictly lower triangular L -> (I + L)^-1; stable where the factors are correlated, so no Neumann series."""
        ...

    def chunks(self, x: V, size: int, axis: int) -> V:
        """Axis `axis` (from the front), of any length t, -> (ceil(t/size), size), zeros behind."""
        ...

    def joined(self, x: V, like: V, axis: int) -> V:
        """The inverse of `chunks`: axes `axis` and `axis + 1` joined, and cut to the length that `axis` has in `like`."""
        ...

    def tail(self, x: V, size: int, axis: int) -> V:
        """What the last of `chunks` holds without its zeros: between 1 and `size` slices."""
        ...

    def at_tail(self, x: V, like: V, size: int) -> V:
        """(batch, chunks, ...) -> (batch, ...): the slice at the chunk in which `like` ends; chunks of nothing but zeros may follow it."""
        ...

    def steady(self, x: V, like: V) -> V:
        """(n,) -> (batch of like, time of like, n): the same at every token."""
        ...

    def zeros(self, like: V, *sizes: int) -> V:
        """(batch of like, *sizes) zeros."""
        ...

    def attend(self, attention: Any, *inputs: V) -> V:
        """What an attention of passes/structures gives for its inputs: each target has its own best way."""
        ...

    def by_length(self, x: V, axis: int, most: int, few: Choice[V], many: Choice[V], given: Sequence[V]) -> V:
        """few(*given) where `axis` of x has at most `most` entries, else many(*given): two ways to one value, of which a call computes one.
        What they take besides stored tensors is in `given`."""
        ...

    def recurrence(self, step: Step[V], states: Sequence[V], xs: Sequence[V]) -> tuple[list[V], list[V]]:
        """Scan `step` along axis 1 of every x: (states, slices of xs) -> (states, ys). Gives the last states, and the ys along axis 1."""
        ...


Step = Callable[[Sequence[V], Sequence[V]], tuple[Sequence[V], Sequence[V]]]
Choice = Callable[..., V]
AnyOps = Ops[Any]
AnySequenceOps = SequenceOps[Any]
