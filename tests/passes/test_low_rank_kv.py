"""low-rank-kv as users run it: decoders that transformers exports, decoded from caches of latents; and what is refused, with its reason."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rewriter
from rewriter import compare
from rewriter.backend import EmitOptions
from rewriter.backends.files.flat import PAST, PRESENT
from rewriter.backends.files.onnx_file import save_onnx
from rewriter.backends.fx.target import TorchTarget
from rewriter.backends.onnx.target import OnnxRuntimeTarget
from rewriter.calibrate import Samples
from rewriter.errors import RewriteError
from rewriter.graph import Graph
from rewriter.inputs import InputSpec
from rewriter.moments import isotropic
from rewriter.opened import open_model
from rewriter.options import Options
from rewriter.passes.fuse_attention import FuseAttention
from rewriter.passes.low_rank_kv import LowRankKv
from rewriter.passes.solvers.grouped_low_rank import grouped
from rewriter.passes.structures.attention import Attention
from rewriter.passes.structures.latent_attention import LatentAttention
from rewriter.passes.structures.latent_values import LatentValues
from rewriter.registry import sites, targets
from rewriter.rule import Decision, given_up
from rewriter.tolerances import EQUAL
from tests.engine.nets import FakeTarget, as_onnx, context, graph, normal, planted
from tests.tools import tool

HEADS, WIDTH, GROUPS, RANK = 4, 6, 2, 5
STEPS = 6
BETWEEN = "turned by position, or otherwise changed, between their product and the cache"


def gpt2() -> Any:
    """Keys and values of rank 5 in every two heads: values with any bias of theirs, keys without, as a bias of keys changes nothing."""
    import transformers

    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": HEADS * WIDTH, "n_head": HEADS, "vocab_size": 50, "n_positions": 128}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()
    n, m = HEADS * WIDTH, 2 * WIDTH
    for i, block in enumerate(model.transformer.h):
        with torch.no_grad():
            block.attn.c_attn.bias.normal_()
            for group in range(GROUPS):
                at = [n * (1 + side) + m * group for side in (0, 1)]
                block.attn.c_attn.weight[:, at[0] : at[0] + m] = planted(n, m, RANK, 10 * i + group)
                block.attn.c_attn.weight[:, at[1] : at[1] + m] = planted(n, m, RANK - 1, 10 * i + group + 5)
    return model


def llama() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)).eval()


def exported(model: Any, folder: Path) -> Graph:
    model.save_pretrained(folder)
    found: Graph = open_model(str(folder), Options()).graph
    found.prune()
    return found


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graph]:
    """The decoders, as torch and as ONNX graphs."""
    found = {name: exported(make(), tmp_path_factory.mktemp(name)) for name, make in (("gpt2", gpt2), ("llama", llama))}
    return {**found, **{f"{name} in onnx": as_onnx(g) for name, g in found.items()}}


def seconds(self: Any, forms: list[Any], tokens: int, threads: int) -> list[float]:
    """What a target measures: absorbed is faster for one token."""
    return [1.0 if getattr(form, "few", 0) == 0 else 0.5 if tokens == 1 else 2.0 for form in forms]


def feeds(g: Graph, time: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(50, (2, time), generator=torch.Generator().manual_seed(0))
    where = torch.arange(time).expand(2, -1).contiguous()
    caches = {s.name: torch.zeros(s.shape({"batch": 2, "past": 0})) for s in g.specs() if s.name.startswith(PAST)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": where, **caches}


def run(g: Graph, folder: Path, step: Any, earlier: tuple[Any, ...] = (), data: Mapping[str, Tensor] | None = None) -> list[Decision]:
    target = FakeTarget(lambda form: 1.0)
    target.measure = lambda *given: seconds(target, *given)  # type: ignore[method-assign]
    samples = Samples([feeds(g, 40) if data is None else data], "data: test", "k")
    c = context(g, folder, target=target, data=samples, selected=list(sites(g)), tokens=(1, 16))
    for one in (*earlier, step):
        found = list(one.run(g, c))
        c.decisions.update({d.site.id: d for d in found})
    return found


def attention(found: list[Decision]) -> Decision:
    return next(d for d in found if d.site.kind == "attention")


def close(got: Tensor, wanted: Tensor) -> None:
    rtol, atol = EQUAL[got.dtype]
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol)


def steps(call: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], specs: list[InputSpec], ids: Tensor) -> tuple[Tensor, Tensor]:
    """(ids, their logits): a prompt, then the likeliest token each time."""
    cache, rows = {s.name: torch.zeros(s.shape({"batch": len(ids), "past": 0})) for s in specs}, []
    for at in range(STEPS):
        fresh = ids[:, -1:] if at else ids
        where = torch.arange(ids.shape[1] - fresh.shape[1], ids.shape[1]).expand(len(ids), -1).contiguous()
        made = call({"input_ids": fresh, "attention_mask": torch.ones_like(ids), "position_ids": where, **cache})
        rows.append(made["logits"])
        cache = {name: made[name.replace(PAST, PRESENT)] for name in cache}
        ids = torch.cat([ids, made["logits"][:, -1:].argmax(-1)], 1)
    return ids, torch.cat(rows, 1)


def rewritten(g: Graph, folder: Path, passes: str, **options: Any) -> Any:
    save_onnx(g.model, folder / "dense.onnx")  # type: ignore[attr-defined]
    given = {"samples": 4, "timing": False, "force": True, "tokens": "1,16", "opset": 20, "target": "onnxruntime", **options}
    return rewriter.rewrite(str(folder / "dense.onnx"), passes, out=str(folder / "model.onnx"), **given)


def test_a_file_decodes_the_same_tokens(read: dict[str, Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has the rank that is asked for is exact: a prompt and steps in one file, from caches of latents."""
    monkeypatch.setattr(OnnxRuntimeTarget, "measure", seconds)
    passes = f"low-rank-kv:rank={RANK}:groups={GROUPS}"
    result = rewritten(read["gpt2 in onnx"], tmp_path, passes, max_error=1e-4, dims="past=8,seq=24")
    assert result.path is not None, result.message
    row = next(row for row in result.report.sites if row.kind == "attention")
    assert (row.status, row.structure, row.exact) == ("rewritten", passes, False)
    assert row.reason.startswith("2 latents of 5 for keys, weighted error ")
    assert "20 numbers a token in the cache instead of 48; absorbed up to T=1, expanded above, after 2048 tokens" in row.reason
    (note,) = [note for note in result.report.notes if "the cache has other sizes" in note]
    assert "192 bytes a token are 80 now" in note and f"{PAST}0_keys [batch,4,past,6] is [batch,2,past,5]" in note
    decodes(targets()["onnxruntime"]().open(result.path, 1), read["gpt2"])
    found, code = compare.verify(str(tmp_path / "dense.onnx"), str(result.path), Options(samples=4, dims="past=3,seq=2"))
    assert (found.output, code) == ("logits", 0) and found.estimate < EQUAL[torch.float32][0]


