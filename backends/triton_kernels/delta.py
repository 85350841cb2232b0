"""Recurrences of matrix states in chunks: what of them the kernels take, and their launch. The equations stand in delta_kernels.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.backends.kernels.plan import NotCovered
from rewriter.backends.kernels.recurrences import DECAYS, Sizes, sizes_of
from rewriter.backends.triton_kernels.device import OPTIONS, chosen, interpreted, kernels
from rewriter.errors import RewriteError
from rewriter.operator import AbstractOperator

LARGEST_KEY = 256  # of a state that stays on chip, a tile of its columns at a time
LEAST, MOST = 16, 64  # sub-steps of a chunk; the least that tensor cores multiply
COLUMNS = 32  # of a tile of the state
WIDE = 128  # a key beyond it leaves registers for half the sub-steps and half the columns
HALVES = (torch.float16, torch.bfloat16)


def covered(operator: AbstractOperator) -> Sizes:
    """What the kernels are to do for a recurrence; NotCovered where they have nothing for it."""
    of = sizes_of(operator)
    if of.kind != 1:
        raise NotCovered("recurrences entry by entry have no kernel for a GPU")
    if DECAYS[of.decay] == "key":
        raise NotCovered("a decay for each entry of the key has no kernel for a GPU")
    if min(of.heads, of.key, of.width, of.queries, of.keys, of.factors) < 1 or of.heads % of.keys or _apart(of) or of.stored > of.decay:
        raise NotCovered("its sizes do not fit together")
    if of.key > LARGEST_KEY:
        raise NotCovered(f"keys of {of.key} numbers; kernels for a GPU keep states of up to {LARGEST_KEY} on chip")
    return of


def _apart(of: Sizes) -> int:
    return of.heads % of.queries if of.queries < of.heads else of.queries % of.heads


def shapes(of: Sizes, batch: int, time: int) -> list[tuple[int, ...]]:
    """Of each input, in order."""
    found: list[tuple[int, ...]] = [(batch, time, of.queries * of.key), (batch, time, of.factors * of.keys * of.key)]
    found.append((batch, time, of.factors * of.heads * of.width))
    found += [(batch, time, of.heads)] if of.decay and not of.stored else []
    found += [(batch, time, of.factors * of.heads)] if of.delta else []
    found += [(batch, of.heads, of.key, of.width)] if of.carried else []
    return found + ([(of.heads,)] if of.stored else [])


def chunk_of(of: Sizes, time: int, dtype: torch.dtype) -> int:
    """Sub-steps of one: a power of two, no more than there are, fewer where the chip holds fewer or all is done in float32."""
    most = LEAST if interpreted() else MOST // 2 if of.key > WIDE or dtype == torch.float32 else MOST
    return min(max(LEAST, 1 << (of.factors * time - 1).bit_length()), most)


def run(of: Sizes, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output (batch, time, ...) and state, of inputs and stored rates in the order of `shapes`, of one dtype."""
    batch, time = inputs[0].shape[:2] if inputs and inputs[0].dim() == 3 else (0, 0)
    wanted, found = shapes(of, batch, time), [tuple(x.shape) for x in inputs]
    if found != wanted or len({(x.dtype, x.device) for x in inputs}) != 1 or inputs[0].dtype not in (torch.float32, *HALVES):
        dtypes = sorted({f"{x.dtype} on {x.device}" for x in inputs})
        raise RewriteError(f"the kernel takes inputs {wanted} of one dtype up to 32 bits on one device, not {found}, {', '.join(dtypes)}")
    out = inputs[0].new_empty(batch, time, of.heads * max(1, of.queries // of.heads) * of.width)
    after = inputs[0].new_empty(batch, of.heads, of.key, of.width)
    if batch:
        with chosen(inputs[0]):
            _launch(of, [x.contiguous() for x in inputs], out, after)
    return [out, after]


def _launch(of: Sizes, inputs: Sequence[Tensor], out: Tensor, after: Tensor) -> None:
    module, given, (batch, time) = kernels("delta_kernels"), list(inputs), out.shape[:2]
    q, k, v = given.pop(0), given.pop(0), given.pop(0)
    g = given.pop(-1 if of.stored else 0) if of.decay else None
    beta = given.pop(0) if of.delta else None
    before = given.pop(0) if of.carried else None
    stride = (time * of.heads, of.heads) if of.decay and not of.stored else (0, 0)
    size, group, half = chunk_of(of, time, q.dtype), max(1, of.queries // of.heads), q.dtype in HALVES
    chunks, width = -(-time * of.factors // size), max(LEAST, 1 << (of.key - 1).bit_length())
    square = (chunks, size, size)
    attention = q.new_empty(batch, of.heads, group, *square, dtype=torch.float32)
    inverse = q.new_empty(batch, of.heads, *square, dtype=torch.float32) if of.delta else None
    flags: dict[str, Any] = {"DECAY": g is not None, "DELTA": beta is not None, "GROUP": group, "CHUNK": size, "BLOCK_K": width}
    flags["OPERAND"] = module.tl.float32 if interpreted() else getattr(module.tl, str(q.dtype).removeprefix("torch."))
    heads = (of.heads, of.queries, of.keys, of.key)
    if chunks:
        module.within[(chunks * batch * of.heads,)](
            q, k, g, beta, attention, inverse, time, chunks, *heads, of.factors, *stride, of.scale, **flags,
            LEVELS=size.bit_length() - 1, EXACT="tf32x3" if half else "ieee", num_warps=4, **OPTIONS,
        )  # fmt: skip
    columns = COLUMNS // 2 if of.key > WIDE else COLUMNS
    module.across[(batch * of.heads, -(-of.width // columns))](
        q, k, v, g, attention, inverse, before, out, after, time, chunks, *heads, of.width, of.factors, *stride, of.scale, **flags,
        BLOCK_V=columns, ROUGH="tf32" if half else "ieee", num_warps=4, num_stages=1, **OPTIONS,
    )  # fmt: skip
