"""absorb as users run it: DeepSeek decoders as transformers exports them, decoded step by step; and what is refused, with its reason."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewriter
from rewriter.backend import EmitOptions
from rewriter.backends.files.flat import PAST, PRESENT
from rewriter.backends.files.pt2 import load_pt2
from rewriter.backends.fx.target import TorchTarget
from rewriter.backends.onnx.target import OnnxRuntimeTarget
from rewriter.errors import RewriteError
from rewriter.graph import Graph, Site
from rewriter.opened import open_model
from rewriter.options import Options
from rewriter.passes.absorb import Absorb
from rewriter.passes.fuse_attention import FuseAttention
from rewriter.passes.pre_merge import PreMerge
from rewriter.passes.structures.attention import Attention
from rewriter.passes.structures.latent_attention import ALWAYS, LatentAttention
from rewriter.pipeline import Result
from rewriter.registry import sites, targets
from rewriter.rule import Decision
from rewriter.tolerances import EQUAL
from tests.engine.nets import FakeTarget, context, graph, normal
from tests.tools import tool

HEADS, NOPE, ROPE, RANK, WIDTH = 4, 6, 2, 10, 3
CALLS = (4, 1, 1, 3, 1)  # a prompt, then steps, one of them of several tokens


def deepseek(kind: str, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 64}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "kv_lora_rank": RANK, "q_lora_rank": None, "v_head_dim": WIDTH}
    parts = {"qk_rope_head_dim": ROPE, "qk_nope_head_dim": NOPE, "first_k_dense_replace": 9}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **heads, **parts, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@dataclass(frozen=True)
class Exported:
    """A decoder, its folder read, and the same as an ONNX file."""

    model: Any
    graph: Any
    file: Path


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    from rewriter.backends.files.onnx_file import save_onnx

    model, folder = deepseek("DeepseekV3"), tmp_path_factory.mktemp("v3")
    model.save_pretrained(folder)
    opened: Any = open_model(str(folder), Options()).graph
    save_onnx(opened.to_onnx(20), folder / "v3.onnx")
    return Exported(model, opened, folder / "v3.onnx")


def seconds(most: int) -> Callable[..., list[float]]:
    """What a target measures: absorbed is faster up to as many tokens."""

    def measure(self: Any, forms: list[Any], tokens: int, threads: int) -> list[float]:
        return [1.0 if getattr(form, "few", 0) == 0 else 0.5 if tokens <= most else 2.0 for form in forms]

    return measure


def rewritten(model: Any, target: str, out: Path, passes: str = "absorb", **options: Any) -> Result:
    given = {"samples": 4, "timing": False, "force": True, "tokens": "1,16", "opset": 20, **options}
    return rewriter.rewrite(model, passes, target=target, out=str(out), **given)


def decoded(run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], ids: Tensor) -> Tensor:
    """The logits of calls that hand their cache on."""
    cache, rows, at = [torch.zeros(len(ids), 1, 0, width) for width in (RANK, ROPE)], [], 0
    for count in CALLS:
        where = torch.arange(at, at + count).expand(len(ids), -1).contiguous()
        plain = {"input_ids": ids[:, at : at + count], "attention_mask": torch.ones(len(ids), at + count, dtype=torch.int64)}
        made = run({**plain, "position_ids": where, f"{PAST}0_keys": cache[0], f"{PAST}0_values": cache[1]})
        rows.append(made["logits"])
        cache = [made[f"{PRESENT}0_{side}"] for side in ("keys", "values")]
        at += count
    return torch.cat(rows, 1)


def right(run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], model: Any) -> None:
    ids = torch.randint(50, (2, sum(CALLS)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
    torch.testing.assert_close(decoded(run, ids), wanted, rtol=EQUAL[torch.float32][0], atol=EQUAL[torch.float32][1])


@pytest.mark.parametrize("most", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_a_file_decodes_what_it_did(most: int, v3: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and steps in one graph, whichever form each call takes."""
    monkeypatch.setattr(OnnxRuntimeTarget, "measure", seconds(most))
    result = rewritten(str(v3.file), "onnxruntime", tmp_path / "model.onnx")
    assert result.path is not None, result.message
    (row,) = [row for row in result.report.sites if row.kind == "attention"]
    assert (row.status, row.structure, row.exact) == ("rewritten", "absorb", True)
    assert row.reason.startswith(
        f"a latent of 10 absorbed {'in every call' if most == 16 else 'up to T=1, expanded above'}; after 2048 tokens"
    )
    (product,) = [row for row in result.report.sites if "kv_b_proj" in row.name]
    assert (product.status, product.cost["params"]["after"]) == ("rewritten", 0)
    assert product.reason == f"its weight is in {row.name} now"
    assert row.cost["params"]["after"] == product.cost["params"]["before"] == RANK * HEADS * (NOPE + WIDTH)
    assert row.cost["flops"]["after"] < row.cost["flops"]["before"]
    model = onnx.load(result.path)
    assert ("If" in [node.op_type for function in model.functions for node in function.node]) == (most == 1)
    assert "kv_b_proj" not in " ".join(tensor.name for tensor in model.graph.initializer)
    right(targets()["onnxruntime"]().open(result.path, 1), v3.model)


