"""A plan step by step in plain torch: the form that the kernel must match."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewriter.backends.kernels.heads import Heads
from rewriter.backends.kernels.pack import stored_as
from rewriter.backends.kernels.plan import SCRATCH, ZERO, Copy, Ending, Plan, Product, X, Y
from rewriter.backends.kernels.recurrences import Sizes
from rewriter.packing import scaled
from rewriter.quantised import rounded

ACTIVATED: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu-tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def run(plan: Plan, x: Tensor, weights: str = "float32", skip: Tensor | None = None) -> Tensor:
    """(..., inputs) -> (..., outputs); `weights`: in which of the kernel's formats, rounded as there; skip (..., outputs) if added."""
    rows = x.reshape(-1, plan.inputs)
    areas = {X: rows, Y: rows.new_full((len(rows), plan.outputs), torch.nan), SCRATCH: rows.new_full((len(rows), plan.scratch), torch.nan)}
    for step in plan.steps:
        if isinstance(step, Product):
            _product(step, areas, weights)
        elif isinstance(step, Copy):
            source, target = step.pairs.long().unbind(1)
            values = areas[step.source][:, source.clamp_min(0)]
            areas[step.target][:, target] = values.masked_fill(source == ZERO, 0)
        else:
            areas[Y] = finished(step.ending, areas[Y], None if skip is None else skip.reshape(-1, plan.outputs))
    made: Tensor = areas[Y].unflatten(0, x.shape[:-1])
    return made


def _product(step: Product, areas: dict[int, Tensor], weights: str) -> None:
    stored = _stored(step, stored_as(step, weights))
    k, q, _ = stored.shape
    i = torch.arange(q)
    places = i // step.run * step.jump + i % step.run * step.step
    read = (step.first + torch.arange(k)[:, None] * step.block + places).flatten()[: step.valid]
    source = areas[step.source].new_zeros(len(areas[X]), k * q)
    source[:, : step.valid] = areas[step.source][:, read]
    made = torch.einsum("tkq,kqp->tkp", _multiplied(source.unflatten(1, (k, q)), stored_as(step, weights)), stored).flatten(1)
    areas[step.target][:, step.at : step.at + step.width] = finished(step.ending, made[:, : step.width])


def _stored(step: Product, weights: str) -> Tensor:
    """(k, q, p) as the format rounds it."""
    weight = step.weight.float()
    if step.scale is not None:
        weight = scaled(weight, step.scale)
    elif weights == "bfloat16":
        weight = weight.bfloat16().float()
    elif weights != "float32":
        integers, scale = rounded(weight)
        weight = integers * scale
    if step.pattern is None:
        return weight
    return weight.new_zeros(1, step.valid, weight.shape[2]).scatter(1, step.pattern.rows[None], weight)


def _multiplied(x: Tensor, weights: str) -> Tensor:
    """(rows, k, q) as a format multiplies them: int8 rounds each row of each block to 256 steps between its least and its largest."""
    if weights == "bfloat16":
        return x.bfloat16().float()
    if weights not in ("int8", "int4"):
        return x
    low, high = x.amin(2, keepdim=True).clamp_max(0), x.amax(2, keepdim=True).clamp_min(0)
    scale = (high - low) * torch.tensor(1 / 255)
    scale = torch.where(scale > 0, scale, 1.0)
    zero = (-low * (1 / scale)).round()
    return (((x * (1 / scale)).round() + zero).clamp(0, 255) - zero) * scale


def finished(ending: Ending, y: Tensor, skip: Tensor | None = None) -> Tensor:
    """activation(y + bias) + skip, normalised."""
    y = ACTIVATED[ending.activation](y if ending.bias is None else y + ending.bias)
    if ending.skip:
        assert skip is not None
        y = y + skip
    norm = ending.norm
    return y if norm is None else torch.nn.functional.layer_norm(y, y.shape[-1:], norm.gamma, norm.beta, norm.epsilon)


def recurrence(of: Sizes, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What the kernel of recurrences gives, one token and one head after the other: output (batch, time, ...) and state."""
    given = list(inputs)
    if of.kind == 0:
        decay, drive = given[:2]
        h, rows = given[-1] if of.carried else torch.zeros_like(drive[:, 0]), []
        for t in range(drive.shape[1]):
            h = decay[:, t] * h + drive[:, t]
            rows.append((h.unflatten(1, (of.heads, of.width)) @ given[2][:, t, :, None]).squeeze(-1) if of.read else h)
        return torch.stack(rows, 1), h
    batch, time = given[0].shape[:2]
    q = given.pop(0).view(batch, time, of.queries, of.key) * of.scale
    k = given.pop(0).view(batch, time, of.factors, of.keys, of.key)
    v = given.pop(0).view(batch, time, of.factors, of.heads, of.width)
    g = given.pop(0) if of.decay and not of.stored else torch.zeros(batch, time, 1)
    beta = given.pop(0).view(batch, time, of.factors, of.heads) if of.delta else None
    s = given.pop(0).clone() if of.carried else torch.zeros(batch, of.heads, of.key, of.width)
    g = given.pop(0).expand(batch, time, -1) if of.stored else g
    g = g.unflatten(2, (of.heads, -1)) if of.decay else g[..., None]
    group = max(1, of.queries // of.heads)
    out = torch.zeros(batch, time, of.heads, group, of.width)
    for b, t, head in itertools.product(range(batch), range(time), range(of.heads)):
        s[b, head] *= g[b, t, head if of.decay else 0, :, None].exp()
        for j in range(of.factors):
            key, write = k[b, t, j, head * of.keys // of.heads], v[b, t, j, head]
            if beta is not None:
                write = beta[b, t, j, head] * (write - key @ s[b, head])
            s[b, head] += torch.outer(key, write)
        for n in range(group):
            out[b, t, head, n] = q[b, t, head * group + n if of.queries >= of.heads else head * of.queries // of.heads] @ s[b, head]
    return out.flatten(2), s


def attention(of: Heads, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """What the kernel of attention gives, of tensors (batch, heads, time, width)."""
    key, value = (x.repeat_interleave(of.heads // of.shared, 1) for x in (key, value))
    scores = of.scale * query @ key.mT + mask
    if of.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ value
