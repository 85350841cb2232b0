"""The oracle of products in integers: each product's input rounded as DynamicQuantizeLinear does, to 256 steps with zero among them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rewriter.backends.eager import EagerOps


class Integers(NamedTuple):
    values: Tensor
    scales: Tensor


class Nibbles(NamedTuple):
    values: Tensor


class RoundingOps(EagerOps):
    """`blockwise`: each block's input has a range of its own, else all blocks share one; `by_row`: each row has. Weights of 4 bits
    meet rounded inputs by row alone."""

    def __init__(self, blockwise: bool, by_row: bool = False) -> None:
        super().__init__()
        self.blockwise, self.by_row = blockwise, by_row

    def nibbles(self, packed: Tensor) -> Nibbles:  # type: ignore[override]
        return Nibbles(super().nibbles(packed))

    def scaled(self, values: Tensor | Nibbles, scales: Tensor) -> Tensor | Integers:  # type: ignore[override]
        if isinstance(values, Tensor):
            return Integers(values, scales)
        rows = values.values.shape[-2] // scales.shape[-2]
        return Integers(values.values, scales.repeat_interleave(rows, -2)) if self.by_row else super().scaled(values.values, scales)

    def scatter(self, values: Tensor | Integers, positions: Tensor, n: int, m: int) -> Tensor | Integers:  # type: ignore[override]
        if isinstance(values, Tensor):
            return super().scatter(values, positions, n, m)
        return Integers(super().scatter(values.values, positions, n, m), values.scales)

    def matmul(self, x: Tensor, w: Tensor | Integers) -> Tensor:  # type: ignore[override]
        return x @ w if isinstance(w, Tensor) else self._rounded(x) @ (w.values * w.scales)

    def block_matmul(self, x: Tensor, w: Tensor | Integers) -> Tensor:  # type: ignore[override]
        if isinstance(w, Tensor):
            return super().block_matmul(x, w)
        blocks: list[Tensor] = list(x.unflatten(-1, (len(w.values), -1)).unbind(-2))
        rounded = [self._rounded(b) for b in blocks] if self.blockwise else list(self._rounded(torch.stack(blocks)).unbind())
        return torch.cat([b @ v for b, v in zip(rounded, w.values * w.scales, strict=True)], -1)

    def _rounded(self, x: Tensor) -> Tensor:
        dims = (-1,) if self.by_row else tuple(range(x.dim()))
        low, high = x.amin(dims, keepdim=True).clamp_max(0), x.amax(dims, keepdim=True).clamp_min(0)
        scale = (high - low) / 255
        zero = (-low / scale).round().clamp(0, 255)
        return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale
