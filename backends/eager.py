"""Torch eager: each word one or two tensor operations; the oracle that every other interpretation must match."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class EagerOps:
    """Plain tensors; differentiable, so a structure trains as it stands."""

    def const(self, tensor: Tensor) -> Tensor:
        return tensor

    def matmul(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    def block_matmul(self, x: Tensor, w: Tensor) -> Tensor:
        k, q, p = w.shape
        rows = x.reshape(-1, k, q).transpose(0, 1)  # (k, tokens, q)
        return torch.bmm(rows, w).transpose(0, 1).reshape(*x.shape[:-1], k * p)

    def shuffle(self, x: Tensor, k: int) -> Tensor:
        rows: Tensor = x.unflatten(-1, (k, -1))
        return rows.transpose(-1, -2).flatten(-2)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def mul(self, x: Tensor, w: Tensor) -> Tensor:
        return x * w

    def gather(self, x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(-1, index)

    def concat(self, xs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(xs), -1)

    def split(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        return torch.split(x, list(sizes), -1)

    def pad(self, x: Tensor, width: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[-1]))
