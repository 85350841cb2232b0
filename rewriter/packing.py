"""Small numbers in a few bits each. Which n of every m neighbours are kept: 2 bits where m <= 4, 4 where m <= 16, else a byte. And whole
numbers of 4 bits, two a byte.

Position r of a column stands in byte r // k, at bit (r % k) bits, k = 8 // bits; a last byte that is not full ends in zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bits(m: int) -> int:
    """Of one position. Raises ValueError beyond groups of 256, whose positions no byte holds."""
    if not 1 < m <= 256:
        raise ValueError(f"groups of {m}: positions in 2 to 256 can be packed; take smaller groups")
    return 2 if m <= 4 else 4 if m <= 16 else 8


def pack(positions: Tensor, m: int) -> Tensor:
    """(rows, columns) integers in 0..m-1 -> (ceil(rows / k), columns) uint8."""
    each = 8 // bits(m)
    padded = torch.nn.functional.pad(positions.long(), (0, 0, 0, -len(positions) % each)).unflatten(0, (-1, each))
    shifts = torch.arange(0, 8, bits(m))[:, None]
    packed: Tensor = (padded << shifts).sum(1).to(torch.uint8)
    return packed


def unpack(packed: Tensor, rows: int, m: int) -> Tensor:
    """The inverse of `pack`, (rows, columns) int64."""
    width = bits(m)
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)[:, None]
    positions: Tensor = ((packed[:, None] >> shifts) & (2**width - 1)).flatten(0, 1)
    return positions[:rows].long()


def pack_nibbles(values: Tensor) -> Tensor:
    """(..., 2 q, p) whole numbers in -8..7 -> (..., q, p) uint8: row 2 i in the lower half, row 2 i + 1 in the upper, each with 8 added."""
    low, high = (values.to(torch.uint8) + 8).unflatten(-2, (-1, 2)).unbind(-2)
    packed: Tensor = (low & 15) | (high << 4)
    return packed


def nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`, int8."""
    halves: Tensor = torch.stack([packed & 15, packed >> 4], -2).flatten(-3, -2)
    return halves.to(torch.int8) - 8


def scaled(values: Tensor, scales: Tensor) -> Tensor:
    """Whole numbers (..., q, p) times scales (..., g, p), each for q / g neighbouring rows."""
    groups = scales.shape[-2]
    made: Tensor = values * scales if groups == 1 else (values.unflatten(-2, (groups, -1)) * scales.unsqueeze(-2)).flatten(-3, -2)
    return made
