"""Stretches of a model: found alike before and after rewriting, each alone computes what it computes in the model, and is timed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from rewriter import registry
from rewriter.backend import Layer as LayerAlone
from rewriter.backend import Whole
from rewriter.backends.onnx import measure
from rewriter.backends.onnx.emit import attach
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.backends.onnx.part import leaves, part
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.stretch import layers, stretches
from rewriter.backends.onnx.target import OnnxRuntimeTarget
from rewriter.options import Options
from rewriter.pipeline import rewrite
from tests.engine.nets import as_onnx, graph
from tests.onnx.models import close, model

X = "x:float32[batch,time,24]"
FEEDS = {"x": torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))}
ENDED = ["MatMul", "Add", "Add", "LayerNormalization"]
SPELLED = ["MatMul", "Softmax", "MatMul"]


class Layer(nn.Module):
    """A transformer's layer, its attention spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out, self.down = (nn.Linear(n, 24) for n in (24, 24, 24, 24, 48))
        self.up, self.norm = nn.Linear(24, 48), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).reshape(*x.shape[:2], 4, 6).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = ((q @ k.transpose(-1, -2)) / 6**0.5).softmax(-1) @ v
        h = self.norm(self.out(mixed.transpose(1, 2).reshape(x.shape)) + x)
        return self.down(nn.functional.gelu(self.up(h))) + h


@pytest.fixture(scope="module")
def dense() -> OnnxGraph:
    torch.manual_seed(0)
    found = as_onnx(graph(Layer(), X))
    assert isinstance(found, OnnxGraph)
    return found


@pytest.fixture(scope="module")
def rewritten(dense: OnnxGraph, tmp_path_factory: pytest.TempPathFactory) -> OnnxGraph:
    """The layer with `up` in rank 3 and its attention in one operator."""
    folder = tmp_path_factory.mktemp("stretch")
    ir.save(dense.model, folder / "dense.onnx")
    common = {"objective": "params", "timing": False, "force": True, "quiet": True}
    chosen = Options(passes="fuse-attention,low-rank:rank=3", include=("up", "*attention*"), out=str(folder / "new.onnx"), **common)  # type: ignore[arg-type]
    assert rewrite(str(folder / "dense.onnx"), chosen).exit_code == 0
    return OnnxGraph(ir.load(folder / "new.onnx"))


def kinds(found: Counter[LayerAlone]) -> list[list[str]]:
    return sorted([node.op_type for node in layer.what.model(1).graph] for layer in found.elements())


def test_layers_have_their_endings_and_attention_its_transposes(dense: OnnxGraph, rewritten: OnnxGraph) -> None:
    before, after = (layers(g, registry.sites(g), FEEDS) for g in (dense, rewritten))
    assert sum(before.values()) == sum(after.values()) == 7
    gone, come = (sorted(kinds(found), key=len) for found in (before - after, after - before))
    assert kinds(before).count(ENDED) == 1 and len(gone) == len(come) == 2  # what nothing touched is the same in both
    assert gone[0] == ["MatMul", "Add", "Gelu"] and come[0] == ["LowRank", "Add", "Gelu"]
    assert [op for op in gone[1] if op in SPELLED] == SPELLED and gone[1].count("Transpose") == 4
    assert "Attention" in come[1] and come[1].count("Transpose") == 4


def values(g: OnnxGraph, wanted: set[ir.Value]) -> dict[ir.Value, Tensor]:
    found: dict[ir.Value, Tensor] = {}
    g.run(FEEDS, {v: lambda tensor, v=v: found.update({v: tensor}) for v in wanted if g.can_tap(v) and not g.is_const(v)})
    return found


@pytest.mark.parametrize("which", ["dense", "rewritten"])
def test_each_alone_computes_what_it_computes_in_the_model(which: str, request: pytest.FixtureRequest) -> None:
    g: OnnxGraph = request.getfixturevalue(which)
    found = list(stretches(g, registry.sites(g)))
    assert len({node for nodes in found for node in nodes}) == sum(map(len, found))  # each node once
    for nodes in found:
        known = values(g, {v for node in nodes for v in (*node.inputs, *node.outputs) if v is not None})
        dims = {v: list(t.shape) for v, t in known.items()}
        alone = part(nodes, dims, g.constants, g.opset)
        made = {v for node in nodes for v in node.outputs}
        read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and v in known and v not in made)
        attach(alone)
        feeds = {a.name or "": known[v] for a, v in zip(alone.graph.inputs, read, strict=True)}
        results = Session(ir.to_proto(alone).SerializeToString(), 1)(feeds).values()
        wanted = [known[v] for node in nodes for v in node.outputs if leaves(v, nodes)]
        assert wanted
        for result, expected in zip(results, wanted, strict=True):
            close(result, expected)


@pytest.mark.parametrize("kernels", [False, True])
def test_times_are_taken_together_and_kept(
    kernels: bool, dense: OnnxGraph, rewritten: OnnxGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "SECONDS", 0.001)
    calls: list[int] = []
    target = OnnxRuntimeTarget(kernels=kernels)
    found = [*target.layers(dense, registry.sites(dense), FEEDS), *target.layers(rewritten, registry.sites(rewritten), FEEDS)]
    whole = Whole("m", lambda: calls.append(1))
    seconds = target.measure_layers(found, whole, 1)
    assert len(seconds) == len(found) + 1 and all(s > 0 for s in seconds) and calls
    calls.clear()
    assert target.measure_layers(found, whole, 1) == seconds and not calls
    target.measure_layers(found, Whole("another", whole.call), 1)
    assert calls


@pytest.mark.parametrize(("nbytes", "tokens", "together", "copies"), [(1000, 1, 9500, 10), (1000, 8, 500, 2), (1000, 9, 9500, 2)])
def test_few_tokens_meet_weights_where_the_rest_of_the_model_leaves_them(nbytes: int, tokens: int, together: int, copies: int) -> None:
    assert measure.copies_of_bytes(nbytes, tokens, together) == copies


def test_what_stands_in_a_nested_body_is_left_out() -> None:
    text = """
g (float[B,6] x, bool c) => (float[B,6] y) {
  a = MatMul(x, w)
  y = If(c) <then_branch = t () => (float[B,6] u) { u = MatMul(a, w2) }, else_branch = e () => (float[B,6] v) { v = Identity(a) }>
}"""
    g = OnnxGraph(model(text, 20, {"w": (6, 6), "w2": (6, 6)}))
    feeds: Mapping[str, Tensor] = {"x": torch.randn(3, 6), "c": torch.tensor(True)}
    assert kinds(layers(g, registry.sites(g), feeds)) == [["MatMul"]]
