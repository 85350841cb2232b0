"""A spec's form with numbers of its own: how long a form takes is a question of its shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rewriter.cost import CostOps, Width
from rewriter.operator import AbstractMatrix, skeleton, unflatten
from rewriter.packing import pack


def random_form(spec: str, seed: int = 0) -> Any:
    """The form with numbers of its own; indices stay within every axis, positions are different ones of their group."""
    rng = torch.Generator().manual_seed(seed)
    operator, leaves = skeleton(spec)
    indices = _indices(operator, leaves, rng) if isinstance(operator, AbstractMatrix) else {}

    def filled(i: int, leaf: torch.Tensor) -> torch.Tensor:
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=rng)
        if leaf.dtype == torch.int8:
            return torch.randint(-127, 128, leaf.shape, generator=rng, dtype=torch.int8)
        return indices.get(i, torch.zeros(leaf.shape, dtype=leaf.dtype))

    return unflatten(spec, [filled(i, leaf) for i, leaf in enumerate(leaves)])


def _indices(operator: AbstractMatrix, leaves: Sequence[torch.Tensor], rng: torch.Generator) -> dict[int, torch.Tensor]:
    """For the tensors by which the product gathers and scatters, and those of 4 bits; they are found by spelling it."""
    found: dict[int, torch.Tensor] = {}

    class Watch(CostOps):
        def const(self, tensor: torch.Tensor) -> Width:
            width = super().const(tensor)
            order[id(width)] = (width, next(i for i, leaf in enumerate(leaves) if leaf is tensor))
            return width

        def gather(self, x: Width, index: Width) -> Width:
            size = index.shape[0]
            found[order[id(index)][1]] = torch.arange(size) % x.features
            return super().gather(x, index)

        def nibbles(self, packed: Width) -> Width:
            found[order[id(packed)][1]] = torch.randint(0, 256, packed.shape, generator=rng, dtype=torch.uint8)
            return super().nibbles(packed)

        def scatter(self, values: Width, positions: Width, n: int, m: int) -> Width:
            groups, owners = values.shape[0] // n, positions.features
            places = torch.rand(groups, m, owners, generator=rng).argsort(1)[:, :n].sort(1).values
            found[order[id(positions)][1]] = pack(places.flatten(0, 1), m)
            return super().scatter(values, positions, n, m)

    order: dict[int, tuple[Width, int]] = {}
    operator.product(Watch(1), Width((operator.shape[1],)))
    return found
