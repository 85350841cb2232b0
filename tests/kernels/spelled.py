"""Random products: shuffles, pads, permutations, cuts, products of blocks and sparse weights, for plan and kernel to get right."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rewriter.algebra import Sparse
from rewriter.backends.kernels.plan import PAIR, Plan, Product
from rewriter.operator import AbstractMatrix


@dataclass(frozen=True)
class Spelled:
    """As much of an operator as a plan asks for; no AbstractMatrix, so that no registry finds it."""

    shape: tuple[int, int]
    words: tuple[Callable[[Any, Any], Any], ...]

    def product(self, ops: Any, x: Any) -> Any:
        for word in self.words:
            x = word(ops, x)
        return x


def spelled(seed: int, widest: int = 90, most_products: int = 3, sparse: bool = True, rows: int = 1) -> AbstractMatrix:
    """At least one product; sizes are rarely multiples of anything, but the blocks' rows are of `rows`."""
    draw, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    n = width = draw.randint(1, widest)
    words: list[Callable[[Any, Any], Any]] = []
    products = draw.randint(1, most_products)
    while products:
        kind = draw.choice(["block", "block", *(["sparse"] if sparse else []), "shuffle", "pad", "gather", "cut", "twice"])
        if kind == "block" and width % rows:
            words.append(_padded(width + -width % rows))
            width += -width % rows
        if kind in ("block", "sparse"):
            word, width = _block(draw, rng, width, widest, rows) if kind == "block" else _sparse(draw, rng, width, widest)
            products -= 1
        else:
            word, width = _moved(kind, draw, width)
        words.append(word)
    for _ in range(draw.randint(0, 2)):
        word, width = _moved(draw.choice(["shuffle", "gather", "cut", "pad"]), draw, width)
        words.append(word)
    return Spelled((width, n), tuple(words))  # type: ignore[return-value]


def shuffled_blocks(k: int, q: int, p: int) -> AbstractMatrix:
    """Blocks (k, q, p) of a shuffled x, which they read one number here and one there."""
    weight: Tensor = torch.randn(k, q, p) / q**0.5
    words = (lambda ops, x: ops.shuffle(x, k)), (lambda ops, x: ops.block_matmul(x, ops.const(weight)))
    return Spelled((k * p, k * q), words)  # type: ignore[return-value]


def _divisor(draw: random.Random, width: int) -> int:
    return draw.choice([d for d in range(1, width + 1) if width % d == 0])


def _block(draw: random.Random, rng: torch.Generator, width: int, widest: int, rows: int) -> tuple[Callable[[Any, Any], Any], int]:
    k = _divisor(draw, width // rows) if draw.random() < 0.7 else 1
    p = draw.randint(1, max(1, widest // k))
    weight: Tensor = torch.randn(k, width // k, p, generator=rng) / (width // k) ** 0.5
    return (lambda ops, x: ops.block_matmul(x, ops.const(weight))), k * p


def _sparse(draw: random.Random, rng: torch.Generator, width: int, widest: int) -> tuple[Callable[[Any, Any], Any], int]:
    """Of any pattern that the kernel takes, each column with rows of its own, or many with the same."""
    group = draw.randint(2, 16)
    shared, owners = draw.choice([(1, draw.randint(1, widest)), (draw.choice([16, 64]), draw.randint(1, 2))])
    kept = draw.randint(1, group - 1)
    weight = torch.randn(width, shared * owners, generator=rng) / width**0.5
    return Sparse.of(weight, kept, group, shared).product, shared * owners


def _padded(width: int) -> Callable[[Any, Any], Any]:
    return lambda ops, x: ops.pad(x, width)


def _moved(kind: str, draw: random.Random, width: int) -> tuple[Callable[[Any, Any], Any], int]:
    if kind == "shuffle":
        k = _divisor(draw, width)
        return (lambda ops, x: ops.shuffle(x, k)), width
    if kind == "pad":
        wider = width + draw.randint(0, 5)
        return _padded(wider), wider
    if kind == "gather":
        index = torch.tensor([draw.randrange(width) for _ in range(draw.randint(1, width))])
        return (lambda ops, x: ops.gather(x, ops.const(index))), len(index)
    if kind == "twice":
        return (lambda ops, x: ops.concat([x, x])), 2 * width
    left = draw.randint(1, width)
    return (lambda ops, x: ops.split(x, [left, width - left])[0] if left < width else x), left


def in_4_bits(steps: Plan) -> Plan:
    """Every product of blocks whose rows are a multiple of 8 with its weights in 4 bits, in groups of 8 or of all rows."""
    return replace(steps, steps=tuple(_in_4_bits(s) if isinstance(s, Product) and s.pattern is None else s for s in steps.steps))


def _in_4_bits(step: Product) -> Product:
    q = step.weight.shape[1]
    if q % PAIR:
        return step
    groups = q // PAIR if q % 3 else 1
    scale = step.weight.unflatten(1, (groups, -1)).abs().amax(2) / 7  # (k, groups, p)
    values = step.weight.unflatten(1, (groups, -1)) / scale[:, :, None].clamp_min(1e-30)
    return replace(step, weight=values.round().clamp(-8, 7).to(torch.int8).flatten(1, 2), scale=scale, bits=4)
