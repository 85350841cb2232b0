"""splice, restore and prune leave exactly what they should; every operator can stand where a dense one stood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.algebra import Compose, Dense, Permutation
from rewriter.backends.files.export import export_module
from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.fx.target import as_module, lower
from rewriter.graph import Site, load_weight
from rewriter.inputs import parse_input
from rewriter.operator import AbstractMatrix, AbstractOperator
from rewriter.registry import load_structures
from tests.fx.models import BATCH, OTHER, Net, close, dense, export, graph, normal, same, sites, splices

X = normal(BATCH, 5, 8)
FEEDS = {"x": normal(OTHER, 5, 8, seed=9)}
load_structures()
MATRICES = {name: kind for name, kind in AbstractOperator.kinds.items() if issubclass(kind, AbstractMatrix)}


def factored(site: Site, weight: Tensor) -> Compose:
    """The site's matrix as a product of two."""
    n = weight.shape[1]
    turn = torch.linalg.qr(normal(n, n, dtype=torch.float64))[0].to(weight.dtype)
    return Compose((Dense(turn.contiguous()), Dense((weight.double() @ turn.double()).T.to(weight.dtype).contiguous())))


def mlp() -> Net:
    return Net(lambda s, x: s.b(torch.relu(s.a(x))), a=nn.Linear(8, 12), b=nn.Linear(12, 4))


def state(g: FxGraph) -> tuple[list[str], list[str], list[Any]]:
    specs = g.program.graph_signature.input_specs
    return [str(n.format_node()) for n in g.nodes()], sorted(g.program.state_dict), [s.target for s in specs]


def test_prune_leaves_factors_and_biases_alone() -> None:
    g = graph(mlp(), X)
    a, b = sites(g)
    g.splice(a, factored(a, load_weight(g, a)))
    assert {"a.weight", "a.structured.0", "a.structured.1"} <= set(g.program.state_dict)  # until prune
    g.prune()
    assert set(g.program.state_dict) == {"a.structured.0", "a.structured.1", "a.bias", "b.weight", "b.bias"}
    assert [g.op(n) for n in g.nodes()].count("linear") == 1
    operator = g.operator(next(n for n in g.nodes() if g.op(n) == "structured"))
    assert isinstance(operator, Compose)
    assert g.operator(next(n for n in g.nodes() if g.op(n) == "linear")) is None
    assert b.name == "b"


def test_restore_is_bit_identical() -> None:
    g = graph(mlp(), X)
    before, untouched = g.run(FEEDS), state(g)
    found = sites(g)
    for order in (found, found[::-1]):
        for site in found:
            g.splice(site, factored(site, load_weight(g, site)), shift=torch.ones(site.shape[0] if site.shape else 0))
        for site in order:
            g.restore(site)
        assert state(g) == untouched
        after = g.run(FEEDS)
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_second_splice_replaces_the_first() -> None:
    g = graph(mlp(), X)
    before = g.run(FEEDS)
    site = sites(g)[0]
    g.splice(site, Dense(torch.zeros(8, 12)))
    g.splice(site, dense(g, site))
    same(g.run(FEEDS), before)
    g.prune()
    assert [n for n in g.program.state_dict if n.startswith("a.structured")] == ["a.structured.0"]


def test_neighbours_splice_onto_each_other() -> None:
    """Nothing between two linears: the second reads the first one's stand-in, whichever comes first."""
    for order in (1, -1):
        g = graph(Net(lambda s, x: s.b(s.a(x)), a=nn.Linear(8, 12), b=nn.Linear(12, 4)), X)
        before, found = g.run(FEEDS), sites(g)
        for site in found[::order]:
            g.splice(site, dense(g, site))
        clean = g.clone()
        clean.prune()
        assert [clean.op(n) for n in clean.nodes()].count("linear") == 0
        same(clean.run(FEEDS), before)
        g.restore(found[0])
        g.splice(found[0], Dense(torch.zeros(8, 12)))
        stored = g.program.state_dict
        close(g.run(FEEDS)["output"][0, 0], (stored["b.bias"] + stored["b.weight"] @ stored["a.bias"]).detach())


def test_a_residual_term_that_was_spliced_itself() -> None:
    net = Net(lambda s, x: torch.addmm(s.a(x), x, s.w, beta=0.5), a=nn.Linear(8, 8), w=normal(8, 8))
    for order in (1, -1):
        g = graph(net, X[:, 0])
        assert len(splices(g, sites(g)[::order], {"x": FEEDS["x"][:, 0]}).program.state_dict) == 3


