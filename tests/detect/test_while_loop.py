"""torch's while_loop that counts is the recurrence that it steps through; one that does more is listed with what it does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.export import Dim, ExportedProgram

from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.onnx.graph import OnnxGraph
from tests.detect.loops import CASES, TIME, Case, to_onnx
from tests.detect.test_recurrence import equal, only, raised


class Counting(torch.nn.Module):
    """Steps from `start` to the length (less `short`, or the whole number `stop`), by `stride`; `peeks` at what it has written."""

    def __init__(
        self,
        case: Case,
        start: int = 0,
        stride: int = 1,
        short: int = 0,
        stop: int = 0,
        peeks: bool = False,
        outside: bool = False,
        axis: int = 1,
        counts: bool = False,
    ) -> None:
        super().__init__()
        self.step, self.start, self.stride, self.short, self.stop, self.peeks = case.function, start, stride, short, stop, peeks
        self.outside, self.axis, self.counts = outside, axis, counts

    def cut(self, x: Tensor, at: Tensor) -> Tensor:
        axis = 1 if self.axis > 0 else 1 - x.dim()
        return x.index_select(axis, at).squeeze(axis)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *xs, state = inputs
        y = torch.zeros_like(self.step(state, [x[:, 0] for x in xs])[1])
        y = y.unsqueeze(1).repeat_interleave(xs[0].shape[1], 1)

        length = xs[0].size(1)

        def going(i: Tensor, *_: Tensor) -> Tensor:
            return i < (length if self.outside else self.stop or xs[0].size(1) - self.short)

        def body(i: Tensor, state: Tensor, y: Tensor) -> Sequence[Tensor]:
            at = i.reshape(1)
            new, row = self.step(state, [self.cut(x, at) for x in xs])
            row = row + y[:, 0] if self.peeks else row + i if self.counts else row
            axis = 1 if self.axis > 0 else 1 - y.dim()
            return i + self.stride, new.clone(), y.index_copy(axis, at, row.unsqueeze(axis))

        _, state, y = while_loop(going, body, (torch.tensor(self.start), state, y))
        return y, state


def program_of(case: Case, **options: int) -> ExportedProgram:
    inputs = tuple(case.feeds().values())
    batch, time = Dim("batch"), Dim("time", min=2)
    axes = ({0: batch, 1: time},) * len(case.shapes) + ({0: batch},)
    with torch.no_grad():
        return torch.export.export(Counting(case, **options), inputs, dynamic_shapes=(axes,))


def graph_of(case: Case, **options: int) -> FxGraph:
    return FxGraph.of(program_of(case, **options))


@pytest.mark.parametrize("name", ["delta", "mamba", "linear cell"])
def test_it_is_read(name: str) -> None:
    case = CASES[name]
    graph = graph_of(case)
    site = only(graph)
    assert case.said in site.reason and type(site.form).__name__ == case.kind
    after = raised(graph)
    for time in (1, 4, 7, 65):
        equal(graph, after, case.feeds(time))


@pytest.mark.parametrize("options", [{"outside": True}, {"axis": -1}], ids=["length-taken-outside", "axes-from-the-end"])
def test_other_spellings_are_read(options: dict[str, int]) -> None:
    case = CASES["gated"]
    graph = graph_of(case, **options)
    after = raised(graph)
    equal(graph, after, case.feeds(7))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"start": 1}, "without a counter from 0 in steps of 1"),
        ({"stride": 2}, "without a counter from 0 in steps of 1"),
        ({"short": 1}, "ends by more than its counter and a length"),
        ({"stop": TIME - 1}, "whose count is not the length of its sequences"),
        ({"peeks": True}, "reads what it has written"),
        ({"counts": True}, "uses its counter in"),
    ],
)
def test_what_does_more_is_listed(options: dict[str, int], reason: str) -> None:
    site = only(graph_of(CASES["gated"], **options))
    assert site.form is None and reason in site.reason


@pytest.mark.parametrize(("name", "axis"), [("gated", 1), ("delta", -1)])
def test_as_torch_writes_it_in_onnx(name: str, axis: int) -> None:
    case = CASES[name]
    graph = OnnxGraph(to_onnx(program_of(case, axis=axis)))
    site = only(graph)
    assert case.said in site.reason and type(site.form).__name__ == case.kind
    after = raised(graph)
    for time in (2, 4, 7, 65):
        equal(graph, after, case.feeds(time))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"start": 1}, "may stop early"),
        ({"stride": 2}, "may stop early"),
        ({"short": 1}, "whose count is not the length of its sequences"),
        ({"stop": TIME - 1}, "whose count is not the length of its sequences"),
        ({"peeks": True}, "reads what it has written"),
        ({"counts": True}, "uses its counter in"),
    ],
)
def test_what_does_more_in_onnx_is_listed(options: dict[str, int], reason: str) -> None:
    site = only(OnnxGraph(to_onnx(program_of(CASES["gated"], **options))))
    assert site.form is None and reason in site.reason


def test_non_linear_steps_are_listed() -> None:
    assert "non-linear in its state" in only(graph_of(CASES["elman"])).reason
