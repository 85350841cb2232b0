"""monarch-attention: taken where it is near enough and faster, with both figures; what it cannot say is refused in words."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import registry
from rewriter.backend import EmitOptions
from rewriter.errors import RewriteError
from rewriter.graph import Graph, Port, Region, Site
from rewriter.passes.monarch_attention import MonarchAttentionPass
from rewriter.passes.structures.attention import Attention
from rewriter.passes.structures.monarch_attention import MonarchAttention
from rewriter.registry import parse_passes
from rewriter.rule import Context, Decision
from rewriter.tolerances import EQUAL
from tests.engine.nets import FakeTarget, as_onnx, context, graph, normal, samples

TIME = 40
Masking = Callable[[Tensor], Tensor | None]


def padding(shown: Tensor) -> Tensor:
    """As transformers' encoders write it: every query its own row, all of them alike."""
    return shown[:, None, None, :].bool().expand(-1, 1, shown.shape[1], -1)


def additive(shown: Tensor) -> Tensor:
    return (1 - shown[:, None, None, :].float()) * torch.finfo(torch.float32).min


def window(shown: Tensor) -> Tensor:
    place = torch.arange(shown.shape[1])
    return padding(shown) & ((place[:, None] - place).abs() < 5)


class Layer(nn.Module):
    """Attention of two heads, 16 wide."""

    def __init__(self, masking: Masking, keys: str) -> None:
        super().__init__()
        self.masking, self.keys = masking, keys
        self.projections = nn.ParameterList(normal(16, 16, seed=i) / 4 for i in range(3))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        other = x if self.keys == "x" else torch.cat([x, x], 1)
        q, k, v = ((given @ w).unflatten(-1, (2, 8)).transpose(1, 2) for given, w in zip((x, other, other), self.projections, strict=True))
        mask = self.masking(attention_mask)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)


def everything(shown: Tensor) -> Tensor:
    """As transformers' image encoders write it."""
    return torch.arange(shown.shape[1])[None, None, :, None] >= 0


def none(shown: Tensor) -> Tensor | None:
    return None


@functools.cache
def exported(masking: Masking, keys: str) -> Graph:
    return graph(Layer(masking, keys), "x:float32[batch,seq,16]", "attention_mask:int64[batch,seq]")


def traced(masking: Masking = padding, keys: str = "x") -> Graph:
    return exported(masking, keys).clone()


def site(g: Graph, **changes: Any) -> Site:
    """The layer's attention, as a detector lists it."""
    node = next(n for n in g.nodes() if g.op(n) == "attention")
    inputs = [v for v in g.inputs(node) if v is not None]
    shape = g.shape(inputs[3]) if len(inputs) > 3 else None
    axes = tuple(1 if n == 1 else name for n, name in zip(shape or (), ("batch", 2, "time", "keys"), strict=False))
    boolean = shape is not None and g.dtype(inputs[3]) == torch.bool
    form = Attention(2, 2, 8, 8, 8**-0.5, mask=axes, boolean=boolean)
    region = Region((node,), tuple(map(Port, inputs)), (Port(g.outputs(node)[0]),))
    given: dict[str, Any] = {"region": region, "form": form, **changes}
    return Site("a", "layer (attention)", "attention", None, torch.float32, (), **given)


def shown(batch: int = 3) -> Tensor:
    """Which tokens are real: all, and fewer."""
    return (torch.arange(TIME) < torch.tensor([TIME, 33, 20, 28])[:batch, None]).long()


def fast(form: Any) -> float:
    return 1.0 if isinstance(form, MonarchAttention) else 3.0


def decided(g: Graph, folder: Path, spelling: str, found: Site | None = None, **changes: Any) -> tuple[Decision, Context]:
    (step,) = parse_passes(spelling)
    found = found or site(g)
    data = samples({"x": normal(3, TIME, 16, seed=5), "attention_mask": shown()})
    given = {"target": FakeTarget(fast), "data": data, "selected": [found], "objective": "ms", "tokens": (16, 64), **changes}
    c = context(g, folder, **given)
    (decision,) = step.run(g, c)
    return decision, c


