"""Steps that a reading by example could take for something else: read rightly, or listed with the reason, never a crash."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch._higher_order_ops import scan
from torch.export import Dim

from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.passes.detect.recurrence import detect
from tests.detect.loops import onnx_loop, to_onnx
from tests.detect.test_recurrence import equal, only, raised

B, T, N = 2, 5, 6
Body = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]]


class Scanned(torch.nn.Module):
    """Time first."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, state: Tensor, *xs: Tensor) -> tuple[Tensor, Tensor]:
        def body(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            new, y = self.body(h, x)
            return new.clone(), y.clone()

        return scan(body, state, list(xs))


def graph(body: Body, inputs: Sequence[Tensor], batch: int | None = 0) -> FxGraph:
    """`batch`: the axis of the state that varies; that of the sequences follows the time axis."""
    axes = [
        {} if batch is None else {batch: Dim.AUTO},
        *[{0: Dim.AUTO} | ({} if batch is None else {batch + 1: Dim.AUTO})] * len(inputs[1:]),
    ]
    return FxGraph.of(torch.export.export(Scanned(body), tuple(inputs), dynamic_shapes=(axes[0], tuple(axes[1:]))))


def summed(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    h = 0.5 * h + x[0]
    return h, h.sum(-1)


@pytest.mark.parametrize("inputs", [(torch.rand(B, N), torch.rand(T, B, N)), (torch.rand(N), torch.rand(T, N))], ids=["batch", "alone"])
def test_a_result_of_one_number_a_token_is_read(inputs: tuple[Tensor, ...]) -> None:
    g = graph(summed, inputs, 0 if inputs[0].dim() == 2 else None)
    assert only(g).form is not None
    equal(g, raised(g), {"state": inputs[0], "x": inputs[1]})


def test_a_batch_on_another_axis_than_the_first_is_listed() -> None:
    site = only(graph(lambda h, x: ((h := 0.5 * h + x[0]), h), (torch.rand(1, B, N), torch.rand(T, 1, B, N)), 1))
    assert site.form is None and "a state whose sizes vary" in site.reason


def test_what_is_no_float_is_listed() -> None:
    def hold(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        h = torch.where(x[0] > 0.5, h, 0.0)
        return h, h

    site = only(graph(hold, (torch.rand(B, N), torch.rand(T, B, N))))
    assert site.form is None and "which is no float" in site.reason


@pytest.mark.parametrize("length", [3, T], ids=["other", "as long as there are heads"])
def test_a_constant_that_meets_the_time_axis_is_not_lifted_out(length: int) -> None:
    class HeadFirst(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.rand(T) + 0.5)

        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
            state, ys = torch.zeros(B, T, 4, N), []
            for t in range(length):
                state = state * torch.exp(-self.a * g[:, :, t])[..., None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
                ys.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
            return torch.stack(ys, 2)

    inputs = (*(torch.rand(B, T, length, n) for n in (4, 4, N)), torch.rand(B, T, length))
    (site,) = detect(FxGraph.of(torch.export.export(HeadFirst(), inputs)))
    assert site.form is None


def clamped_state(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    h = (x[0] * h + x[1]).clamp(-20, 20)
    return h, h


def clamped_result(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    h = x[0] * h + x[1]
    return h, h.clamp(-100, 100)


def shifted_relu(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    h = 0.5 * h + x[0]
    return h, torch.relu(h + 30) - 30


def thresholded(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    h = 0.5 * h + x[0]
    return torch.where(h.abs() > 50, torch.zeros_like(h), h), h


def rounded(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    h = 0.5 * h + x[0]
    return h, h + 1e-12 * h.to(torch.int64)


@pytest.mark.parametrize("onnx", [False, True], ids=["torch", "onnx"])
@pytest.mark.parametrize("body", [clamped_state, thresholded])
def test_what_is_linear_only_for_small_numbers_is_listed(body: Body, onnx: bool) -> None:
    g = graph(body, (torch.rand(B, N), torch.rand(T, B, N), torch.rand(T, B, N)), None)
    site = only(OnnxGraph(to_onnx(g.program)) if onnx else g)
    assert site.form is None and "not known to be linear" in site.reason


def clamped_input(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    h = 0.5 * h + x[0].clamp(-20, 20)
    return h, h


def halved(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    h = torch.sigmoid(x[0]) * h + x[1]
    return h, h.half()


@pytest.mark.parametrize("onnx", [False, True], ids=["torch", "onnx"])
@pytest.mark.parametrize("body", [clamped_result, shifted_relu, rounded, clamped_input])
def test_what_the_step_does_before_and_after_its_state_stays(body: Body, onnx: bool) -> None:
    g = graph(body, (torch.rand(B, N), torch.rand(T, B, N), torch.rand(T, B, N)), None)
    read = OnnxGraph(to_onnx(g.program)) if onnx else g
    names = [s.name for s in read.specs()]
    large = [200 * (torch.rand(B, N) - 0.5), 200 * (torch.rand(T, B, N) - 0.5), torch.rand(T, B, N)]
    equal(read, raised(read), dict(zip(names, large, strict=False)))


def test_a_number_of_the_step_may_divide() -> None:
    inputs = (torch.rand(B, N), torch.rand(T, B, N), torch.rand(T, B, N) + 1)
    g = graph(lambda h, x: ((h := 0.5 * h + x[0] * 3 / 4), h), inputs[:2])
    assert only(g).form is not None
    equal(g, raised(g), {"state": inputs[0], "x": inputs[1]})


def early(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return h @ torch.triu(torch.ones(N, N)) * 0.1 + x[0], 2 * h.sum(-1, keepdim=True)


def wide(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    h = h - 0.1 * h.roll(1, -1) + torch.nn.functional.pad(x[0], (0, 1025 - N))
    return h, h


@pytest.mark.parametrize(
    ("body", "states", "said"),
    [(early, N, "its result reads the state before the step"), (wide, 1025, "more than 1024 states of a time-invariant system")],
)
def test_what_a_time_invariant_system_is_left_for_is_said(body: Body, states: int, said: str) -> None:
    site = only(graph(body, (torch.rand(B, states), torch.rand(T, B, N))))
    assert site.form is None and said in site.reason


@pytest.mark.parametrize("where", ["state", "sequence", "result"])
def test_a_size_that_goes_into_numbers_is_no_constant(where: str) -> None:
    def averaged(h: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        rows = {"state": h.shape[0], "sequence": x[0].shape[0], "result": 1}[where]
        h = 0.5 * h / rows + x[0]
        return h, h * h.shape[0] if where == "result" else h

    g = graph(averaged, (torch.rand(B, N), torch.rand(T, B, N)))
    assert only(g).form is None


def test_types_that_differ_are_listed() -> None:
    site = only(graph(halved, (torch.rand(B, N), torch.rand(T, B, N), torch.rand(T, B, N))))
    assert site.form is None and "are of types float16, float32; one type can be raised" in site.reason


def test_a_loop_that_may_not_start_is_refused() -> None:
    model = onnx_loop()
    (loop,) = [node for node in model.graph if node.op_type == "Loop"]
    start = ir.Value(name="start", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    model.graph.inputs.append(start)
    loop.replace_input_with(1, start)
    assert "a Loop that may not start" in only(OnnxGraph(model)).reason
