"""Operands before what is computed from them, without recursion: chains may be thousands long, and values reached in many ways."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def in_order(value: T, operands: Callable[[T], Iterable[T]], known: Container[T] = ()) -> list[T]:
    """The value behind all that it is computed from, each once, without the known."""
    found, stack = dict[T, None](), [] if value in known else [value]
    while stack:
        missing = [] if stack[-1] in found else [v for v in operands(stack[-1]) if v not in found and v not in known]
        if missing:
            stack += reversed(missing)
        else:
            found[stack.pop()] = None
    return list(found)
