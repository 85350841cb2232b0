"""The vocabulary: the few words in which every structure spells its product.

An interpretation gives each word a meaning: eager tensors, ONNX nodes, fx nodes, a count of operations. Words are rank-free: a value is
(..., n), features last, and the leading dimensions are never read as numbers. Weights are stored as they are applied, x @ w. A word enters
only when a structure cannot be said without it, and every interpretation gains it in the same commit.
"""

from __future__ import annotations

from collections.abc import Sequence
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


AnyOps = Ops[Any]