@pytest.mark.parametrize("bias", ["none", "linear", "added", "addmm", "row", "number", "rows", "residual"])
def test_shift(bias: str) -> None:
    """The shift comes on top of the bias, scaled or not, of whatever shape."""
    net = {
        "none": Net(lambda s, x: F.linear(x, s.w), w=normal(6, 8)),
        "linear": Net(lambda s, x: F.linear(x, s.w, s.b), w=normal(6, 8), b=normal(6)),
        "added": Net(lambda s, x: x @ s.w + s.b, w=normal(8, 6), b=normal(6)),
        "addmm": Net(lambda s, x: torch.addmm(s.b, x, s.w, beta=3), w=normal(8, 6), b=normal(6)),
        "row": Net(lambda s, x: torch.addmm(s.b, x, s.w, beta=3), w=normal(8, 6), b=normal(1, 6)),
        "number": Net(lambda s, x: torch.addmm(s.b, x, s.w), w=normal(8, 6), b=normal(1)),
        "rows": Net(lambda s, x: torch.addmm(s.b, x, s.w, beta=3), w=normal(8, 6), b=normal(5, 6)),
        "residual": Net(lambda s, x: torch.addmm(x, x, s.w, beta=3), w=normal(8, 8)),
    }[bias]
    x = normal(5, 8)
    g = graph(net, x, dynamic=bias != "rows")
    (site,) = sites(g)
    assert site.shape is not None
    before, shift = g.run({"x": x})["output"], normal(site.shape[0], seed=3)
    g.splice(site, dense(g, site), shift.double())
    g.prune()
    close(g.run({"x": x})["output"], before + shift)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    """Outputs, factors and shifted biases stay in the model's dtype."""
    torch.manual_seed(0)
    g = graph(mlp().to(dtype), X.to(dtype))
    feeds = {"x": FEEDS["x"].to(dtype)}
    before = g.run(feeds)
    for site in sites(g):
        assert site.dtype == dtype
        assert site.shape is not None
        g.splice(site, dense(g, site), torch.zeros(site.shape[0], dtype=torch.float64))
    g.prune()
    assert {t.dtype for t in g.program.state_dict.values()} == {dtype}
    after = g.run(feeds)["output"]
    assert after.dtype == dtype
    close(after, before["output"])


@pytest.mark.parametrize("name", MATRICES)
def test_every_operator_stands_for_a_linear(name: str) -> None:
    """Opaque, lowered to plain aten at another batch size, and emitted as the same matrix."""
    operator = MATRICES[name].random(torch.Generator().manual_seed(0))
    m, n = operator.shape
    g = graph(Net(lambda s, x: torch.tanh(s.l(x)), l=nn.Linear(n, m)), normal(BATCH, 5, n))
    (site,) = sites(g)
    feeds = {"x": normal(OTHER, 7, n)[:, :5]}
    bias = g.const(site.places[0].bias)
    assert bias is not None
    expected = {"output": torch.tanh(feeds["x"] @ operator.dense().float().T + bias)}
    g.splice(site, operator)
    same(g.run(feeds), expected)
    lowered = FxGraph(lower(g))
    same(lowered.run(feeds), expected)
    assert not any("structured" in str(node.target) for node in lowered.nodes() if node.op == "call_function")
    assert isinstance(lowered.specs()[0].dims[0], str)
    assert "l.weight" not in lowered.program.state_dict


def test_index_tensors_are_buffers() -> None:
    g = graph(Net(lambda s, x: s.l(x), l=nn.Linear(8, 8, bias=False)), X)
    (site,) = sites(g)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    g.splice(site, Compose((Permutation(order, 8), Dense(normal(8, 8)))))
    g.prune()
    module = as_module(lower(g))
    assert [n for n, _ in module.named_buffers()] == ["l.structured.0"]
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["l.structured.1"]
    with torch.no_grad():
        close(module(FEEDS["x"]), FEEDS["x"][..., order] @ normal(8, 8))


