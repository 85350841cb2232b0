"""Recurrences in every spelling: found, read rightly, spliced as one node that gives the same; near misses are refused with the reason."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.export import Dim

from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.graph import Graph, Site
from rewriter.operator import AbstractRecurrence
from rewriter.passes.detect.recurrence import detect
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.passes.structures.linear_system import LinearSystem
from rewriter.tolerances import EQUAL
from tests.detect.loops import BATCH, CASES, HEADS, KEY, TIME, WIDTH, Loop, Projecting, Scan, exported, onnx_loop, ready, to_onnx


def sites(graph: Graph) -> list[Site]:
    return list(detect(graph))


def only(graph: Graph) -> Site:
    (site,) = sites(graph)
    return site


def run(graph: Graph, feeds: dict[str, Tensor]) -> list[Tensor]:
    named = dict(zip((spec.name for spec in graph.specs()), feeds.values(), strict=True))
    return list(graph.run(named).values())


def raised(graph: Graph) -> Graph:
    """A copy with its one recurrence as one node, and nothing left of the loop."""
    copy = graph.clone()
    site = only(copy)
    assert site.form is not None, site.reason
    copy.splice(site, site.form)
    copy.prune()
    operations = [copy.op(node) for node in copy.nodes()]
    assert operations.count("structured") == 1 and not {"scan", "loop"} & set(operations)
    return copy


def equal(before: Graph, after: Graph, feeds: dict[str, Tensor]) -> None:
    rtol, atol = EQUAL[torch.float32]
    for a, b in zip(run(after, feeds), run(before, feeds), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dynamic", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("name", CASES)
def test_torch_spellings(name: str, dynamic: bool) -> None:
    case = CASES[name]
    graph = FxGraph.of(exported(case, dynamic))
    site = only(graph)
    assert case.said in site.reason
    assert (type(site.form).__name__ if site.form else "") == case.kind
    if case.kind:
        after = raised(graph)
        for time in (1, 4, 7, 65) if dynamic else (TIME,):
            equal(graph, after, case.feeds(time))


_BOTH = ("transposed", "mamba", "linear cell", "min gru", "skipping")


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [*itertools.product(_BOTH, (False, True)), ("projecting", False), ("finishing", False)],  # torch.onnx cannot write their scans
)
def test_onnx_spellings(name: str, dynamic: bool) -> None:
    case = CASES[name]
    graph = OnnxGraph(to_onnx(exported(case, dynamic)))
    site = only(graph)
    assert case.said in site.reason
    if case.kind:
        after = raised(graph)
        for time in (1, 4, 7, 65) if dynamic else (TIME,):
            equal(graph, after, case.feeds(time))


def test_a_result_that_mixes_the_batch_afterwards_is_not() -> None:
    def mixing(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        state, y = CASES["plain"].function(state, x)
        return state, torch.relu(y) - y.mean(0)

    assert "lies on its way" in only(FxGraph.of(exported(replace(CASES["plain"], step=mixing), True))).reason


def test_a_loop_of_which_only_the_last_result_is_used_is_none() -> None:
    class Last(torch.nn.Module):
        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            for t in range(x.shape[1]):
                y = s * x[:, t]
                s = 0.9 * s + x[:, t]
            return y

    assert not list(detect(FxGraph.of(torch.export.export(Last(), (torch.randn(2, TIME, WIDTH), torch.randn(2, WIDTH))))))


def test_inputs_made_for_one_batch_size_are_not() -> None:
    case = replace(CASES["projecting"], step=Projecting(rows=BATCH))
    assert "or for one batch size alone" in only(FxGraph.of(exported(case, False))).reason


def test_inputs_that_mix_the_batch_are_not() -> None:
    def mixing(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        a, b = x
        state = torch.sigmoid(a - a.mean(0)) * state + b
        return state, state

    case = replace(CASES["gated"], step=mixing)
    assert "cannot be done for all steps at once" in only(FxGraph.of(exported(case, True))).reason


def test_an_unrolled_loop_of_any_batch_is_read() -> None:
    case = CASES["delta"]
    inputs = tuple(case.feeds().values())
    graph = FxGraph.of(torch.export.export(Loop(case), inputs, dynamic_shapes=(({0: Dim("batch")},) * len(inputs),)))
    after = raised(graph)
    equal(graph, after, case.feeds())
    equal(graph, after, {name: torch.cat([x, x[:1]]) for name, x in case.feeds(seed=1).items()})


def test_one_recurrence_written_five_ways_is_one_structured_node() -> None:
    """A Python loop, torch's scan, ONNX Scan, ONNX Loop, unrolled ONNX."""
    case = CASES["delta"]
    loop, scan = exported(case, False), exported(case, True)
    graphs: dict[str, Graph] = {
        "python loop": FxGraph.of(loop),
        "scan": FxGraph.of(scan),
        "unrolled onnx": OnnxGraph(to_onnx(loop)),
        "onnx scan": OnnxGraph(to_onnx(scan)),
        "onnx loop": OnnxGraph(onnx_loop()),
    }
    forms = {name: only(graph).form for name, graph in graphs.items()}
    want = LinearAttention(HEADS, KEY, WIDTH, HEADS, HEADS, 1, "delta", "head", 1.0, True)
    assert forms == dict.fromkeys(graphs, want)
    results = [run(raised(graph), case.feeds()) for graph in graphs.values()]
    rtol, atol = EQUAL[torch.float32]
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_layers_one_after_the_other_are_recurrences_of_their_own() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Loop(CASES["gated"]), Loop(CASES["gated"])

        def forward(self, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
            y, _ = self.first(a, b, s)
            z, _ = self.second(y, b, s)
            return z

    feeds = CASES["gated"].feeds()
    graph = FxGraph.of(torch.export.export(Two(), tuple(feeds.values())))
    found = sites(graph)
    assert [type(s.form).__name__ for s in found] == ["DiagonalRecurrence"] * 2
    before = run(graph, feeds)
    copy = graph.clone()
    for site in detect(copy):
        assert site.form is not None
        copy.splice(site, site.form)
    copy.prune()
    assert [copy.op(n) for n in copy.nodes()].count("structured") == 2
    torch.testing.assert_close(run(copy, feeds), before)


def test_a_zero_first_state_is_no_input() -> None:
    class Fresh(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return Loop(CASES["gated"])(a, b, torch.zeros(BATCH, WIDTH))[0]

    a, b, _ = CASES["gated"].feeds().values()
    graph = FxGraph.of(torch.export.export(Fresh(), (a, b)))
    form = only(graph).form
    assert isinstance(form, AbstractRecurrence) and not form.carried
    equal(graph, raised(graph), {"a": a, "b": b})


@pytest.mark.parametrize("dynamic", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("gate", [torch.exp, torch.sigmoid, torch.tanh])
def test_a_decay_that_was_made_before_the_loop(gate: Callable[[Tensor], Tensor], dynamic: bool) -> None:
    case = replace(CASES["per key"], step=ready)

    class Before(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v, g, state = inputs
            return (Scan if dynamic else Loop)(case)(q, k, v, gate(g), state)  # type: ignore[no-any-return]

    graph = FxGraph.of(torch.export.export(Before(), tuple(case.feeds().values())))
    if gate is torch.tanh:
        assert "a decay that may be negative" in only(graph).reason
    else:
        equal(graph, raised(graph), case.feeds())


def test_a_sequence_without_a_batch() -> None:
    class Lone(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            ys = []
            for t in range(q.shape[0]):
                s = s + torch.outer(k[t], v[t])
                ys.append(q[t] @ s)
            return torch.stack(ys), s

    feeds = {"q": torch.randn(TIME, KEY), "k": torch.randn(TIME, KEY), "v": torch.randn(TIME, WIDTH), "s": torch.randn(KEY, WIDTH)}
    graph = FxGraph.of(torch.export.export(Lone(), tuple(feeds.values())))
    assert isinstance(only(graph).form, LinearAttention)
    equal(graph, raised(graph), feeds)


class Odd(torch.nn.Module):
    """A loop in which one step, a value inside, or the state's reading is not as it should be."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, a: Tensor, b: Tensor, s: Tensor) -> list[Tensor]:
        ys, extra = [], []
        for t in range(a.shape[1]):
            before = s
            decay = torch.sigmoid(a[:, t])
            s = decay * s + (2 if self.kind == "step" and t == 3 else 1) * b[:, t]
            s = torch.flip(s, (1,)) + 0 * before if self.kind == "mixed" else s
            ys.append(before if self.kind == "early" else s)
            extra.append(s)
        return [torch.stack(ys, 1), s, *([extra[2]] if self.kind == "inside" else [])]


@pytest.mark.parametrize(
    ("kind", "said"),
    [("inside", "is used elsewhere"), ("mixed", "mixes its entries"), ("early", "read before its step")],
)
def test_near_misses_are_listed_with_the_reason(kind: str, said: str) -> None:
    graph = FxGraph.of(torch.export.export(Odd(kind), tuple(CASES["gated"].feeds().values())))
    site = only(graph)
    assert site.form is None and said in site.reason


def test_steps_that_differ_are_no_recurrence() -> None:
    graph = FxGraph.of(torch.export.export(Odd("step"), tuple(CASES["gated"].feeds().values())))
    assert sites(graph) == []


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (onnx_loop(trips=3), "another number of steps than a has"),
        (onnx_loop(stops=True), "may stop early"),
    ],
)
def test_onnx_loops_that_are_no_scan(model: ir.Model, said: str) -> None:
    site = only(OnnxGraph(model))
    assert site.form is None and said in site.reason


def test_a_scan_that_runs_backwards_is_refused() -> None:
    model = to_onnx(exported(CASES["gated"], True))
    for node in model.graph.all_nodes():
        if node.op_type == "Scan":
            node.attributes["scan_input_directions"] = ir.AttrInt64s("scan_input_directions", [1, 1])
    assert "runs backwards" in only(OnnxGraph(model)).reason


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_are_listed(kind: str) -> None:
    layer = getattr(torch.nn, kind)(KEY, WIDTH, batch_first=True)
    graph = FxGraph.of(torch.export.export(layer, (torch.randn(2, TIME, KEY),)))
    site, *inside = sites(graph)
    assert kind in site.reason and "non-linear" in site.reason
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    assert {s.shape for s in inside} == {(gates * WIDTH, KEY), (gates * WIDTH, WIDTH)}
    assert all(s.kind == "linear" and kind in s.reason for s in inside)


def test_biases_and_first_states_of_a_layer_are_no_matrices() -> None:
    h = WIDTH
    shapes = {"W": (2, 4 * h, KEY), "R": (2, 4 * h, h), "B": (2, 8 * h), "h": (2, 3, h), "c": (2, 3, h), "P": (2, 3 * h)}
    stored = [helper.make_tensor(name, TensorProto.FLOAT, shape, torch.randn(shape).flatten().tolist()) for name, shape in shapes.items()]
    node = helper.make_node("LSTM", ["x", "W", "R", "B", "", "h", "c", "P"], ["y"], hidden_size=h, direction="bidirectional")
    infos = {"x": ["time", 3, KEY], "y": ["time", 2, 3, h]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in infos.items())
    inner = helper.make_graph([node], "lstm", [x], [y], stored)
    graph = OnnxGraph(ir.from_proto(helper.make_model(inner, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)))
    assert [s.name for s in sites(graph) if s.kind == "linear"] == ["W", "R"]


@pytest.mark.parametrize("activation", ["Affine", "Tanh", "scaled"])
def test_an_onnx_rnn_of_identity_activation_is_a_linear_system(activation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W": (1, WIDTH, KEY), "R": (1, WIDTH, WIDTH), "B": (1, 2 * WIDTH)}
    stored = [
        helper.make_tensor(name, TensorProto.FLOAT, shape, (0.3 * torch.randn(shape, generator=generator)).flatten().tolist())
        for name, shape in shapes.items()
    ]
    options = {"activation_alpha": [0.5 if activation == "scaled" else 1.0], "activation_beta": [0.0]} if activation != "Tanh" else {}
    activation = {"scaled": "Affine"}.get(activation, activation)
    node = helper.make_node("RNN", ["x", *shapes, "", "h"], ["y", "last"], hidden_size=WIDTH, activations=[activation], **options)
    infos = {"x": ["time", "batch", KEY], "h": [1, "batch", WIDTH], "y": ["time", 1, "batch", WIDTH], "last": [1, "batch", WIDTH]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in infos.items()}
    inner = helper.make_graph([node], "rnn", [values["x"], values["h"]], [values["y"], values["last"]], stored)
    graph = OnnxGraph(ir.from_proto(helper.make_model(inner, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)))
    site = sites(graph)[0]
    if activation == "Tanh" or options["activation_alpha"] == [0.5]:
        assert (
            site.form is None
            and ("non-linear" if activation == "Tanh" else "linear, but backwards, of another layout or scaled") in site.reason
        )
        return
    assert isinstance(site.form, LinearSystem)
    copy = graph.clone()
    found = sites(copy)[0]
    copy.splice(found, site.form)
    copy.prune()
    for time in (1, 5, 66):
        equal(graph, copy, {"x": torch.randn(time, 2, KEY), "h": torch.randn(1, 2, WIDTH)})


def test_a_wrong_reading_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading is checked against the operator's own step: one that computes something else reads nothing."""
    right = LinearAttention.step

    def wrong(self: LinearAttention, ops: object, states: Sequence[object], xs: Sequence[object]) -> object:
        (state,), ys = right(self, ops, states, xs)  # type: ignore[arg-type]
        return [state * 1.0001], ys

    monkeypatch.setattr(LinearAttention, "step", wrong)
    assert only(FxGraph.of(exported(CASES["delta"], False))).form is None