def test_a_program_decodes_what_it_did(v3: Exported, tmp_path: Path) -> None:
    g = v3.graph.clone()
    assert absorbed(g, tmp_path).rewritten
    target, path = TorchTarget(), tmp_path / "model.pt2"
    target.emit(g, path, EmitOptions())
    assert "cond" in [str(node.target) for node in load_pt2(path).graph.nodes]
    right(target.open(path, 1), v3.model)


@pytest.mark.slow
def test_other_decoders_are_read_too(tmp_path: Path) -> None:
    """DeepSeek-V2 turns by complex numbers; queries may have a latent of their own."""
    deepseek("DeepseekV2", q_lora_rank=8).save_pretrained(tmp_path)
    decision = absorbed(open_model(str(tmp_path), Options()).graph, tmp_path)
    assert isinstance(decision.operator, LatentAttention)
    assert (decision.operator.few, decision.operator.attention.heads, decision.operator.rope) == (1, HEADS, ROPE)


def absorbed(g: Graph, folder: Path, most: int = 1, **options: Any) -> Decision:
    """The decision on the one attention site."""
    found = list(sites(g))
    c = context(g, folder, target=target_of(most), selected=found, tokens=(1, 16))
    return next(d for d in Absorb(**options).run(g, c) if d.site.kind == "attention")


def target_of(most: int) -> FakeTarget:
    target = FakeTarget(lambda form: 1.0)
    target.measure = functools.partial(seconds(most), target)  # type: ignore[method-assign]
    return target