@pytest.mark.slow
def test_models_of_other_caches_are_timed_side_by_side(read: dict[str, Graph], tmp_path: Path) -> None:
    result = rewritten(read["gpt2 in onnx"], tmp_path, f"low-rank-kv:rank={RANK}:groups={GROUPS}")
    options = Options(tokens="1", dims="past=16,seq=1", samples=4)
    (found,) = compare.bench(str(tmp_path / "dense.onnx"), [str(result.path)], options, errors=True).contenders
    (row,) = found.rows
    assert row.rewritten_seconds is not None and row.predicted_seconds is not None, row.note
    assert found.error is not None and found.error.estimate < EQUAL[torch.float32][0]


def test_a_program_decodes_the_same_tokens(read: dict[str, Graph], tmp_path: Path) -> None:
    g, target, path = read["gpt2"].clone(), TorchTarget(), tmp_path / "model.pt2"
    run(g, tmp_path, LowRankKv(rank=RANK, groups=GROUPS))
    target.emit(g, path, EmitOptions())
    decodes(target.open(path, 1), read["gpt2"])


def decodes(call: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], dense: Graph) -> None:
    ids = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(0))
    ours, logits = steps(call, specs(GROUPS, RANK), ids)
    theirs, wanted = steps(dense.run, specs(HEADS, WIDTH), ids)
    assert torch.equal(ours, theirs)
    close(logits, wanted)


