"""Attention in each of its forms, with inputs: odd sizes, more keys than queries, rows that see no key where a form says what they give."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rewriter.passes.structures.attention import Attention
from tests.structures.inputs import generator

PLAIN = Attention(heads=4, shared=4, key=5, width=3, scale=0.5)
KEYS, PAIRS, HEADS = ("batch", 1, 1, "keys"), ("batch", 1, "time", "keys"), (1, 4, "time", "keys")
LOWEST = float(torch.finfo(torch.float32).min)
FORMS = {
    "plain": PLAIN,
    "wide": replace(PLAIN, key=3, width=7, scale=1.0),
    "causal": replace(PLAIN, causal=True),
    "added": replace(PLAIN, mask=PAIRS),
    "added to all queries": replace(PLAIN, mask=KEYS),
    "added to all keys": replace(PLAIN, mask=("batch", 1, "time", 1)),
    "added, or infinite": replace(PLAIN, mask=KEYS, empty="nan"),
    "two added": replace(PLAIN, mask=KEYS, bias=HEADS),
    "two, or infinite": replace(PLAIN, mask=PAIRS, bias=HEADS, empty="nan"),
    "boolean": replace(PLAIN, mask=(1, 1, "time", "keys"), boolean=True),
    "boolean, zero": replace(PLAIN, mask=KEYS, boolean=True, empty="zero"),
    "boolean, nan": replace(PLAIN, mask=PAIRS, boolean=True, empty="nan"),
    "boolean, bias": replace(PLAIN, mask=PAIRS, boolean=True, bias=HEADS, empty="nan"),
    "boolean, finite": replace(PLAIN, mask=KEYS, boolean=True, hidden=LOWEST),
    "boolean, finite, bias": replace(PLAIN, mask=PAIRS, boolean=True, hidden=LOWEST, bias=HEADS),
}
FORMS |= {f"{name}, grouped": replace(form, shared=2) for name, form in FORMS.items()}
FORMS["all heads on one"] = replace(PLAIN, shared=1)


def inputs(form: Attention, time: int = 4, keys: int = 6, batch: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random ones; where the form says what an empty row gives, the first row of the masks hides every key, or adds the lowest number."""
    sizes, found = {"batch": batch, "time": time, "keys": keys}, []
    for i, (name, dims) in enumerate(form.inputs().items()):
        x = torch.randn([n if isinstance(n, int) else sizes[n] for n in dims], generator=generator(i), dtype=torch.float64).to(dtype)
        if name in form.booleans():
            x = x > -0.5
            x[..., 0] = True
        if name == "mask":
            lowest = math.nan if form.empty else max(LOWEST, float(torch.finfo(dtype).min))
            first = x[0, :, :1]
            first.copy_(torch.full_like(first, False if form.boolean else -math.inf if form.empty else lowest))
            if form.boolean and not form.empty and form.hidden == -math.inf:
                first[..., 0] = True
        if name == "bias" and time > 1 and (form.boolean or form.empty) and form.hidden == -math.inf:
            x[:, :, 1] = max(LOWEST, float(torch.finfo(dtype).min))
        found.append(x)
    return found
