"""Layers around known functions, as people write them in files of their own: imported, copied, bound to the layer, or not what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

HEADS, KEYS, KEY, WIDTH = 4, 2, 8, 6
SPLIT = [KEYS * KEY, KEYS * KEY, HEADS * WIDTH, HEADS, HEADS]


def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float = 1.0, initial_state: Tensor | None = None,
    output_final_state: bool = False, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """In fla's words; queries and keys are shared by neighbouring heads."""
    q, k = (x.float().repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32) if initial_state is None else initial_state
    rows = []
    for t in range(q.shape[1]):
        state = state * g[:, t].float().exp()[..., None, None]
        error = (v[:, t].float() - (state * k[:, t].unsqueeze(-1)).sum(-2)) * beta[:, t].float().unsqueeze(-1)
        state = state + k[:, t].unsqueeze(-1) * error.unsqueeze(-2)
        rows.append((state * q[:, t].unsqueeze(-1)).sum(-2) * scale)
    return torch.stack(rows, 1).to(v.dtype), state if output_final_state else None


def chunk_gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, num_householder: int, scale: float = 1.0,
    initial_state: Tensor | None = None, output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As a delta rule over sub-steps, gated at the first and read at the last."""
    n = num_householder
    gates = torch.stack([g, *[torch.zeros_like(g)] * (n - 1)], 2).flatten(1, 2)
    out, state = fused_recurrent_gated_delta_rule(q.repeat_interleave(n, 1), k, v, gates, beta, scale, initial_state, output_final_state)
    return out[:, n - 1 :: n], state


def chunk_delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, None]:
    """Something else."""
    return v * beta.unsqueeze(-1), None


class Mixer(nn.Module):
    """Projections into one of the rules; keys of unit length."""

    def __init__(self, rule: Callable[..., Any] | None = None, **fixed: Any) -> None:
        super().__init__()
        self.project = nn.Linear(16, sum(SPLIT))
        self.out = nn.Linear(HEADS * WIDTH, 16)
        self.rule, self.fixed = rule, fixed

    def run(self, *xs: Tensor) -> Any:
        assert self.rule is not None
        return self.rule(*xs, **self.fixed)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g, beta = self.project(x).split(SPLIT, -1)
        k = nn.functional.normalize(k.unflatten(-1, (KEYS, KEY)), dim=-1)
        y, _ = self.run(q.unflatten(-1, (KEYS, KEY)), k, v.unflatten(-1, (HEADS, WIDTH)), -nn.functional.softplus(g), beta.sigmoid())
        out: Tensor = self.out(y.flatten(2))
        return out


class Imported(Mixer):
    """transformers' function in chunks of 3, seen as a global of this file."""

    def run(self, *xs: Tensor) -> Any:
        return torch_chunk_gated_delta_rule(*xs, chunk_size=3)


class Product(Mixer):
    """Two Householder factors a token."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        twice = (torch.stack([x, x.flip(-1)], 2).flatten(1, 2) for x in (k, v, beta))
        keys, values, betas = twice
        keys = keys.repeat_interleave(HEADS // KEYS, 2)
        return chunk_gated_delta_product(q.repeat_interleave(HEADS // KEYS, 2), keys, values, g, betas, num_householder=2, **self.fixed)


class Impostor(Mixer):
    def run(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        return chunk_delta_rule(q, k, v, beta)


class Packed(Mixer):
    """Sequences laid end to end, which a node does not keep apart."""

    def run(self, *xs: Tensor) -> Any:
        return fused_recurrent_gated_delta_rule(*xs, cu_seqlens=torch.tensor([0, 3]))
