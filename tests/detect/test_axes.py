"""Axes as products of atoms: layouts do what they say, reshapes are matched, cut, joined and paired, or given up."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.passes.detect.agreement import Sizes, arranged
from rewriter.passes.detect.axes import Atom, Axes, Frame, fresh, layout, steps

ATOMS = [Atom(n) for n in (2, 3, 5, 7)]
B, H, T, D = ((atom,) for atom in ATOMS)
ONE = ()


def test_a_product_of_sizes_is_that_of_its_factors() -> None:
    sizes = Sizes()
    assert sizes.of("2*batch_size*seq") == 2 * sizes.of("batch_size") * sizes.of("seq")


def tensor(axes: Axes) -> Tensor:
    """Numbers that tell where each atom went."""
    order = [ATOMS.index(a) for group in axes for a in group]
    whole = torch.arange(prod(a.size for a in ATOMS)).reshape([a.size for a in ATOMS])  # type: ignore[misc]
    part = whole[tuple(slice(None) if i in order else 0 for i in range(len(ATOMS)))]
    moved = part.permute([sorted(order).index(i) for i in order])
    return moved.reshape([prod(a.size for a in group) for group in axes])  # type: ignore[misc]


@st.composite
def arrangements(draw: st.DrawFn, atoms: list[Atom]) -> Axes:
    order, cuts = draw(st.permutations(atoms)), [draw(st.integers(0, 2)) for _ in atoms]
    axes: list[tuple[Atom, ...]] = []
    for atom, cut in zip(order, cuts, strict=True):
        if cut or not axes:
            axes += [()] * (cut - 1) + [(atom,)]  # after another, an axis of length 1 between
        else:
            axes[-1] = (*axes[-1], atom)
    return tuple(axes)


@settings(max_examples=300)
@given(have=arrangements(ATOMS), want=arrangements(ATOMS))
def test_a_layout_does_what_it_says(have: Axes, want: Axes) -> None:
    how = layout(have, want)
    if how is not None:
        assert torch.equal(arranged(tensor(have), how), tensor(want))


def test_what_attention_needs_can_be_said() -> None:
    usual = (B, H, T, D)
    assert layout(usual, usual) is not None and steps(layout(usual, usual)) == 0  # type: ignore[arg-type]
    for have in [(B, T, H, D), (B, H, D, T), (B, T, (*H, *D)), ((*B, *H), T, D), (T, B, (*H, *D)), (B, T, H, ONE, D)]:
        how = layout(have, usual)
        assert how is not None and torch.equal(arranged(tensor(have), how), tensor(usual))
    for want in [(B, T, H, D), (B, T, (*H, *D)), ((*B, *H), T, D)]:
        assert layout(usual, want) is not None
    assert layout((B, T, D), (B, ONE, T, D)) is not None
    assert layout((T, D), (ONE, T, D)) is not None


def test_what_takes_more_is_given_up() -> None:
    assert layout(((*B, *H), (*T, *D)), (B, H, T, D)) is None  # two axes to cut
    assert layout((B, H, T, D), ((*B, *T), (*H, *D))) is None  # two pairs to join
    assert layout((B, H, T), (B, H, T, D)) is None  # not the same atoms
    assert layout(((*D, *T), B, H), (B, H, (*T, *D))) is None  # an axis in another order


def sizes(frame: Frame, axes: Axes | None) -> list[list[int | str]] | None:
    return None if axes is None else [[a.size for a in group] for group in frame.axes(axes)]


def reshaped(have: list[int | str], want: list[int | str]) -> list[list[int | str]] | None:
    frame = Frame()
    return sizes(frame, frame.reshaped(fresh(have), want))


def test_reshapes() -> None:
    assert reshaped(["b", "t", 12], ["b", "t", 4, 3]) == [["b"], ["t"], [4], [3]]
    assert reshaped(["b", "t", 4, 3], ["b", "t", 12]) == [["b"], ["t"], [4, 3]]
    assert reshaped(["b", 4, "t", 3], ["4*b", "t", 3]) == [["b", 4], ["t"], [3]]
    assert reshaped(["4*b", "t", 3], ["b", 4, "t", 3]) == [["b"], [4], ["t"], [3]]
    assert reshaped(["t", "4*b", 3], ["t", "b", 12]) == [["t"], ["b"], [4, 3]]
    assert reshaped(["b", 1, "t", 3], ["b", "t", 1, 3]) == [["b"], ["t"], [], [3]]
    assert reshaped([6, 4], [2, 12]) == [[2], [3, 4]]
    assert reshaped(["b", "t", 12], ["x", "y", 4, 3]) == [["b"], ["t"], [4], [3]]  # names of inference, as many as there were
    assert reshaped(["b", 2, 2, "s", 3], ["x", 4, "y", 3]) == [["b"], [2, 2], ["s"], [3]]
    assert reshaped(["b", "t", 4], ["x", 3, "y"]) is None
    assert reshaped([6, 4], [8, 3]) is None
    assert reshaped(["a", "b", 4], ["c", "d", "e", 4]) is None


def test_a_cut_atom_is_cut_everywhere() -> None:
    frame, axes = Frame(), fresh(["4*b", "t"])
    frame.reshaped(axes, ["b", 4, "t"])
    assert sizes(frame, (axes[0], axes[1])) == [["b", 4], ["t"]]
