"""A recurrence as the kernel takes it: sizes and flags, and which input is which (see src/recurrence.hpp).

Entry by entry: RG-LRU, Mamba's selective scan. Matrix states: linear attention, retention, delta rules, products of Householder factors.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from rewriter.backends.kernels.plan import NotCovered
from rewriter.backends.kernels.structs import AbstractStruct
from rewriter.operator import AbstractOperator, flatten

KINDS = ("DiagonalRecurrence", "LinearAttention", "Retention")
RULES = ("plain", "delta")
DECAYS = ("", "head", "key")  # as the kernel numbers them
LARGEST = 1 << 62  # of what the struct holds


@dataclass(frozen=True)
class Sizes(AbstractStruct):
    """The kernel's struct Recurrence, field for field."""

    order = ("kind", "heads", "key", "width", "queries", "keys", "factors", "delta", "decay", "stored", "read", "carried")
    kind: int  # 0: entries, 1: matrices
    heads: int
    width: int
    key: int = 1
    queries: int = 1
    keys: int = 1
    factors: int = 1
    delta: int = 0
    decay: int = 0  # of DECAYS
    stored: int = 0  # the decay is a constant, the last input
    read: int = 0  # by a query
    carried: int = 0  # the state is an input
    scale: float = 1.0


def sizes_of(operator: AbstractOperator) -> Sizes:
    """NotCovered where the kernel has nothing for such a map. Operators are known by name, as in a file's spec."""
    name = type(operator).__name__
    fields: dict[str, Any] = json.loads(flatten(operator)[1])["fields"]
    if name not in KINDS:
        raise NotCovered(f"there is no kernel for {name}")
    if not all(_readable(key, value) for key, value in fields.items()):
        raise NotCovered(f"its spec holds what is none of {name}'s")
    if name == "DiagonalRecurrence":
        return Sizes(0, fields["rows"], fields["width"], read=fields["read"], carried=fields["carried"])
    same = {f.name: fields[f.name] for f in dataclasses.fields(Sizes) if f.name in fields}
    delta, stored = fields["rule"] == "delta", name == "Retention"
    return Sizes(1, **{**same, "decay": DECAYS.index(fields["decay"]), "delta": delta, "stored": stored})


def _readable(field: str, value: object) -> bool:
    """Whether a field of a spec, which may say anything, is one that the struct holds."""
    match field:
        case "rule":
            return value in RULES
        case "decay":
            return value in DECAYS
        case "scale":
            return isinstance(value, int | float)
        case "rates":
            return True
        case _:
            return isinstance(value, int) and abs(value) <= LARGEST
