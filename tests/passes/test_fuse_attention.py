"""fuse-attention as users run it: a model in, a checked file out whose attention is one operation, the same results at every size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewriter
from rewriter.backends.files.pt2 import load_pt2
from rewriter.graph import Graph, Site
from rewriter.passes.detect.attention import detect
from rewriter.passes.fuse_attention import FuseAttention
from rewriter.pipeline import Result
from rewriter.registry import targets
from rewriter.rule import Decision
from rewriter.tolerances import EQUAL
from tests.engine.nets import FakeTarget, context, graph, normal

WIDTH, HEADS = 24, 4
INPUTS = ["x:float32[batch,time,24]", "attention_mask:int64[batch,time]"]
SUFFIX = {"torch": ".pt2", "onnx": ".onnx", "onnxruntime": ".onnx"}
LOWEST = torch.finfo(torch.float32).min
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


class Layer(nn.Module):
    """x -> attend(q, k, v, mask) -> linear; `shared` heads of keys and values."""

    def __init__(self, attend: Attend, shared: int = HEADS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.counts = attend, (HEADS, shared, shared)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH // HEADS * count) for count in self.counts)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Any:
        q, k, v = (p(x).unflatten(-1, (n, -1)).transpose(1, 2) for p, n in zip(self.projections, self.counts, strict=True))
        found = self.attend(q, k, v, attention_mask[:, None, None, :])
        y, *others = found if isinstance(found, tuple) else (found,)
        y = self.last(y.transpose(1, 2).flatten(2))
        return (y, *others) if others else y


class Layers(nn.Module):
    """One of each of ATTENDS: one export for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(*ATTENDS[name]) for name in ATTENDS)

    def forward(self, x: Tensor, attention_mask: Tensor) -> list[Tensor]:
        return [layer(x, attention_mask) for layer in self.layers]


def weights(q: Tensor, k: Tensor, change: Callable[[Tensor], Tensor] = lambda z: z) -> Tensor:
    return change(q @ k.mT * 0.4).softmax(-1)


def repeated(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)


ATTENDS: dict[str, tuple[Attend, int]] = {
    "lowest added": (lambda q, k, v, m: weights(q, k, lambda z: z + (1.0 - (m > 0).float()) * LOWEST) @ v, HEADS),
    "lowest by where": (lambda q, k, v, m: weights(q, k, lambda z: torch.where(m > 0, z, LOWEST)) @ v, HEADS),
    "infinite": (lambda q, k, v, m: weights(q, k, lambda z: z.masked_fill(m == 0, float("-inf"))) @ v, HEADS),
    "infinite and added": (
        lambda q, k, v, m: weights(q, k, lambda z: z.masked_fill(m == 0, float("-inf")) + q[..., :1]) @ v,
        HEADS,
    ),
    "groups": (lambda q, k, v, m: weights(q, repeated(k)) @ repeated(v), 2),
    "sdpa, boolean": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m > 0), HEADS),
    "sdpa, causal": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True), HEADS),
}
QUICK = {("torch", 20), ("onnxruntime", 20)}
PLACES = [("torch", 20), ("onnx", 20), ("onnx", 23), ("onnx", 25), ("onnxruntime", 20), ("onnxruntime", 23)]


def feeds(batch: int, time: int) -> dict[str, Tensor]:
    """The first sequence shows no token at all, where there are others."""
    shown = (torch.arange(time) < torch.arange(batch, 0, -1)[:, None] * 2).long()
    if batch > 1:
        shown[0] = 0
    return {"x": normal(batch, time, WIDTH, seed=batch), "attention_mask": shown}


def run(model: Any, target: str, opset: int, folder: Path, **options: Any) -> Result:
    given: dict[str, Any] = {"inputs": INPUTS if isinstance(model, nn.Module) else None, "samples": 4, "timing": False, "force": True}
    out = folder / f"model{SUFFIX[target]}"
    return rewriter.rewrite(model, "fuse-attention", target=target, opset=opset, out=str(out), **{**given, **options})


def kinds(path: Path) -> list[str]:
    """The operations that a file computes attention with."""
    if path.suffix == ".pt2":
        names = [str(node.target) for node in load_pt2(path).graph.nodes if node.op == "call_function"]
        return [name for name in names if "scaled_dot" in name or "softmax" in name]
    model = onnx.load(path)
    nodes = [node for function in model.functions for node in function.node] + list(model.graph.node)
    return [node.op_type for node in nodes if node.domain != "structured" and ("Attention" in node.op_type or node.op_type == "Softmax")]


