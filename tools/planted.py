"""Weights that are exactly members of a family, rectangular and no powers of two, and small models that hold them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rewriter.passes.structures.block_dense import BlockDense
from rewriter.passes.structures.low_rank import LowRank
from rewriter.passes.structures.monarch import Monarch


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_GENERATOR) / shape[-2] ** 0.5


_GENERATOR = torch.Generator().manual_seed(0)


def _low_rank() -> Tensor:
    return LowRank(_random(90, 11), _random(11, 150)).dense()


def _monarch() -> Tensor:
    return Monarch(_random(6, 15, 12), _random(3, 24, 50), 90, 150).dense()


def _strided() -> Tensor:
    """The layout of HazyResearch/fly: output row sigma * groups + group."""
    return Monarch(_random(6, 15, 12), _random(3, 24, 50), 90, 150, stride_out=True).dense()


def _block_dense() -> Tensor:
    return BlockDense(_random(5, 18, 7), _random(35, 150), 90).dense()


def _permuted_blocks() -> Tensor:
    blocks = torch.block_diag(*[_random(30, 18) for _ in range(5)])
    return blocks[torch.randperm(150, generator=_GENERATOR)][:, torch.randperm(90, generator=_GENERATOR)].contiguous()


PLANTED: dict[str, Callable[[], Tensor]] = {
    "low-rank": _low_rank,
    "monarch, contiguous": _monarch,
    "monarch, strided": _strided,
    "block-dense": _block_dense,
    "block-diagonal, rows and columns permuted": _permuted_blocks,
}


class Planted(nn.Module):
    """A layer of nothing known, the planted one, and a head."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        m, n = weight.shape
        self.first, self.planted, self.head = nn.Linear(31, n), nn.Linear(n, m), nn.Linear(m, 17)
        self.planted.weight.data = weight.clone()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.planted(torch.tanh(self.first(x)))))
        return out
