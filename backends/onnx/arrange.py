"""Lazy layout: a value's features may lie in any order until an operator needs them in one.

A shuffle only renames: it re-orders axes that nobody has moved yet. What a product then asks for is one Reshape, Transpose, Reshape at
most, however many words stand between two products. Leading axes keep their order and all but the last keep their place, so a Reshape has
one unknown size at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import onnx_ir as ir
from onnx_ir.tape import Tape


@dataclass(frozen=True, eq=False)
class Axis:
    """One factor of a shape; None where the size is dynamic. Two axes of one size are two axes."""

    size: int | None


Group = tuple[Axis, ...]  # axes that lie in one dimension of a tensor, the last one fastest


@dataclass(frozen=True)
class Arranged:
    """A tensor whose dimensions are `groups`, read as (leading…, features)."""

    value: ir.Value
    groups: tuple[Group, ...]
    leading: Group
    features: Group  # in the order in which they count

    @property
    def width(self) -> int:
        return width(self.features)


def width(axes: Sequence[Axis]) -> int:
    """The numbers along features."""
    return prod(axis.size or 0 for axis in axes)


def plain(value: ir.Value, leading: Group, features: int) -> Arranged:
    """Features last, in order."""
    axis = Axis(features)
    return Arranged(value, (*((a,) for a in leading), (axis,)), leading, (axis,))


def split(tape: Tape, x: Arranged, k: int) -> tuple[Arranged, Group, Group]:
    """The same value, its features as (k, rest). An axis across the border is cut; where it cannot be, x is settled first."""
    done, head = 1, list[Axis]()
    for axis in x.features:
        size = axis.size or 0
        if done == k:
            break
        if k % done == 0 and size % (k // done) == 0 and size > k // done:
            first, second = Axis(k // done), Axis(size // (k // done))
            cut = _cut(x, axis, (first, second))
            head.append(first)
            return cut, tuple(head), cut.features[len(head) :]
        done *= size
        head.append(axis)
    if done == k:
        return x, tuple(head), x.features[len(head) :]
    return split(tape, settled(tape, x), k)


def _cut(x: Arranged, axis: Axis, parts: Group) -> Arranged:
    def within(group: Group) -> Group:
        return tuple(part for a in group for part in (parts if a is axis else (a,)))

    return replace(x, groups=tuple(map(within, x.groups)), features=within(x.features))


def settled(tape: Tape, x: Arranged) -> Arranged:
    """The features last, as one axis in order."""
    lying = arrange(tape, x, (*((a,) for a in x.leading), x.features))
    return plain(lying.value, x.leading, x.width)


def arrange(tape: Tape, x: Arranged, groups: tuple[Group, ...]) -> Arranged:
    """The same value with these dimensions."""
    have, want = _flat(x.groups), _flat(groups)
    value, lying = x.value, x.groups
    if have != want:
        units = _units(have, want, x.leading)
        value, lying = _reshape(tape, value, lying, tuple(units)), tuple(units)
        ordered = sorted(units, key=lambda unit: want.index(unit[0]))
        value = tape.op("Transpose", [value], {"perm": [units.index(unit) for unit in ordered]})
        lying = tuple(ordered)
    return replace(x, value=_reshape(tape, value, lying, groups), groups=groups)


def _flat(groups: tuple[Group, ...]) -> list[Axis]:
    return [axis for group in groups for axis in group]


def _units(have: list[Axis], want: list[Axis], leading: Group) -> list[Group]:
    """The longest runs that stay together; leading axes stay alone, for a Reshape could not part them again."""
    units: list[list[Axis]] = []
    for axis in have:
        last = units[-1][-1] if units else None
        joins = last is not None and last not in leading and axis not in leading and want.index(axis) == want.index(last) + 1
        if joins:
            units[-1].append(axis)
        else:
            units.append([axis])
    return [tuple(unit) for unit in units]


def _reshape(tape: Tape, value: ir.Value, have: tuple[Group, ...], want: tuple[Group, ...]) -> ir.Value:
    if have == want:
        return value
    sizes = []
    for i, group in enumerate(want):
        dynamic = any(axis.size is None for axis in group)
        kept = dynamic and i < len(have) and have[i] == group
        sizes.append(0 if kept else -1 if dynamic else width(group))
    assert sizes.count(-1) <= 1, "only the last leading axis ever moves"
    return tape.op("Reshape", [value, tape.op("Constant", [], {"value_ints": sizes})])