def output(g: Graph, c: Context) -> Tensor:
    assert c.calibration.samples is not None
    (batch,) = c.calibration.samples.batches
    (found,) = g.run(batch).values()
    return found


@pytest.mark.parametrize("masking", [padding, additive, everything, none])
def test_a_near_and_fast_form_is_taken_with_its_figures(tmp_path: Path, masking: Masking) -> None:
    g, dense = traced(masking), traced(masking)
    decision, c = decided(g, tmp_path, "monarch-attention:error=5")
    assert isinstance(decision.operator, MonarchAttention) and not decision.exact
    assert (decision.operator.block, decision.operator.iterations) == (8, 2)
    assert decision.structure == "monarch-attention:block=8:iterations=2"
    assert decision.before.params == decision.after.params == 0
    assert "on 3 samples of up to 40 tokens; 1000.000 ms against 3000.000 ms dense at T=16" in decision.reason
    real = shown().bool()
    before, after = output(dense, c)[real], output(g, c)[real]
    moved = float((after - before).norm() / before.norm())
    assert decision.error == pytest.approx(moved, rel=EQUAL[torch.float32][0]) and moved > 0


SEEN = [("torch", padding), ("torch", everything), ("torch", none), ("onnx", padding), ("onnx", additive), ("onnx", everything)]


@pytest.mark.parametrize(("form", "masking"), SEEN)
def test_layers_as_they_are_detected(tmp_path: Path, form: str, masking: Masking) -> None:
    g = traced(masking) if form == "torch" else as_onnx(traced(masking))
    (found,) = (s for s in registry.sites(g) if s.kind == "attention")
    decision, _ = decided(g, tmp_path, "monarch-attention:error=5", found)
    expected, _ = decided(traced(masking), tmp_path, "monarch-attention:error=5")
    assert isinstance(decision.operator, MonarchAttention), decision.reason
    assert decision.error == pytest.approx(expected.error, rel=EQUAL[torch.float32][0])


def test_padding_says_nothing(tmp_path: Path) -> None:
    data = [{"x": normal(3, TIME, 16, seed=5), "attention_mask": shown()} for _ in range(2)]
    data[1]["x"] = torch.where(shown().bool()[..., None], data[1]["x"], 50 * normal(3, TIME, 16, seed=6))
    errors = [decided(traced(), tmp_path, "monarch-attention:error=5", data=samples(d))[0].error for d in data]
    assert errors[0] == pytest.approx(errors[1], rel=EQUAL[torch.float32][0])


def test_a_layer_over_the_bound_stays_dense_with_the_number(tmp_path: Path) -> None:
    g, dense = traced(), traced()
    decision, c = decided(g, tmp_path, "monarch-attention:error=0.001")
    assert not decision.rewritten and decision.after == decision.before
    assert decision.reason.startswith("relative error 0.") and "more than error=0.001" in decision.reason
    assert torch.equal(output(g, c), output(dense, c))


def test_a_slow_form_stays_dense_with_the_numbers(tmp_path: Path) -> None:
    slow = FakeTarget(lambda form: 4.0 if isinstance(form, MonarchAttention) else 3.0)
    decision, _ = decided(traced(), tmp_path, "monarch-attention:error=5", target=slow)
    assert not decision.rewritten
    assert "it is not faster: 4000.000 ms against 3000.000 ms dense at T=16; 4000.000 ms against" in decision.reason
    assert slow.asked == [["Attention", "MonarchAttention"]] * 2


def test_time_decides_whatever_the_objective(tmp_path: Path) -> None:
    decision, _ = decided(traced(), tmp_path, "monarch-attention:error=5", objective="params")
    assert decision.rewritten and decision.reason.endswith("(attention stores no params: time decides)")


def test_a_mask_by_query_is_refused(tmp_path: Path) -> None:
    decision, _ = decided(traced(window), tmp_path, "monarch-attention:error=5")
    assert decision.reason.startswith("its mask differs from query to query at 64 tokens")


