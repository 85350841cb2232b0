"""What is predicted is dense - gone + come, by the target's own figures; what is further off than 15 % is said."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from torch import Tensor

from rewriter import pipeline
from rewriter.cost_model import AGREE, Base, by_form
from rewriter.graph import Graph
from rewriter.opened import open_model
from rewriter.operator import AbstractMatrix
from rewriter.options import Options
from rewriter.report import Latency
from tests.engine.nets import WIDE, FakeTarget, WideMlp, graph, normal, sites

FEEDS = {"x": normal(1, 7, 96)}
SECONDS = 1e-6  # a stored number, by the fake target's rule


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The net with its first layer in rank 8, as a file has it."""
    out = tmp_path_factory.mktemp("net") / "rewritten.onnx"
    options = Options(
        passes="low-rank:rank=8", inputs=(WIDE,), include=("first",), objective="params", out=str(out), timing=False, force=True, quiet=True
    )
    assert pipeline.rewrite(WideMlp(), options).exit_code == 0
    found: Graph = open_model(str(out), Options()).graph
    return found


def dense(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense model, of which a target knows the time by a rule."""
    return dict(feeds)


def row(measured: float | None) -> Latency:
    return Latency(7, 1, 0.1, None, measured, None, None, "as it was")


@pytest.mark.parametrize("busy", [1, 2])  # how much slower everything was when the layers were timed
@pytest.mark.parametrize(("off", "flagged"), [(0.0, False), (0.14, False), (-0.14, False), (0.16, True), (-0.16, True)])
def test_dense_less_what_is_gone_plus_what_came(off: float, flagged: bool, busy: int, rewritten: Graph) -> None:
    target = FakeTarget(lambda form: busy * SECONDS * form.cost().params)
    target.whole = busy * 0.1
    expected = 0.1 - SECONDS * 96 * 128 + SECONDS * 8 * (96 + 128)
    (found,) = Base(graph(WideMlp(), WIDE), dense, [FEEDS], target).predicted([row(expected * (1 + off))], rewritten)
    assert found.predicted_seconds == pytest.approx(expected)
    assert (f"more than {AGREE:.0%}" in found.note) == flagged and found.note.startswith("as it was")
    assert [sorted(asked) for asked in target.asked] == [["Dense", "LowRank"]]  # together; what stayed is not timed


def test_without_measured_times_nothing_is_predicted(rewritten: Graph) -> None:
    target = FakeTarget(lambda form: 1.0)
    g = graph(WideMlp(), WIDE)
    assert Base(g, dense, [FEEDS], target).predicted([row(None)], rewritten) == [row(None)] and target.asked == []
    assert Base(g, dense, ["no such batch"], target).predicted([row(0.1)], rewritten) == [row(0.1)] and target.asked == []


def test_more_than_there_was_is_flagged(rewritten: Graph) -> None:
    target = FakeTarget(lambda form: float(form.cost().params))
    (found,) = Base(graph(WideMlp(), WIDE), dense, [FEEDS], target).predicted([row(0.05)], rewritten)
    assert found.predicted_seconds == 0.0 and "more than" in found.note


def test_what_cannot_be_predicted_has_a_note(rewritten: Graph) -> None:
    def fails(form: AbstractMatrix) -> float:
        raise RuntimeError("no such\nsession")

    (found,) = Base(graph(WideMlp(), WIDE), dense, [FEEDS], FakeTarget(fails)).predicted([row(0.05)], rewritten)
    assert found.note == "as it was; nothing is predicted at T=7: no such session"
    assert found.predicted_seconds is None and found.rewritten_seconds == 0.05


def test_layers_are_counted_by_their_places() -> None:
    g = graph(WideMlp(), WIDE)
    found = by_form(g, sites(g), FEEDS)
    assert sum(found.values()) == 2 and {layer.tokens for layer in found} == {7}
