"""Where axes go. An axis is a product of atoms, the last one fastest; a transpose moves axes, a reshape joins and cuts them, an expansion
puts an atom where there was an axis of length 1. So every spelling of a product's operands is one value with its atoms in some order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

from rewriter.graph import Graph, Layout, Node, Value

Size = int | str  # a name where it varies


@dataclass(frozen=True, eq=False)
class Atom:
    """One factor of a shape. Two atoms of one size are two atoms."""

    size: Size


Group = tuple[Atom, ...]
Axes = tuple[Group, ...]  # an axis of length 1 has none


def fresh(sizes: Sequence[Size]) -> Axes:
    """A new atom for each axis."""
    return tuple(() if n == 1 else (Atom(n),) for n in sizes)


class Frame:
    """What is known of the atoms: those that turned out to be products of others."""

    def __init__(self) -> None:
        self._parts: dict[Atom, Group] = {}

    def resolve(self, group: Group) -> Group:
        """The group in atoms that were never cut."""
        found, stack = list[Atom](), list(reversed(group))
        while stack:
            atom = stack.pop()
            if atom in self._parts:
                stack += reversed(self._parts[atom])
            else:
                found.append(atom)
        return tuple(found)

    def axes(self, axes: Axes) -> Axes:
        return tuple(self.resolve(group) for group in axes)

    def cut(self, atom: Atom, sizes: Sequence[Size]) -> list[Atom]:
        parts = [Atom(n) for n in sizes]
        self._parts[atom] = tuple(parts)
        return parts

    def reshaped(self, axes: Axes, sizes: Sequence[Size]) -> Axes | None:
        """The same numbers in axes of these sizes, atoms cut where that takes it; None where it cannot be told.

        Matched from the right, then names from the left; what is left between is joined or cut. Names that differ may mean the same, as
        inference makes new ones: they are paired where there are as many on both sides.
        """
        atoms = [a for group in self.axes(axes) for a in group]
        made: list[list[Atom]] = [[] for _ in sizes]
        left = [(i, n) for i, n in enumerate(sizes) if n != 1]
        while atoms and left:
            (i, n), atom = left[-1], atoms[-1]
            m = atom.size
            if n == m or _alike([a.size for a in atoms], [size for _, size in left]):
                left.pop()
            elif not isinstance(n, int) or not isinstance(m, int):
                break
            elif m % n == 0:
                atoms[-1:] = self.cut(atom, (m // n, n))
                left.pop()
            elif n % m == 0:
                left[-1] = (i, n // m)
            else:
                return None
            made[i].insert(0, atoms.pop())
        while atoms and left and atoms[0].size == left[0][1]:
            made[left.pop(0)[0]].append(atoms.pop(0))
        return self._between(atoms, left, made)

    def _between(self, atoms: list[Atom], left: list[tuple[int, Size]], made: list[list[Atom]]) -> Axes | None:
        if len(left) == 1 and atoms:
            made[left[0][0]][:0] = atoms
        elif len(atoms) == 1 and left:
            for (i, _), part in zip(left, self.cut(atoms[0], [n for _, n in left]), strict=True):
                made[i].insert(0, part)
        elif atoms or left:
            return None
        return tuple(map(tuple, made))


def _alike(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether both end in a name, of as many."""
    names = [[n for n in side if isinstance(n, str)] for side in (a, b)]
    return isinstance(a[-1], str) and isinstance(b[-1], str) and len(names[0]) == len(names[1])


_SAME = ("cast", "identity")
_REORDERED = ("transpose", *_SAME)
_RESHAPED = ("reshape", "unsqueeze", "squeeze")
_REPEATED = ("expand", "repeat", "repeat_interleave", "concat")


def before(graph: Graph, frame: Frame, node: Node, axes: Axes) -> tuple[Value, Axes] | None:
    """The value that a node only lays out anew or repeats, and its axes, from those of the result."""
    op = graph.op(node)
    inputs = [v for v in graph.inputs(node) if v is not None]
    if not inputs:
        return None
    x, y = inputs[0], graph.outputs(node)[0]
    have, made = graph.shape(x), graph.shape(y)
    if have is None or made is None or (graph.dtype(x) != graph.dtype(y)):
        return None
    if op == "transpose":
        order = graph.attributes(node)["axes"]
        return x, tuple(axes[order.index(i)] for i in range(len(order)))
    if op in _SAME or (op in (*_RESHAPED, "slice", "expand") and have == made):
        return x, axes
    if op in _RESHAPED:
        found = frame.reshaped(axes, have)
        return None if found is None else (x, found)
    if op in _REPEATED and all(v is x for v in inputs if op == "concat"):
        found = _unrepeated(frame, op, axes, have, made)
        return None if found is None else (x, found)
    return None


