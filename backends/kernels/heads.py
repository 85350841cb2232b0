"""Softmax attention as the kernel takes it: sizes and flags, and how its tensors lie (see src/attention.hpp)."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rewriter.backends.kernels.plan import NotCovered
from rewriter.backends.kernels.structs import AbstractStruct
from rewriter.operator import AbstractOperator, flatten

KIND = "Attention"
TENSORS = ("query", "key", "value", "output")  # by whose places `turned` counts
LARGEST = 1 << 31


@dataclass(frozen=True)
class Heads(AbstractStruct):
    """The kernel's struct Attention, field for field."""

    order = ("heads", "shared", "key", "width", "causal", "zero", "turned")
    heads: int
    shared: int
    key: int
    width: int
    scale: float
    causal: bool = False
    zero: bool = False  # what queries that see no key become: 0, else NaN
    turned: int = 0  # bit by tensor: (batch, time, heads, width) rather than (batch, heads, time, width)

    def is_turned(self, tensor: str) -> bool:
        """Whether it is (batch, time, heads, width)."""
        return bool(self.turned >> TENSORS.index(tensor) & 1)

    def shape(self, tensor: str, batch: int, time: int) -> tuple[int, int, int, int]:
        """As it lies."""
        heads = self.shared if tensor in ("key", "value") else self.heads
        width = self.key if tensor in ("query", "key") else self.width
        return (batch, time, heads, width) if self.is_turned(tensor) else (batch, heads, time, width)


def heads_of(operator: AbstractOperator) -> Heads:
    """NotCovered where a spec, which may say anything, is none of an attention's."""
    fields: dict[str, Any] = json.loads(flatten(operator)[1])["fields"]
    counts = {name: fields[name] for name in ("heads", "shared", "key", "width")}
    whole = all(isinstance(n, int) and 0 < n < LARGEST for n in counts.values())
    numbers = all(isinstance(fields[name], int | float) for name in ("scale", "hidden"))
    if not whole or not numbers or not math.isfinite(fields["scale"]) or fields["empty"] not in ("", "nan", "zero"):
        raise NotCovered("its spec holds what is none of Attention's")
    return Heads(**counts, scale=float(fields["scale"]), causal=bool(fields["causal"]), zero=fields["empty"] == "zero")


def call(sizes: Heads, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor) -> bytes:
    """The kernel's struct Attended: contiguous float32 tensors as the sizes say, a mask of four axes that broadcasts."""
    time, keys = (x.shape[1 if sizes.is_turned(name) else 2] for x, name in ((query, "query"), (key, "key")))
    strides = [0 if mask is None or mask.shape[axis] == 1 else mask.stride(axis) for axis in range(4)]
    pointers = [x.data_ptr() for x in (query, key, value)] + [0 if mask is None else mask.data_ptr()]
    return struct.pack("3q4P4qP", len(query), time, keys, *pointers, *strides, out.data_ptr())
