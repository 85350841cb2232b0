"""Attention as people spell it in torch: x (batch, 5, 12), four heads of three; and what each should be read as, where that is not BASE."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T, H, D = 5, 4, 3
E = H * D
BASE: dict[str, Any] = {"heads": H, "shared": H, "key": D, "width": D, "scale": 1.0}
SCALED = {"scale": D**-0.5}
GROUPED, ONE = {"shared": 2}, {"shared": 1}
PAIRS, KEYS, SQUARE = ("batch", 1, "time", "keys"), ("batch", 1, 1, "keys"), (1, 1, "time", "keys")
CAUSAL = torch.ones(T, T).tril().bool()
LOWEST = float(torch.finfo(torch.float32).min)
Spelling = tuple[Callable[[Any, Tensor], Tensor], dict[str, Any]]


def parts() -> dict[str, Any]:
    torch.manual_seed(0)
    widths = {"q": E, "k": E, "v": E, "k2": 2 * D, "v2": 2 * D, "k1": D, "v1": D, "packed": 3 * E}
    fixed = {"square": (T, T), "per_head": (H, T, T), "relative": (D, T)}
    return {
        **{name: nn.Linear(E, width) for name, width in widths.items()},
        **{name: torch.randn(shape) for name, shape in fixed.items()},
        "buffer": torch.ones(1, 1, 8, 8, dtype=torch.int64).tril(),
        "mha": nn.MultiheadAttention(E, H, batch_first=True),
        "layer": nn.TransformerEncoderLayer(E, H, 16, batch_first=True),
    }


def heads(x: Tensor, count: int = H) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def side_by_side(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([heads(a, 2)[:, :, None], heads(b, 2)[:, :, None]], 2).flatten(1, 2)


def linears(s: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return s.q(x), s.k(x), s.v(x)


def out(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def plain(q: Tensor, k: Tensor, v: Tensor, between: Callable[[Tensor], Tensor] = lambda z: z) -> Tensor:
    return out(between(q @ k.transpose(-1, -2)).softmax(-1) @ v)


def scores(between: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """softmax(between(s, x, Q K^T)) V."""
    return lambda s, x: plain(*map(heads, linears(s, x)), lambda z: between(s, x, z))


def operands(change: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """`change` of the heads of q, k and v."""
    return lambda s, x: change(*map(heads, linears(s, x)))


def grouped(repeat: Callable[[Tensor], Tensor], attend: Callable[..., Tensor] = plain) -> Callable[[Any, Tensor], Tensor]:
    """Two heads of keys and values, repeated for four of queries."""
    return lambda s, x: attend(heads(s.q(x)), repeat(heads(s.k2(x), 2)), repeat(heads(s.v2(x), 2)))


def flat(change: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """`change` of (batch*heads, time, head) operands."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = change(s, x, *(heads(part).reshape(-1, T, D) for part in linears(s, x)))
        return out(y.view(-1, H, T, D))

    return forward


def einsums(first: str, second: str, **kinds: tuple[str, tuple[int, ...]]) -> Callable[[Any, Tensor], Tensor]:
    """Two einsums around a softmax; each operand is a linear whose features are unfolded."""

    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = (getattr(s, name)(x).unflatten(-1, sizes) for name, sizes in kinds.values())
        return torch.einsum(second, torch.einsum(first, q, k).softmax(-1), v)

    return forward


