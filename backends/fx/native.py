"""Lowerings of maps to torch's own operators, by the operator's name; they must match its oracle in the same contract tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Lower = Callable[..., Sequence[Tensor]]


def _attention(operator: Any, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Sequence[Tensor]:
    """aten.scaled_dot_product_attention, which gives zeros in a row that sees no key."""
    mask = masks[0] if masks else None
    if mask is not None and operator.boolean and (masks[1:] or operator.hidden != -math.inf):
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype, device=query.device), operator.hidden)
    for bias in masks[1:]:
        mask = mask + bias  # type: ignore[operator]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=operator.causal, scale=operator.scale, enable_gqa=operator.heads != operator.shared
    )
    if operator.empty != "nan" or mask is None:
        return [out]
    seen = (mask if mask.dtype == torch.bool else mask > -math.inf).any(-1, keepdim=True)
    return [torch.where(seen, out, math.nan)]


NATIVE: dict[str, Lower] = {"Attention": _attention}