def same(result: Result, target: str, reference: Callable[..., Any], given: dict[str, Tensor]) -> None:
    assert result.path is not None, result.message
    with torch.no_grad():
        expected = reference(**given)
    rtol, atol = EQUAL[torch.float32]
    got = list(targets()[target]().open(result.path, 1)(given).values())
    for one, other in zip(got, expected if isinstance(expected, list) else [expected], strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)


@functools.cache
def program() -> torch.export.ExportedProgram:
    sizes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in ("x", "attention_mask")}
    with torch.no_grad():
        return torch.export.export(Layers().eval(), (), feeds(2, 5), dynamic_shapes=sizes, strict=False)


@pytest.mark.parametrize(("target", "opset"), [pytest.param(*place, marks=() if place in QUICK else pytest.mark.slow) for place in PLACES])
def test_results_stay_also_where_no_key_is_seen(target: str, opset: int, tmp_path: Path) -> None:
    model = Layers().eval()
    result = run(program(), target, opset, tmp_path)
    assert result.exit_code == 0 and result.path is not None, result.message
    rows = dict(zip(ATTENDS, (row for row in result.report.sites if row.kind == "attention"), strict=True))
    for name, row in rows.items():
        kept = target == "torch" and name.startswith("sdpa")
        assert (row.status, row.structure, row.exact) == (("kept", None, False) if kept else ("rewritten", "attention", True)), name
        assert row.reason == "already one operation" if kept else row.reason.startswith("one operation: softmax attention, 4 heads of 6")
        assert row.cost["flops"]["before"] == row.cost["flops"]["after"] > 0
    found = kinds(result.path)
    assert len(found) == len(ATTENDS)
    if target == "torch":
        assert all("scaled_dot_product_attention" in kind for kind in found)
    elif target == "onnx":
        assert set(found) == ({"Softmax"} if opset < 23 else {"Attention"})
    for batch, time in [(1, 1), (2, 5), (3, 8)]:
        same(result, target, model, feeds(batch, time))


@pytest.mark.parametrize("lowering", ["contrib", "standard"])
def test_onnx_runtime_gets_what_is_measured_to_be_fastest(lowering: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter.backends.onnx import lowering as module

    monkeypatch.setattr(module, "_chosen", {})
    monkeypatch.setattr(module, "measure_lowerings", lambda spec, rank, among, *_: [float(name != lowering) for name in among])
    model = Layer(ATTENDS["lowest added"][0]).eval()
    result = run(model, "onnxruntime", 23, tmp_path)
    assert result.path is not None
    assert kinds(result.path) == [{"contrib": "MultiHeadAttention", "standard": "Attention"}[lowering]]
    same(result, "onnxruntime", model, feeds(2, 5))


def fused(model: nn.Module, folder: Path, target: str = "torch", sites: Callable[[Graph], list[Site]] | None = None) -> Decision:
    g = graph(model, *INPUTS)
    selected = (sites or (lambda g: list(detect(g))))(g)
    place = FakeTarget(lambda form: 1.0)
    place.name = target
    (decision,) = FuseAttention().run(g, context(g, folder, target=place, selected=selected))
    assert decision.before == decision.after
    return decision


@pytest.mark.parametrize(
    ("attend", "what"),
    [
        (lambda q, k, v, m: (weights(q, k) @ v, weights(q, k)), None),  # two softmaxes, one of them no attention
        (lambda q, k, v, m: (lambda p: (p @ v, p))(weights(q, k)), "softmax inside it is used elsewhere, too"),
        (lambda q, k, v, m: (lambda z: (z.softmax(-1) @ v, z))(q @ k.mT), "matmul inside it is used elsewhere, too"),
    ],
    ids=["its own", "weights", "scores"],
)
def test_what_is_used_elsewhere_is_kept(attend: Attend, what: str | None, tmp_path: Path) -> None:
    decision = fused(Layer(attend), tmp_path)
    assert decision.rewritten == (what is None)
    assert what is None or decision.reason.startswith(what)


def test_what_was_not_read_is_kept_with_the_reason(tmp_path: Path) -> None:
    decision = fused(Layer(lambda q, k, v, m: weights(q, k, torch.tanh) @ v), tmp_path)
    assert not decision.rewritten
    assert decision.reason == "tanh stands between the product and the softmax"


def test_one_operation_is_left_where_the_target_has_it(tmp_path: Path) -> None:
    model = Layer(ATTENDS["sdpa, causal"][0])
    assert fused(model, tmp_path).reason == "already one operation"
    decision = fused(model, tmp_path, target="onnxruntime")
    assert decision.rewritten and decision.exact
    assert decision.reason == "one operation: softmax attention, 4 heads of 6, causal"


def test_onnx_attention_is_left(tmp_path: Path) -> None:
    first = run(Layer(ATTENDS["groups"][0], 2).eval(), "onnx", 23, tmp_path)
    assert first.path is not None
    model = ir.load(first.path)
    ir.passes.common.InlinePass()(model)
    model.graph.opset_imports.pop("structured", None)
    again = run(model, "onnx", 23, tmp_path, allow_noop=True)
    assert [row.reason for row in again.report.sites if row.kind == "attention"] == ["already one operation"]


def test_what_an_earlier_pass_rewrote_stays(tmp_path: Path) -> None:
    g = graph(Layer(ATTENDS["groups"][0], 2), *INPUTS)
    (site,) = detect(g)
    earlier = Decision(site, "done", operator=site.form)
    c = context(g, tmp_path, selected=[site], decisions={site.id: earlier})
    assert list(FuseAttention().run(g, c)) == [earlier]


def test_what_cannot_be_placed_is_kept(tmp_path: Path) -> None:
    """Its mask is computed from a result of its own place's reader."""

    def late(g: Graph) -> list[Site]:
        (site,) = detect(g)
        assert site.region is not None and site.region.outputs[0] is not None
        after = g.users(g.users(site.region.outputs[0].value)[0])[0]
        port = replace(site.region.inputs[0], value=after)
        return [replace(site, region=replace(site.region, inputs=(port, *site.region.inputs[1:])))]

    decision = fused(Layer(ATTENDS["groups"][0], 2), tmp_path, sites=late)
    assert decision.reason == "some of its results are used before all of its inputs are there"


def bert() -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20, "max_position_embeddings": 32}
    return BertModel(BertConfig(vocab_size=50, attn_implementation="eager", **sizes), add_pooling_layer=False)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2Model

    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2Model(GPT2Config(vocab_size=50, attn_implementation="eager", use_cache=False, **sizes))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=50, attn_implementation="eager", use_cache=False, **sizes))


