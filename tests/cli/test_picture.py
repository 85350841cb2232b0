"""The picture of `rewrite bench --plot`: what is a point, which are on the frontier, and the same bytes again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from rewriter.picture import Point, draw, frontier, points
from tests.cli.samples import comparison


def test_times_are_told_by_their_ratio_to_dense() -> None:
    dense, found = points(comparison("a.onnx", "b.onnx"), 1)
    assert dense == 2.0
    first, second, int8 = found
    assert (first.name, second.name, int8.name) == ("a.onnx", "b.onnx", "dense int8")
    assert first.ms == pytest.approx(2 / 1.43) and first.low == pytest.approx(2 / 1.52) and first.high == pytest.approx(2 / 1.31)
    assert second.ms == pytest.approx(4 / 1.43) and second.error == 0.105 and second.half_width == 0.01
    assert int8.ms == 1.1 and int8.error == 0.5
    _, later = points(comparison("a.onnx"), 256)
    assert [p.name for p in later] == ["a.onnx"]  # there was no int8 figure


def test_what_could_not_be_measured_is_no_point() -> None:
    found = comparison("a.onnx")
    none = [dataclasses.replace(row, ratio=None, dense_seconds=None, rewritten_seconds=None) for row in found.contenders[0].rows]
    empty = dataclasses.replace(found, contenders=[dataclasses.replace(found.contenders[0], rows=none)])
    assert points(empty, 1) == (None, [])


def test_the_frontier_is_what_no_other_beats() -> None:
    given = [
        Point(name, ms, ms, ms, error, 0) for name, ms, error in (("a", 1, 0.3), ("b", 2, 0.4), ("c", 3, 0.1), ("d", 3, 0.2), ("e", 2, 0.2))
    ]
    assert [p.name for p in frontier(given)] == ["a", "e", "c"]


def test_it_is_drawn_in_both_formats_and_twice_the_same(tmp_path: Path) -> None:
    found = comparison("small.onnx", "smaller.onnx")
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        draw(found, tmp_path / name)
    for suffix in ("svg", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert "svg" in ElementTree.fromstring((tmp_path / "a.svg").read_text()).tag
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1.5 * image.height  # two panels
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a.svg", "b.png", "b.svg"]