def test_outputs_keep_names_and_order() -> None:
    """The rewritten linears ARE outputs, one of them twice, beside an input that is passed through."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            first = self.a(x)
            return {"twice": first, "through": x, "last": self.b(x), "again": first}

    g = graph(Many(), X)
    assert g.output_names() == ["twice", "through", "last", "again"]
    found = sites(g)
    clean = splices(g, found, FEEDS)
    expected = clean.run(FEEDS)
    lowered = FxGraph(lower(g))
    same(lowered.run(FEEDS), expected)
    with torch.no_grad():
        same(as_module(lower(g))(FEEDS["x"]), expected)
    for site in found:
        g.restore(site)
    same(g.run(FEEDS), expected)


def branches(s: Any, x: Tensor) -> Tensor:
    def yes(x: Tensor) -> Tensor:
        inner: Tensor = torch.cond(x.mean() > 1, lambda x: s.a(x), lambda x: s.b(x).sin(), (x,))
        return inner

    out: Tensor = torch.cond(x.sum() > 0, yes, lambda x: torch.relu(s.a(x)), (x,))
    return out


def test_conditional_branches_are_restored_and_lowered() -> None:
    net = Net(branches, a=nn.Linear(8, 8), b=nn.Linear(8, 8, bias=False))
    g = graph(net, X)
    untouched, found = state(g), sites(g)
    many = [{"x": FEEDS["x"].abs() * scale} for scale in (-1, 1, 20)]
    before = [g.run(feeds)["output"] for feeds in many]
    for site in found:
        g.splice(site, dense(g, site), torch.zeros(8))
    clean = g.clone()
    clean.prune()
    lowered = FxGraph(lower(g))
    assert set(clean.program.state_dict) == {"a.structured.0", "a.structured.bias", "b.structured.0", "b.structured.bias"}
    for feeds, expected in zip(many, before, strict=True):
        for form in (g, clean, lowered):
            close(form.run(feeds)["output"], expected)
    for site in found:
        g.restore(site)
    assert [torch.equal(g.run(feeds)["output"], e) for feeds, e in zip(many, before, strict=True)] == [True] * 3
    assert state(g)[1:] == untouched[1:]


def test_a_cast_weight_goes_though_tracing_asserted_its_dtype() -> None:
    g = graph(Net(lambda s, x: F.linear(x, s.w.float()), w=normal(6, 8).half()), X)
    clean = splices(g, sites(g), FEEDS)
    assert set(clean.program.state_dict) == {"w.structured.0"}


def test_gradients_flow_to_the_factors() -> None:
    torch.manual_seed(0)
    g = graph(mlp(), X)
    for site in sites(g):
        g.splice(site, factored(site, load_weight(g, site)))
    module = as_module(lower(g))
    module(FEEDS["x"]).square().mean().backward()
    grads = {n: p.grad for n, p in module.named_parameters()}
    assert set(grads) == {"a.structured.0", "a.structured.1", "b.structured.0", "b.structured.1", "a.bias", "b.bias"}
    assert all(grad is not None and bool(grad.any()) for grad in grads.values())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrences_stay_whole(kind: type[nn.RNNBase]) -> None:
    """One node, and the time axis a symbol: in the graph, in what is lowered, and in the program that was given."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = kind(8, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.rnn(x)[0])
            return out

    tagger = Tagger()
    program = export_module(tagger, [parse_input("x:float32[batch,seq,8]")], {})
    g = FxGraph.of(program)
    site = next(s for s in sites(g) if s.kind == "linear")
    g.splice(site, dense(g, site))
    lowered = FxGraph(lower(g))
    for form in (FxGraph(program), g, lowered):
        assert [str(d).isidentifier() for d in form.specs()[0].dims] == [True, True, False]
        assert sum(form.op(n) in ("lstm", "gru", "rnn") for n in form.nodes()) == 1
    for length in (1, 4, 9):
        x = normal(2, length, 8)
        with torch.no_grad():
            close(lowered.run({"x": x})["output"], tagger(x))


def test_onnx_has_one_opaque_node_for_each_place() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return torch.stack([s.b(torch.relu(s.a(torch.tanh(s.a(x))))), F.linear(x, s.w)])

    net = Net(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 6), w=normal(6, 8))
    g = FxGraph.of(export(net, X))
    for site in sites(g):
        g.splice(site, factored(site, load_weight(g, site)))
    model = g.to_onnx(20)
    opaque = [n for n in model.graph if n.domain == "structured"]
    assert [n.op_type for n in opaque] == ["Site"] * 4
    assert [n.attributes["site"].as_string() for n in opaque] == ["a", "a", "b", "w"]
    assert not {"a.weight", "b.weight", "w"} & set(model.graph.initializers)
    assert [v.name for v in model.graph.outputs] == g.output_names()
    assert not isinstance(model.graph.inputs[0].shape[0], int)
