"""Timings of whole models: which sizes a token count means, ratios of paired samples, and notes where a figure cannot be had."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from rewriter import latency
from rewriter.errors import RewriteError
from rewriter.inputs import parse_input
from rewriter.report import Latency
from rewriter.timing import Timing, interleave
from tests.engine.nets import MLP, Mlp, graph

IDS, MASK, CACHED = (parse_input(s) for s in ("ids:int64[batch,seq]", "mask:int64[batch,past+seq]", "k:float32[batch,4,past,8]"))


@pytest.mark.parametrize(
    ("specs", "explicit", "expected"),
    [
        ([IDS], {}, {"batch": 1, "seq": 256}),
        ([IDS], {"batch": 4}, {"batch": 4, "seq": 256}),
        ([IDS], {"seq": 7}, {"batch": 1, "seq": 7}),
        ([IDS, MASK, CACHED], {}, {"batch": 1, "seq": 256, "past": 0}),
        ([IDS, MASK, CACHED], {"past": 9}, {"batch": 1, "seq": 256, "past": 9}),
        ([parse_input("x:float32[rows,8]")], {}, {"rows": 256}),  # its first dimension is all that there is
        ([parse_input("x:float32[3,8]")], {}, {}),
    ],
)
def test_sizes_of_a_token_count(specs: Any, explicit: Mapping[str, int], expected: Mapping[str, int]) -> None:
    assert latency.token_sizes(specs, explicit, 256) == expected


def test_calls_are_interleaved_and_counted() -> None:
    order: list[int] = []
    timing = interleave([lambda: order.append(0), lambda: order.append(1)], seconds=0.0, least=5)
    assert order == [0, 1] * 6  # one round is not timed
    assert [len(row) for row in timing.samples] == [5, 5]


def test_rounds_are_bounded_above_and_below() -> None:
    assert len(interleave([lambda: None], seconds=60, rounds=9).samples[0]) == 9
    assert len(interleave([lambda: time.sleep(0.001)], seconds=0.0, least=3).samples[0]) == 3


def test_ratios_are_of_pairs() -> None:
    """A machine that slows down half way changes no paired ratio."""
    timing = Timing(((2.0, 2.0, 20.0, 20.0), (1.0, 1.0, 10.0, 10.0)))
    assert timing.ratio(0, 1) == (2.0, 2.0, 2.0)
    assert timing.seconds(1) == 5.5
    spread = Timing((tuple(float(i) for i in range(1, 12)), (1.0,) * 11))
    assert spread.ratio(0, 1) == (2.0, 6.0, 10.0)


@pytest.mark.parametrize(
    ("ratio", "spread", "slower"),
    [(0.9, [0.8, 0.95], True), (0.9, [0.8, 1.05], False), (0.98, [0.97, 0.99], False), (1.2, [1.1, 1.3], False), (None, None, False)],
)
def test_slower_is_beyond_the_spread(ratio: float | None, spread: list[float] | None, slower: bool) -> None:
    fast = Latency(1, 1, 0.1, None, 0.05, 2.0, None, "", [1.9, 2.1])
    assert latency.grew([fast, Latency(256, 1, 0.1, None, 0.1, ratio, None, "", spread)]) is slower


class Three:
    """A target whose dense model takes 3 ms, int8 2 ms and rewritten 1 ms."""

    def __init__(self, int8: bool = True, dies: bool = False) -> None:
        self.int8, self.dies = int8, dies

    def _runner(self, seconds: float) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            if self.dies and feeds["x"].shape[1] == 2:
                raise ValueError("no two tokens\nsecond line")
            time.sleep(seconds)
            return {}

        return run

    def open(self, path: Path, threads: int) -> Any:
        return self._runner(0.003 if path.name == "dense" else 0.001)

    def open_int8(self, path: Path, threads: int) -> Any:
        if not self.int8:
            raise RewriteError("it has no products")
        return self._runner(0.002)


def rows(monkeypatch: pytest.MonkeyPatch, **how: bool) -> list[Latency]:
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    g, target = graph(Mlp()), Three(**how)
    return latency.latencies(
        latency.Reference.of(target, Path("dense"), 1),
        target.open(Path("new"), 1),
        latency.batches(g, [parse_input(MLP)], {}, (2, 5)),
        (2, 5),
    )  # type: ignore[arg-type]


def test_every_figure_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for row, tokens in zip(rows(monkeypatch), (2, 5), strict=True):
        assert (row.tokens, row.threads, row.note) == (tokens, 1, "")
        figures = (row.dense_seconds, row.int8_seconds, row.rewritten_seconds, row.ratio, row.int8_ratio)
        dense, int8, new, ratio, int8_ratio = [f for f in figures if f is not None]
        assert dense > int8 > new and ratio > int8_ratio > 1


def test_what_cannot_be_had_has_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in rows(monkeypatch, int8=False):
        assert row.int8_seconds is None and row.int8_ratio is None and row.ratio is not None
        assert row.note == "no int8 figure: it has no products"
    short, long = rows(monkeypatch, dies=True)
    assert short.ratio is None and short.dense_seconds is None
    assert short.note == "not measured at 2 tokens: no two tokens"
    assert long.ratio is not None


def test_sizes_that_cannot_be_invented_have_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    specs = [parse_input("ids:int64[batch,seq]")]
    batches = latency.batches(graph(Mlp()), specs, {}, (2,))
    (row,) = latency.latencies(latency.Reference.of(Three(), Path("dense"), 1), Three().open(Path("new"), 1), batches, (2,))  # type: ignore[arg-type]
    assert row.ratio is None and "indexes no table that bounds it" in row.note