def specs(heads: int, width: int) -> list[InputSpec]:
    return [InputSpec(f"{PAST}0_{side}", "float32", ("batch", heads, "past", width)) for side in ("keys", "values")]


@pytest.mark.parametrize("name", ["gpt2", "gpt2 in onnx", "llama", "llama in onnx"])
def test_what_has_the_rank_is_exact_and_can_be_taken_back(name: str, read: dict[str, Graph], tmp_path: Path) -> None:
    """Rotated keys stay; an empty cache of the sizes before is taken by the graph that has others."""
    g, rotated = read[name].clone(), name.startswith("llama")
    given = feeds(g)
    before, inputs = g.run(given), g.specs()
    decisions = {d.site.id: d for d in run(g, tmp_path, LowRankKv(rank=16) if rotated else LowRankKv(rank=RANK, groups=GROUPS))}
    decision, part = (next(d for d in decisions.values() if bool(d.part_of) == of) for of in (False, True))
    assert isinstance(decision.operator, LatentValues if rotated else LatentAttention), decision.reason
    assert decision.lossy and decision.error is not None and decision.error < EQUAL[torch.float32][0]
    assert part.reason == f"its rows of {'values' if rotated else 'keys and values'} give latents now, for {decision.site.name}"
    assert decision.reason.startswith(f"its keys are {BETWEEN}, so they stay; 1 latent of 16 for values") == rotated
    kept, changed = ("batch", 4, "past", 4), ("batch", 1, "past", 16) if rotated else ("batch", GROUPS, "past", RANK)
    assert [s.dims for s in g.specs() if s.name.startswith(PAST)] == [kept if rotated else changed, changed]
    close(g.run(given)["logits"], before["logits"])
    decision.give_up(g)
    assert g.specs() == inputs
    for key, wanted in before.items():
        assert torch.equal(g.run(given)[key], wanted)
    decision.redo(g)
    close(g.run(given)["logits"], before["logits"])
    gone = given_up(decisions, decision, "given up for --max-error 0.1")
    assert len(gone) == 2 and not any(d.rewritten or d.lossy for d in gone)
    held = {name: torch.zeros(2, x.shape[1], 3, x.shape[3]) for name, x in given.items() if name.startswith(PAST)}
    with pytest.raises(RewriteError, match="holds a cache of 3 tokens, and this model has other sizes"):
        g.run({**given, **held, "attention_mask": torch.ones(2, 8, dtype=torch.int64)})


def test_a_bound_gives_it_up(read: dict[str, Graph], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntimeTarget, "measure", seconds)
    result = rewritten(read["gpt2 in onnx"], tmp_path, f"low-rank-kv:rank={RANK - 3}:groups={GROUPS}", max_error=1e-4)
    row = next(row for row in result.report.sites if row.kind == "attention")
    assert (result.exit_code, row.status) == (1, "kept"), result.message
    assert row.reason.startswith("given up for --max-error 0.0001: low-rank-kv:rank=2:groups=2 had weighted error")
    assert not any("the cache has other sizes" in note for note in result.report.notes)


def test_attention_that_is_one_operation_already_is_seen_through(read: dict[str, Graph], tmp_path: Path) -> None:
    g = read["gpt2 in onnx"].clone()
    given = feeds(g)
    before = g.run(given)["logits"]
    found = attention(run(g, tmp_path, LowRankKv(rank=RANK, groups=GROUPS), (FuseAttention(),)))
    assert isinstance(found.operator, LatentAttention)
    close(g.run(given)["logits"], before)
    g = read["gpt2 in onnx"].clone()
    assert isinstance(attention(run(g, tmp_path, LowRankKv(groups=3), (FuseAttention(),))).operator, Attention)
    close(g.run(given)["logits"], before)