def _unrepeated(frame: Frame, op: str, axes: Axes, have: Sequence[Size], made: Sequence[Size]) -> Axes | None:
    """An axis that was repeated lacks the atom of the copies: the outer one of whole copies, the inner one of each entry's."""
    found = []
    for group, n, m in zip(axes[len(axes) - len(have) :], have, made[len(made) - len(have) :], strict=True):
        if n == m or (isinstance(n, str) and isinstance(m, str)):
            found.append(group)
        elif n == 1:
            found.append(())
        elif isinstance(n, int) and isinstance(m, int):
            sizes = (n, m // n) if op == "repeat_interleave" else (m // n, n)
            cut = frame.reshaped((group,), sizes)
            if cut is None:
                return None
            found.append(cut[0 if op == "repeat_interleave" else 1])
        else:
            return None
    return tuple(found)


def after(graph: Graph, frame: Frame, node: Node, axes: Axes) -> Axes | None:
    """The axes of what a node only lays out anew, from those of its input."""
    x, y = next(v for v in graph.inputs(node) if v is not None), graph.outputs(node)[0]
    have, made, op = graph.shape(x), graph.shape(y), graph.op(node)
    if have is None or made is None or graph.dtype(x) != graph.dtype(y):
        return None
    if op == "transpose":
        return tuple(axes[i] for i in graph.attributes(node)["axes"])
    if op in _SAME or (op in (*_RESHAPED, "slice", "expand") and have == made):
        return axes
    return frame.reshaped(axes, made) if op in _RESHAPED else None


def layout(have: Axes, want: Axes) -> Layout | None:
    """How axes become others by the four steps of a Layout; None where it takes more."""
    home = {a: i for i, group in enumerate(want) for a in group}
    if sorted(map(id, home)) != sorted(id(a) for group in have for a in group):
        return None
    last = _last(have, want, home)
    if last is None:
        return None
    flat = [a for i in last for a in have[i]]
    runs = [tuple(run) for _, run in groupby(flat, key=home.__getitem__)]
    rest = [i for i in range(len(have)) if i not in last]
    empty = [j for j, group in enumerate(want) if not group]
    targets = {i: home[have[i][0]] if have[i] else empty.pop(0) for i in rest}
    if any(group != want[home[group[0]]] for group in [*runs, *(have[i] for i in rest if have[i])]):
        return None
    rest.sort(key=targets.__getitem__)
    order = [targets[i] for i in rest] + empty + [home[run[0]] for run in runs]
    spread = [1] * len(empty) + [_size(run) for run in runs]
    return _layout(have, want, rest, last, spread if len(spread) != 1 else [], order)


def _last(have: Axes, want: Axes, home: dict[Atom, int]) -> list[int] | None:
    """The axes to be joined, in order: those of one wanted group, or one that is cut; and those of length 1 that nothing wants."""
    homes = [{home[a] for a in group} for group in have]
    joined = [axes for j in range(len(want)) if len(axes := [i for i, h in enumerate(homes) if j in h]) > 1]
    cut = [[i] for i, h in enumerate(homes) if len(h) > 1 and not any(i in axes for axes in joined)]
    if len(joined) + len(cut) > 1:
        return None
    last = next(iter([*joined, *cut]), [])
    spare = len([g for g in have if not g]) - len([g for g in want if not g])
    ones = [i for i, g in enumerate(have) if not g][: max(spare, 0)]
    short = spare < 0 and not last
    if (ones or short) and not last:
        last = [max((i for i, g in enumerate(have) if g), default=len(have) - 1)]
    last = sorted(last, key=lambda i: home[have[i][0]] * len(home) + want[home[have[i][0]]].index(have[i][0]) if have[i] else -1)
    return [*ones, *last]


def _size(run: Group) -> int:
    """-1 where it varies."""
    sizes = [a.size for a in run if isinstance(a.size, int)]
    return prod(sizes) if len(sizes) == len(run) else -1


def _layout(have: Axes, want: Axes, rest: list[int], last: list[int], spread: list[int], order: list[int]) -> Layout | None:
    """`order`: the wanted axis that each one is after the spread."""
    if spread.count(-1) > 1 or sorted(order) != list(range(len(want))):
        return None
    moved = [*rest, *last]
    placed = [order.index(j) for j in range(len(want))]
    if not last:  # one permutation does it
        moved, placed = [rest[k] for k in placed], sorted(placed)
    first = () if moved == sorted(moved) else tuple(moved)
    return Layout(first, max(len(last), 1), tuple(spread), () if placed == sorted(placed) else tuple(placed))


def steps(found: Layout) -> int:
    """How many nodes it takes."""
    return bool(found.before) + (found.join > 1) + bool(found.spread) + bool(found.after)
