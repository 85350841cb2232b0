"""merge-lora: branches in every spelling go into their base and nothing else changes; what cannot be merged is kept, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.errors import RewriteError
from rewriter.graph import Graph, load_matrix
from rewriter.passes.merge_lora import MergeLora
from rewriter.registry import detectors, parse_passes
from rewriter.rule import Decision
from rewriter.tolerances import EQUAL
from tests.engine.nets import Net, as_onnx, context, graph, normal, sites

X = "x:float32[batch,seq,16]"
FEED = {"x": normal(3, 5, 16, seed=9)}
W, B = normal(12, 16) / 4, normal(12, seed=1)
DOWN, UP = normal(3, 16, seed=2) / 4, normal(12, 3, seed=3)
PARTS = {"w": W, "b": B, "down": DOWN, "up": UP}
F = nn.functional
Spell = Callable[[Any, Tensor], Tensor]

SPELLINGS: dict[str, Spell] = {
    "as peft writes it": lambda s, x: F.linear(x, s.w, s.b) + F.linear(F.dropout(F.linear(x, s.down), 0.5, False), s.up) * 0.5,
    "scaled first": lambda s, x: x @ s.w.T + (0.5 * x @ s.down.T) @ s.up.T,
    "scaled between": lambda s, x: x @ s.w.T + F.linear(x @ s.down.T * 0.5, s.up),
    "divided": lambda s, x: F.linear(x, s.w) + F.linear(F.linear(x, s.down), s.up) / 4,
    "branch first": lambda s, x: 2 * F.linear(F.linear(x, s.down), s.up) + F.linear(x, s.w, s.b),
    "bias behind": lambda s, x: x @ s.w.T + 2 * (x @ s.down.T @ s.up.T) + s.b,
    "bias before": lambda s, x: (s.b + x @ s.w.T) + x @ s.down.T @ s.up.T,
    "a residual between": lambda s, x: (x[..., :12] + x @ s.w.T) + x @ s.down.T @ s.up.T,
    "its own bias": lambda s, x: F.linear(x, s.w) + 0.5 * F.linear(F.linear(x, s.down), s.up, s.b),
    "einsum": lambda s, x: torch.einsum("bsd,ed->bse", x, s.w) + torch.einsum("bsr,er->bse", torch.einsum("bsd,rd->bsr", x, s.down), s.up),
    "rows alone": lambda s, x: torch.addmm(s.b, x.flatten(0, 1), s.w.T) + 3 * torch.mm(torch.mm(x.flatten(0, 1), s.down.T), s.up.T),
    "factors stored turned": lambda s, x: x @ s.wt + x @ s.dt @ s.ut,
    "in double": lambda s, x: F.linear(x, s.w) + F.linear(F.linear(x.double(), s.down.double()), s.up.double()).float(),
    "two of them": lambda s, x: F.linear(x, s.w, s.b) + x @ s.down.T @ s.up.T + 0.5 * (x @ s.d2.T @ s.u2.T),
}
MORE = {
    "factors stored turned": {"wt": W.T.contiguous(), "dt": DOWN.T.contiguous(), "ut": UP.T.contiguous()},
    "two of them": {"d2": normal(2, 16, seed=4), "u2": normal(12, 2, seed=5)},
}


def spelled(spell: Spell, **parts: Any) -> Graph:
    return graph(Net(spell, **{**PARTS, **parts}), X)


def decided(g: Graph, tmp_path: Path) -> dict[str, Decision]:
    """By what the sites are called; the graph without what nothing uses any more."""
    selected = [s for detect in detectors() for s in detect(g)]
    found = {d.site.name: d for d in MergeLora().run(g, context(g, tmp_path, selected=selected))}
    g.prune()
    return found


def products(g: Graph) -> int:
    return len(sites(g))


@pytest.mark.parametrize("onnx", [False, True], ids=["torch", "onnx"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_merged(name: str, onnx: bool, tmp_path: Path) -> None:
    g = spelled(SPELLINGS[name], **MORE.get(name, {}))
    g = as_onnx(g) if onnx else g
    (before,) = g.run(FEED).values()
    count, found = products(g), decided(g, tmp_path)
    adapters = [d for d in found.values() if d.site.kind == "adapter"]
    assert len(adapters) == 1 + (name == "two of them") and all("merged into its base" in d.reason for d in adapters)
    assert all(d.rewritten and d.exact and d.after.params == 0 for d in found.values())
    assert products(g) == count - 2 * len(adapters) == 1
    (after,) = g.run(FEED).values()
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(after, before, rtol=rtol, atol=atol)


def test_the_weight_is_the_sum_under_its_own_name(tmp_path: Path) -> None:
    g = spelled(SPELLINGS["as peft writes it"])
    found = decided(g, tmp_path)
    assert set(found) == {"w (adapter)", "down", "up"} and found["down"].part_of == "w (adapter)"
    (site,) = sites(g)
    assert site.name == "w"
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(load_matrix(g, site.weights["weight"], (12, 16)), W + 0.5 * UP @ DOWN, rtol=rtol, atol=atol)


KEPT: dict[str, tuple[Spell, dict[str, Any], str]] = {
    "base scaled": (lambda s, x: 2 * F.linear(x, s.w) + x @ s.down.T @ s.up.T, {}, "its base is multiplied by 2"),
    "base read besides": (
        lambda s, x: ((h := F.linear(x, s.w)) + x @ s.down.T @ s.up.T) * h.tanh(),
        {},
        "what its base gives is read besides",
    ),
    "base used again": (lambda s, x: (F.linear(x, s.w) + x @ s.down.T @ s.up.T) * F.linear(x.tanh(), s.w), {}, "used in other places too"),
    "bias between": (
        lambda s, x: F.linear(x, s.w) + F.linear(F.linear(x, s.down, s.k), s.up),
        {"k": normal(3)},
        "added between its factors",
    ),
    "base computed": (
        lambda s, x: F.linear(x, s.w * s.g) + x @ s.down.T @ s.up.T,
        {"g": normal(12, 1)},
        "computed from what is stored",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_merged_is_kept(name: str, tmp_path: Path) -> None:
    spell, parts, reason = KEPT[name]
    g = spelled(spell, **parts)
    (before,) = g.run(FEED).values()
    (kept,) = decided(g, tmp_path).values()
    assert not kept.rewritten and reason in kept.reason
    (after,) = g.run(FEED).values()
    assert after.equal(before)


NONE: dict[str, Spell] = {
    "of another input": lambda s, x: F.linear(x, s.w) + x.tanh() @ s.down.T @ s.up.T,
    "not linear": lambda s, x: F.linear(x, s.w) + (x @ s.down.T).relu() @ s.up.T,
    "subtracted": lambda s, x: F.linear(x, s.w) - x @ s.down.T @ s.up.T,
    "multiplied by what varies": lambda s, x: F.linear(x, s.w) + x[..., :1] * (x @ s.down.T @ s.up.T),
}


@pytest.mark.parametrize("name", NONE)
def test_nothing_else_is_taken_for_one(name: str, tmp_path: Path) -> None:
    assert decided(spelled(NONE[name]), tmp_path) == {}


def test_a_merge_that_changes_nothing_is_an_error(tmp_path: Path) -> None:
    g = spelled(SPELLINGS["as peft writes it"], up=torch.zeros(12, 3))
    with pytest.raises(RewriteError, match=r"merge-lora changes nothing: w \(adapter\): its factors' product is zero"):
        decided(g, tmp_path)


def test_what_rounding_would_take_is_kept(tmp_path: Path) -> None:
    parts = {name: part.bfloat16() for name, part in PARTS.items()} | {"up": (UP * 1e-6).bfloat16()}
    g = graph(Net(SPELLINGS["as peft writes it"], **parts), X.replace("float32", "bfloat16"))
    with pytest.raises(RewriteError, match="rounded to bfloat16 the weight would stay as it is"):
        decided(g, tmp_path)


def test_later_passes_see_the_merged_weight(tmp_path: Path) -> None:
    """A base of rank 2 with a branch of rank 3 is exactly of rank 5."""
    import rewriter

    net = Net(SPELLINGS["branch first"], **{**PARTS, "w": normal(12, 2) @ normal(2, 16, seed=1)})
    result = rewriter.plan(net.eval(), "merge-lora,low-rank", inputs=(X,), samples=16)
    (row,) = [row for row in result.report.sites if row.name == "w"]
    assert row.structure == "low-rank:rank=5" and result.exit_code == 0, row
    assert parse_passes("merge-lora") == [MergeLora()]
