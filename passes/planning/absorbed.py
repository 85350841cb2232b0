"""Up to how many queries attention on a latent is absorbed: both ways on the target, on an empty cache and on one that is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from rewriter.cost import Cost
from rewriter.passes.structures.latent_attention import ALWAYS, AbstractLatentAttention
from rewriter.rule import Context


def fastest(context: Context, form: AbstractLatentAttention) -> tuple[int, str]:
    """(few, the figures in words); 0 where absorbing is not even faster at the fewest asked tokens."""
    tokens = sorted(context.tokens)
    table = [context.target.measure(_forms(form), count, context.threads) for count in tokens]
    faster = list(takewhile(lambda row: _saved(row) > 0, table))
    figures = "; ".join(
        f"{1e3 * after:.3f} ms against {1e3 * before:.3f} ms expanded at T={count}"
        for count, (_, _, before, after) in zip(tokens, table, strict=True)
    )
    return (ALWAYS if len(faster) == len(tokens) else tokens[len(faster) - 1] if faster else 0), figures


def where(few: int) -> str:
    """In words."""
    return "in every call" if few == ALWAYS else f"up to T={few}, expanded above" if few else "in no call"


def _forms(form: AbstractLatentAttention) -> Sequence[AbstractLatentAttention]:
    """Expanded and absorbed, on an empty cache and on one that is not."""
    return [replace(form, few=few, cached=cached) for cached in (0, form.cached) for few in (0, ALWAYS)]  # type: ignore[type-var]


def _saved(seconds: Sequence[float]) -> float:
    """By absorbing, over both caches."""
    return seconds[0] - seconds[1] + seconds[2] - seconds[3]


def per_token(form: AbstractLatentAttention, tokens: int) -> Cost:
    """Of a call of as many on a cache."""
    cost = form.cost(tokens)
    return Cost(cost.params, cost.flops // tokens, cost.nbytes)
