"""What transformers, fla and mamba_ssm call a recurrence, each said as an operator with its surroundings in plain torch.

A reading takes the function's own arguments and `recur`, which runs the recurrence: an oracle while the reading is verified, one opaque
node while a model is traced. Normalised keys, step sizes and skips are spelled around it; the scale is the operator's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64  # of functions that name none
LINEAR, DIAGONAL = "LinearAttention", "DiagonalRecurrence"


class Recur(Protocol):
    def __call__(self, kind: str, fields: Mapping[str, Any], xs: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """(output, last state) of the operator of this name and these fields on its sequences, from a state or from zero."""
        ...


@dataclass(frozen=True)
class Known:
    """How a function is read, and what its arguments are: sequences by their time axis, laws of those that are no plain normals."""

    reading: Callable[..., Any]
    axes: Mapping[str, int]
    laws: Mapping[str, str] = field(default_factory=dict)  # of raising.draw
    state: str = ""  # the argument that holds the first state
    last: str = ""  # the argument that asks for the last one
    alone: str = "its number of chunks is fixed, and other lengths fail or give wrong results"  # where it is exported as it is


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _delta_rule(
    recur: Recur, query: Tensor, key: Tensor, value: Tensor, g: Tensor | None = None, beta: Tensor | None = None,
    scale: float | None = None, initial_state: Tensor | None = None, output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False, num_householder: int = 1, **_: Any,
) -> Any:  # fmt: skip
    """query (batch, time, keys, key), key the same, value (batch, time, heads, width), g and beta (batch, time, heads); Kimi's g is
    (batch, time, heads, key), DeltaProduct's keys, values and betas have num_householder rows for each of query's."""
    (heads, width), (keys, size), rows = value.shape[-2:], key.shape[-2:], query.shape[:2]
    assert beta is not None
    dtype, query, key = query.dtype, query.float(), key.float()
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    xs = [x.float().reshape(*rows, -1) for x in (query, key, value, *([] if g is None else [g]), beta)]
    fields = {
        "heads": heads, "key": size, "width": width, "queries": query.shape[-2], "keys": keys, "factors": num_householder,
        "rule": "delta", "decay": "" if g is None else {3: "head", 4: "key"}[g.dim()], "scale": size**-0.5 if scale is None else scale,
    }  # fmt: skip
    out, state = recur(LINEAR, fields, xs, initial_state)
    return out.unflatten(-1, (-1, width)).to(dtype), state if output_final_state else None


def _chunk_scan(
    recur: Recur, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")), return_final_states: bool = False, **_: Any,
) -> Any:  # fmt: skip
    """Mamba-2: hidden_states (batch, time, heads, width), dt (batch, time, heads), A and D (heads,), B and C (batch, time, groups, key);
    its states are (batch, heads, width, key)."""
    assert z is None, "a gate inside the scan"
    (heads, width), (groups, size) = hidden_states.shape[-2:], B.shape[-2:]
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    dt = torch.clamp(F.softplus(dt) if dt_softplus else dt, dt_limit[0], dt_limit[1]).float()
    x = hidden_states.float()
    fields = {"heads": heads, "key": size, "width": width, "queries": groups, "keys": groups, "rule": "plain", "decay": "head"}
    first = None if initial_states is None else initial_states.transpose(-1, -2)
    out, state = recur(LINEAR, fields, [C.float().flatten(2), B.float().flatten(2), (x * dt[..., None]).flatten(2), dt * A], first)
    out = out.unflatten(-1, (heads, width))
    out = out if D is None else out + D[..., None] * x
    return (out, state.transpose(-1, -2)) if return_final_states else out


def _selective_scan(
    recur: Recur, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False, **_: Any,
) -> Any:  # fmt: skip
    """Mamba: hidden_states, dt and z (batch, inner, time), A (inner, key), B and C (batch, key, time), D (inner,); `key` states to a
    channel, and all channels share B and C."""
    inner, size = A.shape
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    dt = (F.softplus(dt) if delta_softplus else dt).transpose(1, 2).float()[..., None]
    x = hidden_states.transpose(1, 2).float()[..., None]
    drive = dt * x * B.transpose(1, 2).float()[:, :, None]
    fields = {"rows": inner, "width": size, "read": True}
    out, state = recur(DIAGONAL, fields, [(dt * A).exp().flatten(2), drive.flatten(2), C.transpose(1, 2).float()], None)
    out = out.transpose(1, 2).to(hidden_states.dtype)
    out = out if D is None else out + hidden_states * D[:, None]
    out = out if z is None else out * F.silu(z)
    return (out, state.unflatten(-1, (inner, size))) if return_last_state else out


def _rg_lru(
    recur: Recur, hidden_states: Tensor, recurrent_gate: Tensor, reset: Tensor, recurrent_states: Tensor | None = None, **_: Any
) -> Any:
    """RecurrentGemma: h_t = a_t h_{t-1} + x_t by channel, (batch, time, width); a reset forgets."""
    xs = [(recurrent_gate * ~reset).float(), hidden_states.float()]
    out, state = recur(DIAGONAL, {"rows": hidden_states.shape[-1]}, xs, recurrent_states)
    return out.to(hidden_states.dtype), state


_LOOP = "its loop over the tokens fixes the length"
_DELTA = Known(
    _delta_rule,
    dict.fromkeys(("query", "key", "value", "g", "beta"), 1),
    {"key": "unit", "g": "decay", "beta": "gate"},
    "initial_state",
    "output_final_state",
)
_MAMBA2 = Known(
    _chunk_scan, dict.fromkeys(("hidden_states", "dt", "B", "C"), 1), {"A": "decay", "dt": "step"}, "initial_states", "return_final_states"
)
_MAMBA = Known(
    _selective_scan, dict.fromkeys(("hidden_states", "dt", "B", "C", "z"), 2), {"A": "decay", "dt": "step"}, "", "return_last_state", _LOOP
)
_GRIFFIN = Known(
    _rg_lru, dict.fromkeys(("hidden_states", "recurrent_gate", "reset"), 1), {"recurrent_gate": "gate"}, "recurrent_states", "", _LOOP
)

_NAMES = (
    ("torch_chunk_gated_delta_rule chunk_gated_delta_rule chunk_delta_rule chunk_gated_delta_product", _DELTA),
    ("chunk_kimi_delta_attention chunk_kda", _DELTA),
    ("torch_recurrent_gated_delta_rule fused_recurrent_gated_delta_rule", replace(_DELTA, alone=_LOOP)),
    ("fused_recurrent_delta_rule recurrent_kimi_delta_attention fused_recurrent_kda", replace(_DELTA, alone=_LOOP)),
    ("mamba2_chunk_scan mamba_chunk_scan_combined", _MAMBA2),
    ("mamba_selective_scan selective_scan_fn", _MAMBA),
    ("_rnn_scan", _GRIFFIN),
)
KNOWN: Mapping[str, Known] = {name: known for names, known in _NAMES for name in names.split()}
SPELLINGS = {"q": "query", "k": "key", "v": "value", "x": "hidden_states", "u": "hidden_states", "delta": "dt"}  # fla's and mamba_ssm's

LISTED: Mapping[str, str] = {  # classes and functions that hold a recurrence which is not raised, and why
    "rwkv_linear_attention": "its state keeps a running maximum, which is not linear",
    "mlstm_chunkwise_fw": "its state keeps a running maximum, which is not linear",
    "MiniMaxLightningAttention": "it stands inside forward, in no function of its own",
}
