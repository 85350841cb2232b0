"""The graph protocol over an exported program: nodes, constants, users, taps, specifications."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from rewriter.backends.files.export import export_module
from rewriter.backends.fx.graph import FxGraph
from rewriter.errors import RewriteError
from rewriter.inputs import parse_input
from tests.fx.models import BATCH, OTHER, Net, dense, export, graph, normal, same, sites

X = normal(BATCH, 5, 8)
FEEDS = {"x": normal(OTHER, 5, 8, seed=9)}
W = normal(8, 8)


def find(g: FxGraph, op: str, which: int = 0) -> Any:
    return [n for n in g.nodes() if g.op(n) == op][which]


def nested(s: Any, x: Tensor) -> Tensor:
    def yes(x: Tensor) -> Tensor:
        inner: Tensor = torch.cond(x.mean() > 1, lambda x: F.linear(x, s.w), lambda x: F.linear(x, s.v).sin(), (x,))
        return inner.cos()

    out: Tensor = torch.cond(x.sum() > 0, yes, lambda x: x @ s.w, (x,))
    return out


def test_nodes_of_every_body_in_order() -> None:
    g = graph(Net(nested, w=W, v=normal(8, 8, seed=2)), X)
    nodes = list(g.nodes())
    assert len(nodes) == len(set(nodes))
    bodies = [g.body(n) for n in nodes]
    assert set(bodies) == {"", "true_graph_0", "false_graph_0", "true_graph_0.true_graph_0", "true_graph_0.false_graph_0"}
    place = {n: i for i, n in enumerate(nodes)}
    assert all(place[i] < place[n] for n in nodes for i in n.all_input_nodes)
    for call in (n for n in nodes if g.op(n) == "cond"):
        prefix = g.body(call) + "." if g.body(call) else ""
        inner = [n for n in nodes if g.body(n).startswith(f"{prefix}true_graph_0")]
        assert max(place[n] for n in inner) < place[call]


def test_users_through_tied_names_and_cond_operands() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.table = nn.Linear(8, 8), nn.Embedding(8, 8)
            self.table.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            picked = self.table(x[..., 0].abs().long().clamp(max=7))
            out: Tensor = torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: F.linear(x, self.a.weight), (x,))
            return out + picked

    g = graph(Tied(), X)
    linear = find(g, "linear")
    users = g.storage_users(g.inputs(linear)[1])
    assert sorted(g.op(n) for n, _ in users) == ["embedding", "linear", "linear"]
    assert {g.body(n) for n, _ in users} == {"", "true_graph_0", "false_graph_0"}
    assert all(operand in n.all_input_nodes for n, operand in users)


CONST: dict[str, Any] = {
    "view": lambda w: w.view(4, 16).t(),
    "chunk": lambda w: w.chunk(2, 0)[1],
    "split of a cast": lambda w: w.double().split(2, 1)[2],
    "norm": lambda w: w / w.norm(dim=1, keepdim=True),
    "stack": lambda w: torch.stack([w, w.T])[1],
    "quantised": lambda w: torch.ops.quantized_decomposed.dequantize_per_tensor((w * 9).to(torch.int8), 0.1, 0, -128, 127, torch.int8),
    "long chain": lambda w: [w := w * 1.01 for _ in range(350)][-1],
}


@pytest.mark.parametrize("name", CONST)
def test_const(name: str) -> None:
    import torch.ao.quantization.fx._decomposed  # defines the quantised operations

    net = Net(lambda s, x: x.sum() + CONST[name](s.w), w=W)
    g = graph(net, X)
    last = next(v for v in find(g, "add", -1).all_input_nodes if g.is_const(v))
    got = g.const(last)
    assert got is not None
    torch.testing.assert_close(got, CONST[name](net.w.detach()))
    assert g.stored_name(last) == "w"


def test_a_view_is_no_copy_and_what_varies_is_no_constant() -> None:
    net = Net(lambda s, x: F.linear(x, s.w[2:6]) * torch.rand_like(s.w[0, :4]), w=W)
    g = graph(net, X)
    _, weight = g.inputs(find(g, "linear"))
    got = g.const(weight)
    assert got is not None
    assert got.untyped_storage().data_ptr() == net.w.untyped_storage().data_ptr()
    assert g.const(find(g, "linear")) is None
    assert not g.is_const(find(g, "mul"))
    assert not any(g.is_const(v) for v in find(g, "mul").all_input_nodes)


@pytest.mark.parametrize(
    ("made", "constant"),
    [
        (lambda x: torch.eye(6), True),
        (lambda x: torch.ones(6, 6).triu() * 0.5, True),
        (lambda x: torch.rand(6, 6), False),
        (lambda x: torch.empty(6, 6), False),
        (lambda x: torch.zeros(x.shape[0], 6), False),
        (lambda x: torch.ones(1 << 23, 6).amax(0), False),
    ],
    ids=["eye", "of ones", "random", "empty", "of a size that varies", "large"],
)
def test_what_is_made_of_nothing_is_a_constant(made: Callable[[Tensor], Tensor], constant: bool) -> None:
    g = graph(Net(lambda s, x: x.sum() * made(x)), X)
    (value,) = (v for v in find(g, "mul", -1).all_input_nodes if g.op(v) != "aten.sum")
    assert g.is_const(value) == constant
    if constant:
        held = g.const(value)
        assert held is not None and torch.equal(held, made(X))
        assert g.stored_name(value) in ("eye", "ones")


def test_what_is_made_under_a_stored_name_is_another_tensor() -> None:
    """Also where two bodies make theirs under one name."""

    def nested(s: Any, x: Tensor) -> Tensor:
        inner: Tensor = torch.cond(x.sum() > 0, lambda x: x @ torch.ones(8, 8), lambda x: x * torch.ones(8, 8)[0], (x,))
        return inner @ s.ones @ torch.ones(8, 8)

    g = graph(Net(nested, ones=W), X)
    weights = [g.inputs(node)[1] for node in g.nodes() if g.op(node) == "matmul"]
    assert len(weights) == 3 and all(len(g.storage_users(weight)) == 1 for weight in weights)


def test_the_stored_name_is_the_largest_parameters() -> None:
    g = graph(Net(lambda s, x: F.linear(x, s.scale * s.w), scale=normal(1), w=W), X)
    assert g.stored_name(g.inputs(find(g, "linear"))[1]) == "w"


def test_taps() -> None:
    """Every tapped value as often as it is computed, also inside the branch that runs."""
    g = graph(Net(nested, w=W, v=normal(8, 8, seed=2)), X)
    first, second = find(g, "linear", 0), find(g, "linear", 1)
    matmul = find(g, "matmul")
    seen: dict[str, list[Tensor]] = {}
    taps = {n: seen.setdefault(n.name + g.body(n), []).append for n in (first, second, matmul, g.inputs(first)[0])}
    out = g.run({"x": FEEDS["x"].abs()}, taps)
    assert [len(v) for v in seen.values()] == [0, 1, 0, 0]
    torch.testing.assert_close(seen[second.name + g.body(second)][0].sin().cos(), next(iter(out.values())))
    g.run({"x": FEEDS["x"].abs() * 20}, taps)
    assert [len(v) for v in seen.values()] == [1, 1, 0, 1]
    g.run({"x": -FEEDS["x"].abs()}, taps)
    assert [len(v) for v in seen.values()] == [1, 1, 1, 1]
    assert all(g.can_tap(n) for n in (first, second, matmul))


def test_specs_outputs_and_missing_inputs() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, flag: Tensor) -> dict[str, Tensor]:
            return {"second": a * 2, "first": a + flag}

    specs = [parse_input("a:float32[batch,3]"), parse_input("flag:int64[batch,1]")]
    g = FxGraph.of(export_module(Two(), specs, {}))
    assert [(s.name, s.dtype, s.dims[1]) for s in g.specs()] == [("a", "float32", 3), ("flag", "int64", 1)]
    assert [isinstance(s.dims[0], str) for s in g.specs()] == [True, True]
    assert g.output_names() == ["second", "first"]
    with pytest.raises(RewriteError, match="input 'flag' is missing"):
        g.run({"a": torch.ones(2, 3)})


class Cached(nn.Module):
    """Tokens behind those of a cache, in two dimensions that are one in the result; and an axis that is twice another."""

    def forward(self, past: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        torch._check(mask.shape[1] == past.shape[1] + x.shape[1])
        both = torch.cat([past, x], 1) * mask[..., None]
        return torch.cat([both, both], 0)


CACHED = [
    parse_input(text) for text in ("past:float32[batch_size,past,3]", "x:float32[batch_size,seq,3]", "mask:float32[batch_size,past+seq]")
]


def test_sizes_are_called_as_they_were_asked_for() -> None:
    g = FxGraph.of(export_module(Cached(), CACHED, {}))
    g.call_sizes(CACHED)
    assert g.specs() == g.clone().specs() == CACHED
    model = g.to_onnx(20)
    assert [[str(d) for d in v.shape] for v in model.graph.inputs] == [[str(d) for d in s.dims] for s in CACHED]
    assert [str(d) for d in model.graph.outputs[0].shape] == ["2*batch_size", "past+seq", "3"]
    assert not any(re.search(r"\bs\d", str(v.shape)) for node in model.graph for v in node.outputs)


def test_a_sum_of_sizes_names_its_parts() -> None:
    """As --input and --dim spell them, where nobody gave names."""
    past, x, mask = (spec.dims for spec in FxGraph.of(export_module(Cached(), CACHED, {})).specs())
    assert set(str(mask[1]).split("+")) == {past[1], x[1]}


def test_a_size_that_no_option_can_spell_has_a_name_of_its_own() -> None:
    class Pairs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check(x.shape[0] % 2 == 0)
            return x.reshape(2, -1, 3)

    program = torch.export.export(Pairs(), (normal(8, 3),), dynamic_shapes=({0: 2 * Dim("half")},))
    assert [str(s) for s in FxGraph.of(program).specs()] == ["x:float32[x_0,3]"]


def test_inputs_need_not_be_contiguous() -> None:
    g = graph(Net(lambda s, x: torch.relu(x).reshape(-1, 4) @ s.w, w=normal(4, 3)), X)
    turned = {"x": normal(8, 5, OTHER).permute(2, 1, 0)}
    torch.testing.assert_close(g.run(turned), g.run({"x": turned["x"].contiguous()}))


def test_nbytes_counts_tied_weights_once() -> None:
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = a.weight
    assert graph(Net(lambda s, x: s.a(s.b(x)), a=a, b=b), X).nbytes() == 8 * 8 * 4


def test_a_clone_is_independent_and_shares_the_tensors() -> None:
    g = graph(Net(lambda s, x: s.b(torch.relu(s.a(x))), a=nn.Linear(8, 8), b=nn.Linear(8, 8)), X)
    before, copy = g.run(FEEDS), g.clone()
    for site in sites(copy):
        copy.splice(site, dense(copy, site))
    copy.prune()
    same(copy.run(FEEDS), before)
    assert {"a.weight", "b.weight"} <= set(g.program.state_dict)
    assert not {"a.weight", "b.weight"} & set(copy.program.state_dict)
    assert [g.op(n) for n in g.nodes()].count("linear") == 2
    assert g.clone().program.state_dict["a.weight"] is g.program.state_dict["a.weight"]
    for name, value in g.run(FEEDS).items():
        assert torch.equal(value, before[name])


def test_the_program_that_was_given_stays_as_it_was() -> None:
    program = export(Net(lambda s, x: s.a(x), a=nn.Linear(8, 8)), X)
    names = [n.name for n in program.graph.nodes]
    g = FxGraph.of(program)
    (site,) = sites(g)
    g.splice(site, dense(g, site))
    g.prune()
    assert [n.name for n in program.graph.nodes] == names
    assert set(program.state_dict) == {"a.weight", "a.bias"}


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm(train: bool) -> None:
    """In training mode it changes its buffers: they are no outputs of the user's and no constants."""
    net = nn.Sequential(nn.Conv1d(8, 6, 1), nn.BatchNorm1d(6), nn.Conv1d(6, 4, 1)).train(train)
    x = normal(BATCH, 8, 5)
    with torch.no_grad():
        program = torch.export.export(net, (x,), strict=False)
    g = FxGraph.of(program)
    assert g.output_names() == ["output"]
    before, found = g.run({"input": x}), sites(g)
    assert [s.name for s in found] == ["0", "2"]
    for site in found:
        g.splice(site, dense(g, site))
    g.prune()
    same(g.run({"input": x}), before)


