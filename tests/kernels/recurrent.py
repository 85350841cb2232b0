"""Recurrences of many sizes for the kernel, their inputs, and what a step-by-step run in torch gives."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from rewriter.operator import AbstractRecurrence
from rewriter.passes.structures.diagonal_recurrence import DiagonalRecurrence
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.passes.structures.retention import Retention
from rewriter.registry import eager_ops


def recurrence(seed: int) -> AbstractRecurrence:
    """Entries read or not; matrices with every rule, decay and way to share heads."""
    draw = random.Random(seed)
    carried = draw.random() < 0.7
    if seed % 3 == 0:
        return DiagonalRecurrence(draw.choice([1, 3, 40, 300, 700]), draw.choice([1, 5, 16, 17]), draw.random() < 0.6, carried)
    heads, key, width = draw.choice([1, 2, 4, 6]), draw.choice([1, 5, 8, 33]), draw.choice([1, 3, 16, 63, 64, 65, 130])
    keys = draw.choice([k for k in range(1, heads + 1) if heads % k == 0])
    queries = draw.choice([keys, heads, 2 * heads])
    rule, decay = draw.choice(["delta", "plain"]), draw.choice(["", "head", "key"])
    shared = {"factors": draw.choice([1, 1, 2, 3]), "rule": rule, "scale": draw.choice([1.0, 0.125]), "carried": carried}
    if decay and draw.random() < 0.3:
        rates = -torch.rand(heads * (key if decay == "key" else 1), generator=torch.Generator().manual_seed(seed))
        return Retention(heads, key, width, queries, keys, decay=decay, rates=rates, **shared)  # type: ignore[arg-type]
    return LinearAttention(heads, key, width, queries, keys, decay=decay, **shared)  # type: ignore[arg-type]


def inputs(operator: AbstractRecurrence, batch: int, time: int, seed: int) -> list[Tensor]:
    """Small enough that the states stay in range; decays are logarithms for matrices, factors for entries."""
    rng = torch.Generator().manual_seed(seed)
    sizes = {"batch": batch, "time": time}
    found = []
    for name, dims in operator.inputs().items():
        shape = [n if isinstance(n, int) else sizes[n] for n in dims]
        x = torch.randn(shape, generator=rng) / 4
        entries = isinstance(operator, DiagonalRecurrence)
        found.append((torch.sigmoid(x) if entries else -x.abs()) if name == "decay" else x)
    return found


def given(operator: AbstractRecurrence, xs: list[Tensor]) -> list[Tensor]:
    """With what the operator stores."""
    return [*xs, operator.rates] if isinstance(operator, Retention) else xs


def wanted(operator: AbstractRecurrence, xs: list[Tensor]) -> list[Tensor]:
    """One step after the other, in float64."""
    wide = operator.to(torch.float64)
    return [y.float() for y in wide.spelled("sequential", eager_ops(), *[x.double() for x in xs])]