def test_other_keys_are_refused(tmp_path: Path) -> None:
    decision, _ = decided(traced(none, "others"), tmp_path, "monarch-attention:error=5")
    assert "queries' own tokens: cross attention or a cache" in decision.reason


def test_what_cannot_be_said_is_refused(tmp_path: Path) -> None:
    g = traced()
    found = site(g)
    form = found.form
    assert isinstance(form, Attention)
    for reason, changed in {
        "causal: ": replace(found, form=replace(form, causal=True)),
        "besides hiding keys something is added": replace(found, form=replace(form, bias=(1, 2, "time", "keys"))),
        "its mask hides whole queries and no keys": replace(found, form=replace(form, mask=("batch", 1, "time", 1))),
        "already structured: Attention": replace(found, operator=form),
        "no pass for it yet": replace(found, region=None, form=None, reason="no pass for it yet"),
        "not read as softmax attention": replace(found, form=None),
    }.items():
        decision, _ = decided(g, tmp_path, "monarch-attention:error=5", changed)
        assert not decision.rewritten and decision.reason.startswith(reason)


def test_a_fixed_length_is_the_one_that_counts(tmp_path: Path) -> None:
    g = graph(Layer(everything, "x"), f"x:float32[batch,{TIME},16]", f"attention_mask:int64[batch,{TIME}]")
    decision, _ = decided(g, tmp_path, "monarch-attention:error=5")
    assert isinstance(decision.operator, MonarchAttention)
    assert decision.operator.block == 6 and not decision.operator.mask
    assert decision.reason.endswith("; 1000.000 ms against 3000.000 ms dense at T=40")


def test_samples_have_to_be_long_enough(tmp_path: Path) -> None:
    decision, _ = decided(traced(), tmp_path, "monarch-attention:block=40")
    assert decision.reason == "the samples have up to 40 tokens, which blocks of 40 do exactly: give --data of about 64 tokens"
    g = traced()
    c = context(g, tmp_path, target=FakeTarget(fast), selected=[site(g)], objective="ms")
    c.calibration.samples = None
    (decision,) = MonarchAttentionPass().run(g, c)
    assert decision.reason == "no samples reach it: nothing is known of its error"


def test_what_an_earlier_pass_rewrote_stays(tmp_path: Path) -> None:
    g = traced()
    found = site(g)
    earlier = Decision(found, "earlier", operator=found.form)
    decision, _ = decided(g, tmp_path, "monarch-attention:error=5", found, decisions={found.id: earlier})
    assert decision is earlier


def test_options_out_of_range(tmp_path: Path) -> None:
    for bad, said in {"error=0": "above 0", "error=-1": "above 0", f"error={math.nan}": "a finite number"}.items():
        with pytest.raises(RewriteError, match=said):
            decided(traced(), tmp_path, f"monarch-attention:{bad}")
    assert parse_passes("monarch-attention:block=64:iterations=3")[0].spelling() == "monarch-attention:block=64:iterations=3"


@pytest.mark.parametrize("target", ["torch", "onnxruntime"])
@pytest.mark.parametrize("masking", [padding, none])
def test_what_is_emitted_takes_every_length(tmp_path: Path, masking: Masking, target: str) -> None:
    g = traced(masking)
    decided(g, tmp_path, "monarch-attention:error=5")
    chosen = registry.targets()[target]()
    path = tmp_path / f"model{chosen.suffix}"
    chosen.emit(g, path, EmitOptions(tokens=(16, 64)))
    run = chosen.open(path, 1)
    for batch, time in ((1, 1), (2, 7), (3, 40), (2, 65)):
        feeds = {"x": normal(batch, time, 16), "attention_mask": (torch.arange(time) <= time // 2).long().expand(batch, time)}
        (got,), (expected,) = run(feeds).values(), g.run(feeds).values()
        rtol, atol = EQUAL[torch.float32]
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