class Deep(nn.Module):
    """Linears in a row with something between them: several nodes for each."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) * 1.5 + x
        return x


def test_detection_is_near_linear() -> None:
    """Eight times the nodes take about eight times as long, not sixty-four."""
    small, large = (graph(Deep(layers), normal(2, 16), dynamic=False) for layers in (10, 80))

    def seconds(g: FxGraph) -> float:
        best = float("inf")
        for _ in range(3):
            g.constants.forget()
            begin = time.process_time()
            assert len(sites(g)) * 6 < len(list(g.nodes()))
            best = min(best, time.process_time() - begin)
        return best

    assert seconds(large) < 25 * seconds(small)


def test_a_size_that_a_guard_fixed_is_a_number() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(0, 1).sum(0) + torch.ones(2, 6, dtype=x.dtype)

    axes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    graph = FxGraph.of(torch.export.export(Fixed(), (normal(2, 7, 6),), dynamic_shapes=axes))
    length, batch, width = graph.shape(find(graph, "transpose")) or ()
    assert (batch, width) == (2, 6) and isinstance(length, str)


def test_a_symbol_that_a_guard_fixed_is_a_number_in_onnx() -> None:
    g = graph(lambda s, x: s.l(x), normal(2, 8), l=nn.Linear(8, 4))
    (x,) = [n for n in g.program.graph.find_nodes(op="placeholder") if n.name == "x"]
    assert not isinstance(x.meta["val"].shape[0], int) and x.meta["val"].shape[0] == 2  # which is a guard
    assert [list(v.shape) for v in g.to_onnx(20).graph.inputs] == [[2, 8]]