class Decoder(nn.Module):
    """(past, x) -> the present latents, and attention on what `expand` makes of them: keys and values of three heads."""

    def __init__(self, expand: Callable[..., tuple[Tensor, ...]], bias: bool = False, cached: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expand, self.cached = expand, cached
        self.query, self.down = nn.Linear(12, HEADS * (NOPE + ROPE)), nn.Linear(12, RANK)
        self.turned, self.up = nn.Linear(12, ROPE), nn.Linear(RANK, HEADS * (NOPE + WIDTH), bias=bias)

    def forward(self, x: Tensor, past: Tensor, turned: Tensor) -> Any:
        latent, rotated = self.down(x), self.turned(x)
        if self.cached:
            latent, rotated = torch.cat([past, latent], 1), torch.cat([turned, rotated], 1)
        query = self.query(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        key, value, *others = self.expand(self, latent, rotated, past)
        return F.scaled_dot_product_attention(query, key, value), latent, rotated, *others


def pieces(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    both = self.up(latent).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    nope, value = both.split([NOPE, WIDTH], -1)
    return torch.cat([nope, rotated[:, None].expand(-1, HEADS, -1, -1)], -1), value


INPUTS = ["x:float32[batch,seq,12]", f"past:float32[batch,past,{RANK}]", f"turned:float32[batch,past,{ROPE}]"]


def scaled(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    key, value = pieces(self, latent, 3 * rotated, past)
    return key * 2, value


@functools.cache
def traced(expand: Callable[..., tuple[Tensor, ...]]) -> Any:
    return graph(Decoder(expand).eval(), *INPUTS)


@pytest.mark.parametrize("expand", [pieces, scaled])
def test_a_cache_without_an_axis_for_heads(expand: Callable[..., tuple[Tensor, ...]], tmp_path: Path) -> None:
    g = traced(expand).clone()
    before = g.run(feeds := cached(2))
    decision = absorbed(g, tmp_path)
    assert isinstance(decision.operator, LatentAttention) and decision.operator.few == 1, decision.reason
    assert [g.op(n) for n in g.nodes()].count("structured") == 1
    for (name, got), wanted in zip(g.run(feeds).items(), before.values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=EQUAL[torch.float32][0], atol=EQUAL[torch.float32][1], msg=name)


def cached(time: int) -> dict[str, Tensor]:
    return {"x": normal(2, time, 12), "past": normal(2, 7, RANK, seed=1), "turned": normal(2, 7, ROPE, seed=2)}


def turned_by_heads(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    key, value = pieces(self, latent, rotated, past)
    return torch.cat([key[..., :NOPE], key[..., NOPE:] * self.query.bias[:HEADS, None, None]], -1), value


def squared(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    key, value = pieces(self, latent, rotated, past)
    return torch.cat([key[..., :NOPE] ** 2, key[..., NOPE:]], -1), value


def turned_first(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    key, value = pieces(self, latent, rotated, past)
    return torch.cat([key[..., NOPE:], key[..., :NOPE]], -1), value


def both(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, ...]:
    key, value = pieces(self, latent, rotated, past)
    return key, value, key


def exponential(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    key, value = pieces(self, latent, rotated, past)
    return torch.cat([key[..., :NOPE], key[..., NOPE:] + latent[:, None, :, :1].exp()], -1), value


def expanded_cache(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    key, value = pieces(self, latent, rotated, past)
    before = past.repeat(1, 1, 2)[:, None].expand(-1, HEADS, -1, -1)
    return torch.cat([before[..., : NOPE + ROPE], key], 2), torch.cat([before[..., :WIDTH], value], 2)


def with_a_third_part(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    key, value = pieces(self, latent, rotated, past)
    return key + past.sum((1, 2))[:, None, None, None], value


def latent_by_heads(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    both = self.up(latent[:, None].expand(-1, HEADS, -1, -1).relu())
    return torch.cat([both[..., :NOPE], rotated[:, None].expand(-1, HEADS, -1, -1)], -1), both[..., :WIDTH]


def values_only(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    _, value = pieces(self, latent, rotated, past)
    return F.pad(rotated, (NOPE, 0))[:, None].expand(-1, HEADS, -1, -1), value


def window(self: Decoder, latent: Tensor, rotated: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    return pieces(self, latent[:, 1:], rotated[:, 1:], past)


NOT_LINEAR = "its keys are not [c U^T, r], or its values not c W, for a latent c"
REFUSED: dict[str, tuple[Decoder, str]] = {
    "a rotated part for each head": (Decoder(turned_by_heads), NOT_LINEAR),
    "squared": (Decoder(squared), NOT_LINEAR),
    "another order": (Decoder(turned_first), NOT_LINEAR),
    "bias": (Decoder(pieces, bias=True), NOT_LINEAR),
    "exponential": (Decoder(exponential), NOT_LINEAR),
    "three parts": (Decoder(with_a_third_part), "its keys are not made of the latent of its values and one part that all heads share"),
    "a latent by heads": (Decoder(latent_by_heads), "its latent has more than batch, keys and features"),
    "keys of their own": (Decoder(values_only), "no part of its keys is made of the latent"),
    "a window": (Decoder(window), "what its keys and values are could not be checked: "),
    "keys and values in the cache": (Decoder(expanded_cache, cached=False), "its values are no product of one latent and a stored matrix"),
    "no cache": (Decoder(pieces, cached=False), "every key is a query of the same call: there is no cache whose expansion could be saved"),
    "read elsewhere": (Decoder(both), "its expanded keys or values are used elsewhere, too: they would be computed all the same"),
}


class Decoders(nn.Module):
    """One of each: one export for all of them."""

    def __init__(self, decoders: Iterable[Decoder]) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(decoders)

    def forward(self, x: Tensor, past: Tensor, turned: Tensor) -> list[Any]:
        return [decoder(x, past, turned) for decoder in self.decoders]


def test_what_is_no_attention_on_a_latent_is_kept(tmp_path: Path) -> None:
    g = graph(Decoders(model for model, _ in REFUSED.values()).eval(), *INPUTS)
    decisions = list(Absorb().run(g, context(g, tmp_path, target=target_of(1), selected=list(sites(g)), tokens=(1, 16))))
    assert [d.rewritten for d in decisions] == [False] * len(REFUSED)
    for (name, (_, reason)), decision in zip(REFUSED.items(), decisions, strict=True):
        assert decision.reason.startswith(reason) if reason.endswith(": ") else decision.reason == reason, name


def test_where_it_is_not_faster_it_is_kept_with_the_figures(tmp_path: Path) -> None:
    decision = absorbed(traced(pieces).clone(), tmp_path, most=0, cached=300)
    assert not decision.rewritten and decision.before == decision.after
    assert decision.reason.startswith("absorbing a latent of 10 is not faster after 300 tokens: 2000.000 ms against 1000.000 ms expanded")
    assert absorbed(traced(pieces).clone(), tmp_path, most=99).operator.few == ALWAYS  # type: ignore[union-attr]


def test_a_cache_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match=r"absorb:cached=0 is out of range; give a number of tokens above 0, such as 2048"):
        absorbed(traced(pieces).clone(), tmp_path, cached=0)


def ran(g: Graph, passes: list[Any], folder: Path, most: int) -> dict[str, Decision]:
    """One pass after the other."""
    found: list[Site] = list(sites(g))
    c = context(g, folder, target=target_of(most), selected=found, tokens=(1, 16))
    c.target.name = "onnxruntime"
    for step in passes:
        for decision in step.run(g, c):
            c.decisions[decision.site.id] = decision
    return {d.site.kind: d for d in c.decisions.values() if d.rewritten or d.site.kind == "attention"}


@pytest.mark.parametrize("step", [Absorb(), PreMerge()], ids=["absorb", "pre-merge"])
def test_what_was_made_one_operation_is_seen_through(step: Any, tmp_path: Path) -> None:
    g = traced(pieces).clone()
    before = g.run(feeds := cached(1))
    decisions = ran(g, [FuseAttention(), step], tmp_path, most=1)
    assert isinstance(decisions["attention"].operator, LatentAttention)
    assert decisions["linear"].part_of == decisions["attention"].site.name
    torch.testing.assert_close(g.run(feeds), before, rtol=EQUAL[torch.float32][0], atol=EQUAL[torch.float32][1])


def test_and_stays_one_operation_where_absorbing_does_not_pay(tmp_path: Path) -> None:
    g = traced(pieces).clone()
    before = g.run(feeds := cached(1))
    assert isinstance(ran(g, [FuseAttention(), Absorb()], tmp_path, most=0)["attention"].operator, Attention)
    assert [g.op(n) for n in g.nodes()].count("structured") == 1
    torch.testing.assert_close(g.run(feeds), before, rtol=EQUAL[torch.float32][0], atol=EQUAL[torch.float32][1])


def test_what_is_absorbed_stays_so(tmp_path: Path) -> None:
    decisions = ran(traced(pieces).clone(), [Absorb(), FuseAttention(), Absorb(), PreMerge()], tmp_path, most=1)
    assert isinstance(decisions["attention"].operator, LatentAttention)


@pytest.mark.slow
def test_the_bench_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_mla.py", "--quick"])
    tool("bench_mla").main()
    assert capsys.readouterr().out.count("attention core") == 2


def test_the_bench_prints_nothing_of_what_is_off() -> None:
    with pytest.raises(SystemExit, match=r"red: logits are off by 1.0e-01; no figure is printed"):
        tool("bench_mla").equal(torch.ones(2), torch.tensor([1.0, 1.1]), "logits")