@pytest.mark.parametrize("earlier", [(), (FuseAttention(),)])
def test_of_an_unknown_input_nothing_is_fitted(earlier: tuple[Any, ...], read: dict[str, Graph], tmp_path: Path) -> None:
    """And what was made one operation is one again."""
    g = read["llama in onnx"].clone()
    given = feeds(g)
    before = g.run(given)["logits"]
    c = context(g, tmp_path, selected=list(sites(g)), tokens=(1, 16))
    c.calibration.samples = None
    for step in (*earlier, LowRankKv()):
        c.decisions.update({d.site.id: d for d in step.run(g, c)})
    decision = attention(list(c.decisions.values()))
    assert decision.reason.startswith("one operation" if earlier else "nothing is known of what its keys and values are made of")
    assert [g.op(n) for n in g.nodes()].count("structured") == len(earlier)
    close(g.run(given)["logits"], before)


def test_what_was_replaced_can_be_asked_for(read: dict[str, Graph], tmp_path: Path) -> None:
    g = read["gpt2"].clone()
    given = feeds(g)
    product = next(n for n in g.nodes() if g.op(n) == "addmm")
    (wanted,) = g.part(given, {}, [product])
    run(g, tmp_path, LowRankKv(rank=RANK, groups=GROUPS))
    assert torch.equal(g.part(given, {}, [product])[0], wanted)


def test_an_earlier_pass_that_rewrote_the_product_comes_first(read: dict[str, Graph], tmp_path: Path) -> None:
    from rewriter.registry import parse_passes

    g = read["gpt2"].clone()
    decision = attention(run(g, tmp_path, LowRankKv(), (parse_passes("low-rank:params=0.9")[0],)))
    assert decision.reason == "its keys are no product of a selected linear layer that stands as it was"


