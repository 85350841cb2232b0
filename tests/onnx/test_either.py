"""Two forms of one matrix, by the number of tokens: in a .pt2, in an emitted ONNX file, and with each form in kernels of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from rewriter.algebra import ByTokens, Compose, Dense, Diagonal
from rewriter.backend import EmitOptions, Runner
from rewriter.backends.files.onnx_file import load_onnx
from rewriter.backends.files.pt2 import load_pt2
from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.fx.target import TorchTarget
from rewriter.backends.kernels.covering import covers
from rewriter.backends.kernels.session import coverage, open_covered, trusted
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.backends.onnx.measure import measure
from rewriter.backends.onnx.target import OnnxRuntimeTarget
from rewriter.cost import dense_cost
from rewriter.graph import load_weight
from rewriter.operator import AbstractMatrix
from tests.engine import nets as engine
from tests.fx.models import BATCH, Net, close, graph, normal, sites

MOST = 15  # of 5, 10, 15, 20 and 35 tokens three counts
BATCHES = (1, 2, 3, 4, 7)
OPTIONS = EmitOptions(tokens=(1, 64))
Making = Callable[[Tensor], AbstractMatrix]


def factored(w: Tensor) -> AbstractMatrix:
    return Compose((Dense(torch.eye(8)), Dense(w.T.contiguous())))


def doubled(w: Tensor) -> AbstractMatrix:
    """Another matrix, so that one can see which form ran."""
    return Dense(2 * w.T.contiguous())


def scaled(w: Tensor) -> AbstractMatrix:
    return Compose((Diagonal(torch.ones(8)), Dense(w.T.contiguous())))


def spliced(few: Making, many: Making) -> FxGraph:
    g = graph(Net(lambda s, x: s.b(torch.relu(s.a(x))), a=nn.Linear(8, 12), b=nn.Linear(12, 4)), normal(BATCH, 5, 8))
    site = sites(g)[0]
    w = load_weight(g, site)
    g.splice(site, ByTokens(few(w), many(w), MOST))
    return g


def check(run: Runner, g: FxGraph) -> None:
    """Each count of tokens meets its own form; the other one is off by a factor."""
    stored = {n: p.detach() for n, p in g.program.state_dict.items()}
    for batch in BATCHES:
        x = normal(batch, 5, 8, seed=batch)
        factor = 1 if batch * 5 <= MOST else 2
        hidden = torch.relu(factor * x @ stored["a.weight"].T + stored["a.bias"])
        close(run({"x": x})["output"], hidden @ stored["b.weight"].T + stored["b.bias"])


def test_a_pt2_runs_the_form_of_its_tokens(tmp_path: Path) -> None:
    g = spliced(factored, doubled)
    TorchTarget().emit(g, tmp_path / "m.pt2", OPTIONS)
    check(TorchTarget().open(tmp_path / "m.pt2", 1), g)
    again = FxGraph.of(load_pt2(tmp_path / "m.pt2"))
    assert [again.op(node) for node in again.nodes()].count("cond") == 1


@pytest.mark.parametrize("flatten", [False, True], ids=["functions", "flat"])
def test_an_onnx_file_runs_the_form_of_its_tokens(tmp_path: Path, flatten: bool) -> None:
    g = spliced(factored, doubled)
    target = OnnxRuntimeTarget()
    target.emit(g, tmp_path / "m.onnx", EmitOptions(flatten=flatten, tokens=(1, 64)))
    check(target.open(tmp_path / "m.onnx", 1), g)
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)


@pytest.mark.parametrize("few", [factored, scaled], ids=["covered", "left"])
def test_kernels_see_each_form_alone(tmp_path: Path, few: Making) -> None:
    g = spliced(few, doubled)
    OnnxRuntimeTarget().emit(g, tmp_path / "m.onnx", OPTIONS)
    found = coverage(tmp_path / "m.onnx")
    reasons = {
        "Compose": "scales beside a product have no kernel" if few is scaled else "",
        "Dense": "a dense weight is left to ONNX Runtime",
    }
    assert {c.kind: c.reason for c in found} == reasons
    check(open_covered(tmp_path / "m.onnx", 1), g)
    w = normal(12, 8)
    assert covers(ByTokens(few(w), doubled(w), MOST), trusted()) == (few is factored)
    assert len(measure([doubled(w), ByTokens(few(w), doubled(w), MOST)], 2, 1, kernels=True)) == 2


def test_what_a_file_says_wrongly_of_two_forms_is_left_to_its_body(tmp_path: Path) -> None:
    g = spliced(factored, doubled)
    OnnxRuntimeTarget().emit(g, tmp_path / "m.onnx", OPTIONS)
    model = onnx.load(tmp_path / "m.onnx")
    node = next(n for n in model.graph.node if n.op_type == "ByTokens")
    for entry in node.metadata_props:
        if entry.key == "rewriter.spec":
            entry.value = entry.value.replace('"factors":{"tuple":[', '"factors":{"tuple":[{"operator":"Nothing","fields":{}},')
    onnx.save(model, tmp_path / "lying.onnx")
    (left,) = coverage(tmp_path / "lying.onnx")
    assert left.kind == "ByTokens" and "unknown operator 'Nothing'" in left.reason
    check(open_covered(tmp_path / "lying.onnx", 1), g)


def test_an_emitted_file_is_read_back_as_one_operator(tmp_path: Path) -> None:
    g = spliced(factored, doubled)
    OnnxRuntimeTarget().emit(g, tmp_path / "m.onnx", OPTIONS)
    again = OnnxGraph(load_onnx(tmp_path / "m.onnx"))
    (held,) = [again.operator(node) for node in again.nodes() if again.op(node) == "structured"]
    assert isinstance(held, ByTokens) and held.most == MOST and isinstance(held.few, Compose)


def test_both_forms_are_stored_and_one_is_executed() -> None:
    w = normal(12, 8)
    made = ByTokens(factored(w), doubled(w), MOST)
    assert made.cost(MOST).params == made.cost(MOST + 1).params == 8 * 8 + 2 * 8 * 12
    assert made.cost(MOST).flops == factored(w).cost(MOST).flops
    assert made.cost(MOST + 1).flops == dense_cost((12, 8), 4, MOST + 1).flops


@pytest.mark.parametrize("target", [TorchTarget(), OnnxRuntimeTarget()], ids=["torch", "onnxruntime"])
def test_one_token_is_few(tmp_path: Path, target: TorchTarget | OnnxRuntimeTarget) -> None:
    """No exporter decides ahead of time that there are more."""
    g = engine.graph(engine.Net(lambda s, x: torch.relu(s.a(x)), a=nn.Linear(8, 12, bias=False)), "x:float32[batch,seq,8]")
    (site,) = engine.sites(g)
    w = load_weight(g, site)
    g.splice(site, ByTokens(factored(w), doubled(w), 1))
    path = tmp_path / f"m{target.suffix}"
    target.emit(g, path, OPTIONS)
    run = target.open(path, 1)
    for batch, seq in ((1, 1), (1, 2), (2, 1), (3, 5)):
        x = normal(batch, seq, 8, seed=seq)
        close(next(iter(run({"x": x}).values())), torch.relu(x @ w.T) * (1 if batch * seq == 1 else 2))