class Hidden(nn.Module):
    """The last hidden state of a transformer."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = make()

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        return found


@functools.cache
def hidden(make: Callable[[], Any]) -> Hidden:
    return Hidden(make).eval()


def padded(batch: int, time: int) -> dict[str, Tensor]:
    """Padded on the left, so that causal rows see no key."""
    shown = (torch.arange(time) >= torch.arange(batch)[:, None]).long()
    return {"ids": torch.randint(0, 50, (batch, time), generator=torch.Generator().manual_seed(time)), "attention_mask": shown}


FAST = {("bert", "onnx", 23), ("llama", "torch", 20)}
MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama}
RUNS = [(name, target, opset) for name in MODELS for target, opset in PLACES if (name, opset) not in {("llama", 23), ("llama", 25)}]


@pytest.mark.parametrize(
    ("name", "target", "opset"), [pytest.param(*r, marks=() if r in FAST else pytest.mark.slow, id="-".join(map(str, r))) for r in RUNS]
)
def test_transformers(name: str, target: str, opset: int, tmp_path: Path) -> None:
    """torch's own exporter writes a RotaryEmbedding that ONNX Runtime refuses from opset 23 on, so llama stays below."""
    model = hidden(MODELS[name])
    specs = ["ids:int64[batch,time]", "attention_mask:int64[batch,time]"]
    result = run(model, target, opset, tmp_path, inputs=specs)
    assert result.exit_code == 0 and result.path is not None, result.message
    rows = [row for row in result.report.sites if row.kind == "attention"]
    assert [row.status for row in rows] == ["rewritten"] * 2
    assert ("4 heads of 6 on 2" in rows[0].reason) == (name == "llama")
    found = kinds(result.path)
    assert len(found) == (2 if target == "torch" else 1)  # ONNX has one function for both layers
    for batch, time in [(1, 3), (3, 7)]:
        same(result, target, model, padded(batch, time))


def test_from_a_file_of_a_lower_opset(tmp_path: Path) -> None:
    """ONNX in, its own spelling found; the file is brought to the asked opset first."""
    model = Layer(ATTENDS["groups"][0], 2).eval()
    first = rewriter.rewrite(
        model, "pre-merge", INPUTS, "onnx", out=str(tmp_path / "dense.onnx"), opset=20, samples=4, timing=False, allow_noop=True
    )
    assert first.path is not None
    result = run(str(first.path), "onnx", 23, tmp_path)
    assert result.path is not None and kinds(result.path) == ["Attention"]
    same(result, "onnx", model, feeds(3, 8))
