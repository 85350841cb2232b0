"""Weights as integers around any operator. In 8 bits w[..., i, j] ~ scale[..., j] integer[..., i, j], a scale a column and block; in 4 bits
a scale for every 32 rows of each, or 16 or 64 where they divide the rows; weights of other heights are in 8 bits then as well.

The product is the operator's own, its weights read through `scaled`; so every structure has its quantised form, and every target one way
to multiply integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from rewriter.cost import CostOps, Width
from rewriter.operator import AbstractMatrix, flatten, skeleton, unflatten
from rewriter.ops import AnyOps
from rewriter.packing import nibbles, pack_nibbles, scaled

LARGEST = 127  # integers of 8 bits are symmetric about zero
LEAST = -8  # of 4 bits
GROUPS = (32, 16, 64)  # rows that share a scale in 4 bits, the first that divides them all
BITS = (8, 4)


@dataclass(frozen=True)
class Quantised(AbstractMatrix):
    """The operator of `form` with some of its tensors rounded; `places` says where each of those stands among its leaves."""

    form: str  # a spec, see rewriter.operator.flatten
    places: tuple[int, ...]
    values: tuple[Tensor, ...]  # (..., q, p) int8, or in 4 bits (..., q / 2, p) uint8 of rewriter.packing
    scales: tuple[Tensor, ...]  # (..., 1, p), or (..., groups, p)
    others: tuple[Tensor, ...]  # the leaves that stay

    @property
    def shape(self) -> tuple[int, int]:
        return _bare(self.form).shape

    def product(self, ops: AnyOps, x: Any) -> Any:
        """The operator's, through Reading."""
        _, leaves = skeleton(self.form)
        others = iter(self.others)
        held = [leaves[i] if i in self.places else next(others) for i in range(len(leaves))]
        rounded = {id(leaves[i]): pair for i, pair in zip(self.places, zip(self.values, self.scales, strict=True), strict=True)}
        operator = unflatten(self.form, held)
        assert isinstance(operator, AbstractMatrix)
        return operator.product(Reading(ops, rounded), x)

    @property
    def inside(self) -> AbstractMatrix:
        """The operator with its weights as the integers say."""
        _, leaves = skeleton(self.form)
        others = iter(self.others)
        made = {i: floats(v, s) for i, v, s in zip(self.places, self.values, self.scales, strict=True)}
        operator = unflatten(self.form, [made[i] if i in made else next(others) for i in range(len(leaves))])
        assert isinstance(operator, AbstractMatrix)
        return operator

    @property
    def bits(self) -> int:
        """4 where there are any of those."""
        return 4 if any(v.dtype == torch.uint8 for v in self.values) else 8

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        from rewriter.algebra import BlockDiagonal, Compose, Dense

        made = quantised(Compose((BlockDiagonal(torch.randn(3, 5, 2, generator=rng)), Dense(torch.randn(6, 7, generator=rng)))))
        assert isinstance(made, cls)
        return made


@dataclass
class Reading:
    """An interpretation that reads some constants as integers and their scales."""

    ops: Any
    rounded: dict[int, tuple[Tensor, Tensor]]  # by id of the tensor that the operator holds

    def const(self, tensor: Tensor) -> Any:
        pair = self.rounded.get(id(tensor))
        if pair is None:
            return self.ops.const(tensor)
        values, scales = map(self.ops.const, pair)
        return self.ops.scaled(self.ops.nibbles(values) if pair[0].dtype == torch.uint8 else values, scales)

    def __getattr__(self, word: str) -> Any:
        return getattr(self.ops, word)


@dataclass(eq=False)
class _Weights(CostOps):
    """The count, noting what products take as their weight."""

    tokens: int = 1
    held: dict[int, int] = field(default_factory=dict)  # id of a constant's width -> id of its tensor
    multiplied: set[int] = field(default_factory=set)
    kept: list[Width] = field(default_factory=list)  # so that no id is used twice

    def __post_init__(self) -> None:
        super().__init__(self.tokens)

    def const(self, tensor: Tensor) -> Width:
        width = super().const(tensor)
        self.kept.append(width)
        self.held[id(width)] = id(tensor)
        return width

    def matmul(self, x: Width, w: Width) -> Width:
        self.multiplied.add(self.held.get(id(w), 0))
        return super().matmul(x, w)

    def scatter(self, values: Width, positions: Width, n: int, m: int) -> Width:
        spread = super().scatter(values, positions, n, m)
        self.kept.append(spread)
        self.held[id(spread)] = self.held.get(id(values), 0)
        return spread

    def block_matmul(self, x: Width, w: Width) -> Width:
        self.multiplied.add(self.held.get(id(w), 0))
        return super().block_matmul(x, w)


def weights_of(operator: AbstractMatrix) -> list[int]:
    """Which leaves are weights of products, in order."""
    leaves, _ = flatten(operator)
    ops = _Weights()
    operator.product(ops, Width((operator.shape[1],)))
    return [i for i, leaf in enumerate(leaves) if id(leaf) in ops.multiplied and leaf.is_floating_point()]


def quantised(operator: AbstractMatrix, bits: int = 8) -> Quantised | None:
    """The operator with the weights of its products rounded to the nearest of 255 steps, or of 16; None where it has none."""
    places = weights_of(operator)
    if not places:
        return None
    leaves, form = flatten(operator)
    pairs = [rounded(leaves[i]) if bits == 8 else rounded_to_4(leaves[i]) for i in places]
    others = tuple(leaf for i, leaf in enumerate(leaves) if i not in places)
    return Quantised(form, tuple(places), tuple(v for v, _ in pairs), tuple(s for _, s in pairs), others)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(..., q, p) -> int8 of the same shape and the scales (..., 1, p)."""
    scales = weight.abs().amax(-2, keepdim=True) / LARGEST
    steps = torch.where(scales > 0, weight / torch.where(scales > 0, scales, 1), 0)
    return steps.round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def rounded_to_4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(..., q, p) -> uint8 (..., q / 2, p) and the scales (..., groups, p), of which the group's largest number is -8; in 8 bits where no
    group divides q."""
    group = next((g for g in GROUPS if weight.shape[-2] % g == 0), 0)
    if not group:
        return rounded(weight)
    groups = weight.unflatten(-2, (-1, group))  # (..., groups, group, p)
    largest = groups.gather(-2, groups.abs().argmax(-2, keepdim=True))
    scales = largest / LEAST
    steps = torch.where(scales != 0, groups / torch.where(scales != 0, scales, 1), 0)
    return pack_nibbles(steps.round().clamp(LEAST, -LEAST - 1).flatten(-3, -2).to(torch.int8)), scales.squeeze(-2)


def floats(values: Tensor, scales: Tensor) -> Tensor:
    """The weight that integers and scales say."""
    return scaled(nibbles(values) if values.dtype == torch.uint8 else values, scales)


def _bare(form: str) -> AbstractMatrix:
    operator, _ = skeleton(form)
    assert isinstance(operator, AbstractMatrix)
    return operator