class Decoder(nn.Module):
    """(x, k, v) -> attention on two heads, present keys and values, and what else `step` gives."""

    def __init__(self, step: Callable[..., tuple[Any, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.step, self.query, self.key, self.value = step, *(nn.Linear(12, 6) for _ in range(3))
        self.other = nn.Linear(6, 6)

    def heads(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (2, 3)).transpose(1, 2)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.step(self, self.heads(self.query(x)), self.key(x), self.value(x), k, v)


def plain(self: Decoder, q: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    k, v = torch.cat([k, self.heads(key)], 2), torch.cat([v, self.heads(value)], 2)
    return F.scaled_dot_product_attention(q, k, v), k, v


def cut(self: Decoder, q: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    k, v = torch.cat([k[:, :, 1:], self.heads(key)], 2), torch.cat([v[:, :, 1:], self.heads(value)], 2)
    return F.scaled_dot_product_attention(q, k, v), k, v


def shared(self: Decoder, q: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    y, k, v = plain(self, q, key, value, k, v)
    return y, k, v, F.scaled_dot_product_attention(q * 2, k, v)


def past_read(self: Decoder, q: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return *plain(self, q, key, value, k, v), v.sum(2)


def computed_bias(self: Decoder, q: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return plain(self, q, key, F.linear(value.relu(), self.other.weight, q.sum((0, 1, 2)).repeat(2)), k, v)


def another_axis(self: Decoder, q: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return plain(self, q, key, self.other(value.unsqueeze(1).relu())[:, 0], k, v)


def kept_inside(self: Decoder, q: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return plain(self, q, key, value, k, v)[:1]


def product_read(self: Decoder, q: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return *plain(self, q, key, value, k, v), value


def squared(self: Decoder, q: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return plain(self, q, key, value.square(), k, v)


def no_product(self: Decoder, q: Tensor, key: Tensor, value: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return plain(self, q, key, self.query.bias.expand_as(value), k, v)


CASES: dict[Callable[..., tuple[Any, ...]], str] = {
    plain: "",
    cut: "its keys are no cache that is an input and an output of the model",
    shared: "its keys are a cache that is read elsewhere, too",
    past_read: "its values are a cache that is read elsewhere, too",
    computed_bias: "the bias of other is computed",
    another_axis: "what other multiplies is not of batch, tokens and features",
    kept_inside: "its keys are no cache that is an input and an output of the model",
    product_read: "what value gives is used for more than its keys, values and queries",
    squared: f"its values are {BETWEEN}",
    no_product: "its values are no product of a selected linear layer that stands as it was",
}


@pytest.mark.parametrize("step", CASES)
def test_what_is_no_such_cache_is_kept(step: Callable[..., tuple[Any, ...]], tmp_path: Path) -> None:
    caches = [f"{name}:float32[batch,2,past,3]" for name in "kv"]
    g = graph(Decoder(step).eval(), "x:float32[batch,seq,12]", *caches)
    data = {"x": normal(4, 5, 12), **{name: torch.zeros(4, 2, 0, 3) for name in "kv"}}
    if step is cut:
        data |= {name: torch.zeros(4, 2, 1, 3) for name in "kv"}
    decision = attention(run(g, tmp_path, LowRankKv(), data=data))
    assert decision.rewritten == (not CASES[step]) and (decision.rewritten or decision.reason == CASES[step])


REFUSED = {
    LowRankKv(groups=3): "groups=3 does not divide its 4 heads of keys and values",
    LowRankKv(rank=25): "a latent of 25 is wider than the keys of its group, 24",
    LowRankKv(rank=13, params=0.5): "latents of 13 are more than params=0.5 of its cache",
    LowRankKv(params=1.0): "params=1.0 of its cache leaves it as large as it is",
}


@pytest.mark.parametrize("step", REFUSED)
def test_sizes_that_cannot_be_are_refused(step: LowRankKv, read: dict[str, Graph], tmp_path: Path) -> None:
    decision = attention(run(read["gpt2"].clone(), tmp_path, step))
    assert not decision.rewritten and decision.reason == REFUSED[step]


@pytest.mark.parametrize(
    ("step", "said"), [(LowRankKv(rank=0), "rank=0"), (LowRankKv(cached=0), "cached=0"), (LowRankKv(params=2.0), "params=2")]
)
def test_options_out_of_range(step: LowRankKv, said: str, read: dict[str, Graph], tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match=f"low-rank-kv:{said}.* is out of range"):
        run(read["gpt2"].clone(), tmp_path, step)


def test_half_of_the_cache_by_default(read: dict[str, Graph], tmp_path: Path) -> None:
    decision = attention(run(read["gpt2"].clone(), tmp_path, LowRankKv()))
    assert "24 numbers a token in the cache instead of 48" in decision.reason


def test_groups_have_the_least_error_of_their_rank() -> None:
    """Against the leading singular values of each group under white inputs; a bias is a column more."""
    weight, bias, white = normal(8, 10, dtype=torch.float64), normal(8, seed=1, dtype=torch.float64), isotropic(10)
    for common, column in ((True, bias[:, None]), (False, weight[:, :0])):
        found = grouped(weight, bias, white, 2, 3, common)
        parts = torch.cat([weight, column], 1).chunk(2)
        lost = sum(float(torch.linalg.svdvals(part)[3:].square().sum()) for part in parts)
        whole = sum(float(part.square().sum()) for part in parts)
        assert found.error == pytest.approx((lost / whole) ** 0.5)
        made = torch.cat([up @ down.T for up, down in zip(found.up.chunk(2), found.down.chunk(2, 1), strict=True)])
        assert made.shape == weight.shape and bool(found.shift.any()) == common


@pytest.mark.slow
def test_the_bench_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_decode_attention.py", "--quick"])
    tool("bench_decode_attention").main()
    assert "192 (0.50)" in capsys.readouterr().out


def test_the_bench_prints_nothing_of_what_is_off() -> None:
    with pytest.raises(SystemExit, match=r"red: at full rank logits are off by 1.0e-01; no figure is printed"):
        tool("bench_decode_attention").equal(torch.tensor([1.0, 1.1]), torch.ones(2))