def bloom(s: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = torch.baddbmm(s.per_head.repeat(x.shape[0], 1, 1), q, k.transpose(1, 2), beta=1.0, alpha=0.25)
    return torch.bmm((z.view(-1, H, T, T) + s.square).softmax(-1).view(-1, T, T), v)


def sdpa(**options: Any) -> Callable[[Any, Tensor], Tensor]:
    return operands(lambda q, k, v: out(F.scaled_dot_product_attention(q, k, v, **options)))


def seen(x: Tensor) -> Tensor:
    """(batch, 1, 1, keys) booleans that depend on the input."""
    return (x[:, :, 0] > -0.5)[:, None, None]


added = {"mask": SQUARE}
hides = {"mask": KEYS, "boolean": True}
SPELLINGS: dict[str, Spelling] = {
    "plain": (scores(lambda s, x, z: z), {}),
    "scores divided": (scores(lambda s, x, z: z / math.sqrt(D)), SCALED),
    "scores divided by a tensor": (scores(lambda s, x, z: z / torch.sqrt(torch.tensor(float(D)))), SCALED),
    "scores scaled": (scores(lambda s, x, z: z * 0.25), {"scale": 0.25}),
    "scaled by a size": (operands(lambda q, k, v: plain(q, k, v, lambda z: z / math.sqrt(k.size(-1)))), SCALED),
    "queries scaled": (operands(lambda q, k, v: plain(q * 0.25, k, v)), {"scale": 0.25}),
    "queries scaled early": (lambda s, x: plain(heads(s.q(x) * 0.25), heads(s.k(x)), heads(s.v(x))), {"scale": 0.25}),
    "keys scaled": (operands(lambda q, k, v: plain(q, k / 2, v)), {"scale": 0.5}),
    "both by the root": (operands(lambda q, k, v: plain(q * D**-0.25, (k * D**-0.25), v)), SCALED),
    "a stored mask": (scores(lambda s, x, z: z + s.square), added),
    "a stored mask first": (scores(lambda s, x, z: s.square + z / 4), {**added, "scale": 0.25}),
    "a mask per head": (scores(lambda s, x, z: z + s.per_head), {"mask": (1, H, "time", "keys")}),
    "a causal mask, added": (scores(lambda s, x, z: z + torch.full((T, T), -math.inf).triu(1)), added),
    "a mask of the input": (scores(lambda s, x, z: z + x[:, None, :, :T]), {"mask": PAIRS, "empty": "nan"}),
    "padding, added": (scores(lambda s, x, z: z + (1.0 - seen(x).float()) * -10000.0), {"mask": KEYS}),
    "where, stored": (scores(lambda s, x, z: torch.where(CAUSAL, z, -1e9)), {**added, "boolean": True}),
    "where, full": (scores(lambda s, x, z: torch.where(CAUSAL, z, torch.full([], LOWEST))), {**added, "boolean": True}),
    "where, the lowest": (scores(lambda s, x, z: torch.where(seen(x), z, LOWEST)), {**hides, "hidden": LOWEST}),
    "masked_fill, stored": (scores(lambda s, x, z: z.masked_fill(~CAUSAL, -math.inf)), {**added, "boolean": True}),
    "masked_fill, cut": (scores(lambda s, x, z: z.masked_fill(s.buffer[:, :, :T, :T] == 0, -1e10)), {**added, "boolean": True}),
    "masked_fill": (scores(lambda s, x, z: z.masked_fill(~seen(x), -math.inf)), {**hides, "empty": "nan"}),
    "masked_fill where true": (scores(lambda s, x, z: z.masked_fill(seen(x), -math.inf)), {**hides, "empty": "nan"}),
    "a boolean mask, added": (scores(lambda s, x, z: z + torch.where(seen(x), 0.0, -math.inf)), {**hides, "empty": "nan"}),
    "where and added": (
        scores(lambda s, x, z: torch.where(CAUSAL, z, LOWEST) + (1.0 - seen(x).float()) * -10000.0),
        {**added, "boolean": True, "bias": KEYS},
    ),
    "where and added, unbounded": (
        scores(lambda s, x, z: torch.where(CAUSAL, z, LOWEST) + x[:, None, :, :T]),
        {**added, "boolean": True, "bias": PAIRS, "empty": "nan"},
    ),
    "the lowest, twice": (
        scores(lambda s, x, z: z + torch.where(seen(x), 0.0, LOWEST) + torch.where(x[:, None, :, :T] > 0, 0.0, LOWEST)),
        {"mask": PAIRS, "bias": KEYS, "empty": "nan"},  # together they are -inf
    ),
    "the lowest and a little": (
        scores(lambda s, x, z: z + torch.where(seen(x), 0.0, LOWEST) + s.per_head),
        {"mask": (1, H, "time", "keys"), "bias": KEYS},
    ),
    "hidden and lowest": (
        scores(lambda s, x, z: torch.where(seen(x), z, LOWEST) + torch.where(x[:, None, :, :T] > 0, 0.0, LOWEST)),
        {**hides, "hidden": LOWEST, "bias": PAIRS, "empty": "nan"},
    ),
    "more than a boolean mask, added": (scores(lambda s, x, z: z + torch.where(seen(x), 0.5, -math.inf)), {"mask": KEYS, "empty": "nan"}),
    "two added": (scores(lambda s, x, z: z + s.square + s.per_head), {"mask": (1, H, "time", "keys"), "bias": SQUARE}),
    "a bias of the queries": (
        operands(lambda q, k, v: plain(q, k, v, lambda z: z + (q * 2) @ k.mT)),
        {"mask": ("batch", H, "time", "keys"), "empty": "nan"},
    ),
    "in double": (operands(lambda q, k, v: out((q @ k.mT).double().softmax(-1).float() @ v)), {}),
    "softmax in double": (operands(lambda q, k, v: out(F.softmax(q @ k.mT, -1, dtype=torch.float64).to(q.dtype) @ v)), {}),
    "dropout": (operands(lambda q, k, v: out(F.dropout((q @ k.mT).softmax(-1), 0.1, False) @ v)), {}),
    "einsum": (einsums("bthd,bshd->bhts", "bhts,bshd->bthd", q=("q", (H, D)), k=("k", (H, D)), v=("v", (H, D))), {}),
    "einsum, keys by queries": (
        einsums("bshd,bthd->bhts", "bhts,bshd->bthd", q=("k", (H, D)), k=("q", (H, D)), v=("v", (H, D))),
        {},
    ),
    "einsum, ellipsis": (operands(lambda q, k, v: out(torch.einsum("...td,...sd->...ts", q, k).softmax(-1) @ v)), {}),
    "einsum, one head of keys": (einsums("bthd,bsd->bhts", "bhts,bsd->bthd", q=("q", (H, D)), k=("k1", (D,)), v=("v1", (D,))), ONE),
    "einsum, one head of keys, turned": (
        einsums("bthd,bsd->bths", "bths,bsd->bthd", q=("q", (H, D)), k=("k1", (D,)), v=("v1", (D,))),
        {"heads": T, "shared": 1},  # where the length is a number, either axis can be taken for heads
    ),
    "einsum, groups": (
        einsums("btkgd,bskd->bkgts", "bkgts,bskd->btkgd", q=("q", (2, 2, D)), k=("k2", (2, D)), v=("v2", (2, D))),
        GROUPED,
    ),
    "five axes": (
        lambda s, x: (heads(s.q(x)).unflatten(1, (2, 2)) @ heads(s.k2(x), 2)[:, :, None].mT).softmax(-1) @ heads(s.v2(x), 2)[:, :, None],
        GROUPED,
    ),
    "repeat_kv": (grouped(lambda y: y[:, :, None].expand(-1, 2, 2, T, D).reshape(-1, H, T, D)), GROUPED),
    "repeat_interleave": (grouped(lambda y: y.repeat_interleave(2, 1)), GROUPED),
    "repeat": (grouped(lambda y: y[:, :, None].repeat(1, 1, 2, 1, 1).flatten(1, 2)), GROUPED),
    "concat": (grouped(lambda y: torch.cat([y[:, :, None]] * 2, 2).flatten(1, 2)), GROUPED),
    "heads side by side": (
        lambda s, x: plain(heads(s.q(x)), side_by_side(s.k2(x), s.v2(x)), side_by_side(s.v2(x), s.k2(x))),
        {},
    ),
    "keys cast": (operands(lambda q, k, v: out((q @ k.double().mT.float()).softmax(-1) @ v)), {}),
    "heads tiled": (grouped(lambda y: y.repeat(1, 2, 1, 1)), {}),  # head h reads h % 2: no neighbours, so they stay repeated
    "one head expanded": (
        lambda s, x: plain(heads(s.q(x)), *(heads(y, 1).expand(-1, H, -1, -1) for y in (s.k1(x), s.v1(x)))),
        ONE,
    ),
    "one head broadcast": (lambda s, x: plain(heads(s.q(x)), heads(s.k1(x), 1), heads(s.v1(x), 1)), ONE),
    "keys alone repeated": (lambda s, x: plain(heads(s.q(x)), heads(s.k2(x), 2).repeat_interleave(2, 1), heads(s.v(x))), {}),
    "bmm": (flat(lambda s, x, q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)), {}),
    "baddbmm": (
        flat(lambda s, x, q, k, v: torch.bmm(torch.baddbmm(s.square[None], q, k.mT, alpha=0.25).softmax(-1), v)),
        {**added, "scale": 0.25},
    ),
    "bloom": (flat(bloom), {"scale": 0.25, "mask": SQUARE, "bias": ("batch", H, "time", "keys")}),
    "keys permuted": (lambda s, x: out((heads(s.q(x)) @ s.k(x).view(-1, T, H, D).permute(0, 2, 3, 1)).softmax(-1) @ heads(s.v(x))), {}),
    "longer keys": (operands(lambda q, k, v: plain(q, torch.cat([k, q], 2), torch.cat([v, k], 2))), {}),
    "fewer keys": (operands(lambda q, k, v: plain(q, k[:, :, :3], v[:, :, :3])), {}),
    "one query": (operands(lambda q, k, v: plain(q[:, :, :1], k, v)), {}),
    "scores transposed": (operands(lambda q, k, v: out((k @ q.mT).mT.softmax(-1) @ v)), {}),
    "softmax over rows": (operands(lambda q, k, v: out((k @ q.mT).softmax(-2).mT @ v)), {}),
    "values on the left": (operands(lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).mT), {}),
    "packed, chunk": (lambda s, x: plain(*map(heads, s.packed(x).chunk(3, -1))), {}),
    "packed, split": (lambda s, x: plain(*map(heads, s.packed(x).split(E, -1))), {}),
    "packed, slice": (lambda s, x: plain(*(heads(s.packed(x)[..., i * E : (i + 1) * E]) for i in range(3))), {}),
    "packed, unbind": (lambda s, x: plain(*s.packed(x).reshape(-1, T, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)), {}),
    "MultiheadAttention": (lambda s, x: s.mha(x, x, x, need_weights=True)[0], SCALED),
    "MultiheadAttention, mask": (lambda s, x: s.mha(x, x, x, need_weights=True, attn_mask=s.square)[0], {**SCALED, **added}),
    "MultiheadAttention, padding": (
        lambda s, x: s.mha(x, x, x, need_weights=True, key_padding_mask=~seen(x)[:, 0, 0])[0],
        {**SCALED, **hides, "empty": "nan"},
    ),
    "TransformerEncoderLayer": (lambda s, x: s.layer(x), SCALED),
    "no heads": (lambda s, x: (s.q(x) @ s.k(x).mT).softmax(-1) @ s.v(x), {"heads": 1, "shared": 1, "key": E, "width": E}),
    "no batch": (lambda s, x: (s.q(x[0]) @ s.k(x[0]).mT).softmax(-1) @ s.v(x[0]), {"heads": 1, "shared": 1, "key": E, "width": E}),
    "a pool": (
        lambda s, x: torch.einsum("bs,bsd->bd", torch.einsum("bd,bsd->bs", s.q(x[:, 0]), s.k(x)).softmax(-1), s.v(x)),
        {"heads": 1, "shared": 1, "key": E, "width": E},
    ),
    "sdpa": (sdpa(), SCALED),
    "sdpa, causal": (sdpa(is_causal=True, scale=0.25), {"scale": 0.25, "causal": True}),
    "sdpa, stored": (sdpa(attn_mask=CAUSAL), {**SCALED, **added, "boolean": True}),
    "sdpa, boolean": (
        lambda s, x: out(F.scaled_dot_product_attention(*map(heads, linears(s, x)), attn_mask=seen(x))),
        {**SCALED, **hides, "empty": "zero"},
    ),
    "sdpa, added": (
        lambda s, x: out(F.scaled_dot_product_attention(*map(heads, linears(s, x)), attn_mask=torch.where(seen(x), 0.0, LOWEST))),
        {**SCALED, "mask": KEYS},
    ),
    "sdpa, groups": (
        grouped(lambda y: y, lambda q, k, v: out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))),
        {**SCALED, **GROUPED},
    ),
    "sdpa, repeated": (
        grouped(lambda y: y.repeat_interleave(2, 1), lambda q, k, v: out(F.scaled_dot_product_attention(q, k, v))),
        {**SCALED, **GROUPED},
    ),
    "sdpa, no heads": (
        lambda s, x: F.scaled_dot_product_attention(*linears(s, x)),
        {"heads": 1, "shared": 1, "key": E, "width": E, "scale": E**-0.5},
    ),
}
