"""block-lora: the best branch of a lower rank, against a dense decomposition; bounds give it up; merged it goes into its base."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewriter
from rewriter.backends.files.load import open_source
from rewriter.errors import RewriteError
from rewriter.graph import Graph, load_branch
from rewriter.options import Options
from rewriter.passes.block_lora import BlockLora
from rewriter.passes.merge_lora import MergeLora
from rewriter.passes.solvers.spectral import ridged
from rewriter.registry import detectors
from rewriter.rule import Context, Decision, given_up
from rewriter.thin import thin
from rewriter.tolerances import EQUAL, EXACT
from tests.engine.nets import Net, as_onnx, context, graph, normal, samples, sites
from tests.passes.test_merge_lora import KEPT, MORE, PARTS, SPELLINGS, B, W

X = "x:float32[batch,seq,16]"
FEED = {"x": normal(3, 5, 16, seed=9)}
F = nn.functional
WIDE = {"w": normal(48, 40) / 6, "b": B, "down": normal(8, 40, seed=2) / 6, "up": normal(48, 8, seed=3) / 6}
WIDE_X, WIDE_FEED = "x:float32[batch,seq,40]", {"x": normal(4, 6, 40, seed=9)}
WIDE_DATA = {"x": normal(64, 6, 40, seed=8)}


def plain(s: Any, x: Tensor) -> Tensor:
    return F.linear(x, s.w) + 0.5 * F.linear(F.linear(x, s.down), s.up)


@functools.cache
def exported() -> torch.export.ExportedProgram:
    sizes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq")}}
    return torch.export.export(Net(plain, **WIDE).eval(), (WIDE_FEED["x"],), dynamic_shapes=sizes)


def wide(**parts: Tensor) -> Graph:
    """With other numbers in it."""
    g: Graph = open_source(exported(), Options()).graph.clone()
    for name, tensor in parts.items():
        g.put(g.parameters()[name], tensor)
    return g


def run(g: Graph, folder: Path, *passes: BlockLora | MergeLora, **changes: Any) -> tuple[dict[str, Decision], Context]:
    selected = [s for detect in detectors() for s in detect(g)]
    with_all = context(g, folder, data=samples(changes.pop("feed", FEED)), selected=selected, **changes)
    for step in passes:
        with_all.decisions.update({d.site.id: d for d in step.run(g, with_all)})
    return {d.site.name: d for d in with_all.decisions.values()}, with_all


def delta(g: Graph) -> Tensor:
    (site,) = [s for detect in detectors() for s in detect(g) if s.kind == "adapter"]
    down, up = load_branch(g, site)
    return up.double() @ down.double()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 30), st.booleans(), st.integers(0, 99))
def test_the_core_is_the_dense_decomposition(r: int, m: int, n: int, weighted: bool, seed: int) -> None:
    down, up = normal(r, n, seed=seed), normal(m, r, seed=seed + 1)
    x = normal(3 * n, n, seed=seed + 2, dtype=torch.float64)
    second = ridged(x.T @ x / len(x)) if weighted else None
    dense = up.double() @ down.double()
    root = torch.linalg.cholesky(second) if second is not None else torch.eye(n, dtype=torch.float64)
    found, s = thin(down, up, second), torch.linalg.svdvals(dense @ root)
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(found.energies.sqrt()[: len(s)], s[: found.rank], rtol=rtol, atol=atol)
    for rank in range(found.rank + 1):
        a, b = found.truncated(rank)
        gap = torch.linalg.norm((dense - b @ a) @ root) / torch.linalg.norm(dense @ root)
        torch.testing.assert_close(found.lost(rank), float(gap), rtol=rtol, atol=atol)
        assert abs(found.gone(rank) - float(torch.linalg.norm(dense - b @ a))) <= atol * (1 + found.norm)
    torch.testing.assert_close(found.left @ found.right, dense, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["its own bias", "factors stored turned", "in double"])
def test_every_spelling_of_a_branch_is_reduced(name: str, tmp_path: Path) -> None:
    """A planted branch of rank 1 stored at rank 3 is found exactly, whatever stands around it, and its bias stays."""
    low = {"down": torch.outer(normal(3), PARTS["down"][0]), "up": PARTS["up"]}
    turned = {"dt": low["down"].T.contiguous(), "ut": low["up"].T.contiguous()} if name in MORE else {}
    made = graph(Net(SPELLINGS[name], **{**PARTS, **low, **MORE.get(name, {}), **turned}), X)
    rtol, atol = EQUAL[torch.float32]
    for g in (made, as_onnx(made)):
        (before,) = g.run(FEED).values()
        found, _ = run(g, tmp_path, BlockLora(energy=1.0))
        (reduced,) = [d for d in found.values() if d.site.kind == "adapter"]
        assert reduced.exact and reduced.structure == "low-rank:rank=1" and "the branch has no more" in reduced.reason, reduced
        assert (reduced.before.params, reduced.after.params) == (3 * 28, 28)
        torch.testing.assert_close(next(iter(g.run(FEED).values())), before, rtol=rtol, atol=atol)
        reduced.give_up(g)
        assert next(iter(g.run(FEED).values())).equal(before)
        reduced.redo(g)
        torch.testing.assert_close(next(iter(g.run(FEED).values())), before, rtol=rtol, atol=atol)


def test_half_the_rank_weighted_by_what_the_branch_reads(tmp_path: Path) -> None:
    """No other factors of that rank do better on the samples; Frobenius' own do worse."""
    feed = {"x": WIDE_FEED["x"] * torch.linspace(0.1, 3, 40)}
    g = wide()
    (before,), change = g.run(feed).values(), delta(g)
    found, _ = run(g, tmp_path, BlockLora(), feed=feed)
    reduced = found["w (adapter)"]
    assert reduced.structure == "low-rank:rank=4" and not reduced.exact and reduced.lossy and found["down"].part_of == "w (adapter)"
    assert (reduced.before.params, reduced.after.params, reduced.after.flops) == (8 * 88, 4 * 88, 2 * 4 * 88)
    assert "of what it does is lost, in norms" in reduced.reason
    (after,) = g.run(feed).values()
    rows = feed["x"].flatten(0, 1).double()
    plainly = thin(*reversed(torch.linalg.qr(change)))
    a, b = plainly.truncated(4)
    ours, theirs = (after - before).norm(), (rows @ (b @ a - change).T).norm()
    assert ours < 0.98 * theirs
    assert reduced.error is not None and abs(reduced.error - float(ours / (rows @ change.T).norm())) < 0.1  # moments are shrunk


@pytest.mark.parametrize(
    ("options", "rank"), [({"blocks": 4}, 2), ({"energy": 0.5}, 3), ({"blocks": 8, "energy": 0.5}, 1), ({"blocks": 2, "energy": 0.5}, 3)]
)
def test_both_options_bound_the_rank(options: dict[str, Any], rank: int, tmp_path: Path) -> None:
    basis = torch.linalg.qr(normal(40, 8)).Q.T.contiguous()
    g = wide(down=basis, up=torch.linalg.qr(normal(48, 8, seed=1)).Q * torch.tensor([1.0, 1, 1, 1, 1, 0.1, 0.1, 0.1]))
    white = {"x": 10 * torch.eye(40)[None].repeat(1, 3, 1)}
    found, _ = run(g, tmp_path, BlockLora(**options), feed=white)
    assert found["w (adapter)"].structure == f"low-rank:rank={rank}"


def test_what_cannot_shrink_is_kept_with_the_numbers(tmp_path: Path) -> None:
    (before,) = (g := wide()).run(WIDE_FEED).values()
    found, _ = run(g, tmp_path, BlockLora(energy=0.9999), feed=WIDE_FEED)
    kept = found["w (adapter)"]
    assert not kept.rewritten and "takes all of its rank 8: nothing gets smaller, rank 7 would lose" in kept.reason
    assert kept.before == kept.after and kept.before.params == 8 * 88 and set(found) == {"w (adapter)"}
    (after,) = g.run(WIDE_FEED).values()
    assert after.equal(before)
    single, _ = run(
        graph(Net(SPELLINGS["as peft writes it"], **{**PARTS, "down": normal(1, 16), "up": normal(12, 1)}), X), tmp_path, BlockLora()
    )
    assert single["w (adapter)"].reason == "its rank is 1: nothing smaller does the same"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [({"up": torch.zeros(48, 8)}, "product is zero: there is nothing to reduce"), ({"up": torch.full((48, 8), torch.inf)}, "NaN or inf")],
)
def test_useless_factors_are_kept(parts: dict[str, Tensor], reason: str, tmp_path: Path) -> None:
    found, _ = run(wide(**parts), tmp_path, BlockLora(), feed=WIDE_FEED)
    assert reason in found["w (adapter)"].reason


def test_a_branch_whose_base_cannot_take_it_is_reduced_all_the_same(tmp_path: Path) -> None:
    for name, parts in (("base scaled", PARTS), ("bias between", {**PARTS, "k": normal(3)})):
        found, _ = run(graph(Net(KEPT[name][0], **parts), X), tmp_path, BlockLora(), MergeLora())
        (adapter,) = [d for d in found.values() if d.site.kind == "adapter"]
        assert adapter.rewritten == (name == "base scaled") and KEPT[name][2] in adapter.reason


@pytest.mark.parametrize("onnx", [False, True], ids=["torch", "onnx"])
def test_reduced_and_merged(onnx: bool, tmp_path: Path) -> None:
    """Two branches beside one weight; each may be given up and taken again, in any order."""
    two = lambda s, x: plain(s, x) + F.linear(F.linear(x, s.d2), s.u2)  # noqa: E731
    more = {"d2": normal(6, 40, seed=4) / 6, "u2": normal(48, 6, seed=5) / 6}
    g = graph(Net(two, **WIDE, **more), WIDE_X)
    g = as_onnx(g) if onnx else g
    (before,) = g.run(WIDE_FEED).values()
    copy = g.clone()
    run(copy, tmp_path, BlockLora(), feed=WIDE_FEED)
    (reduced,) = copy.run(WIDE_FEED).values()
    found, _ = run(g, tmp_path, BlockLora(), MergeLora(), feed=WIDE_FEED, consent=True)
    first, second = [d for d in found.values() if d.site.kind == "adapter"]
    assert {first.part_of, second.part_of} == {"linear" if onnx else "w"}
    assert all(d.lossy and d.structure.endswith(", merged") and d.after.params == 0 for d in (first, second))
    rtol, atol = EQUAL[torch.float32]
    same = lambda wanted: torch.testing.assert_close(next(iter(g.run(WIDE_FEED).values())), wanted, rtol=rtol, atol=atol)  # noqa: E731
    same(reduced)
    first.give_up(g)
    second.give_up(g)
    same(before)
    (whole,) = given_up({}, first, "why")
    assert whole.exact and whole.reason == "merged whole; why" and whole.part_of and not whole.lossy
    first.redo(g)
    second.redo(g)
    same(reduced)
    g.prune()
    assert len(sites(g)) == 1


def planned(passes: str, **options: Any) -> Any:
    return rewriter.plan(exported(), passes, samples=64, objective="params", **options)


def test_a_bound_gives_it_up() -> None:
    """Alone and merged; then the factors are sites again, or the whole branch is in the base."""
    for passes in ("block-lora", "block-lora,merge-lora"):
        tight = planned(passes, max_error=1e-6)
        rows = {row.name: row for row in tight.report.sites}
        assert "given up for --max-error 1e-06: low-rank:rank=4" in rows["w (adapter)"].reason
        assert tight.exit_code == 0 and tight.report.output_error is None
        merged = "merge" in passes
        assert (rows["w (adapter)"].status == "planned") == merged and (rows["down"].status == "planned") == merged
        out = next(iter(tight.graph.run(WIDE_FEED).values()))
        rtol, atol = EQUAL[torch.float32]
        torch.testing.assert_close(out, Net(plain, **WIDE)(WIDE_FEED["x"]), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "passes", ["block-lora,quantize", "block-lora,pre-merge", "block-lora,correct", "block-lora,merge-lora,low-rank:rank=5"]
)
def test_later_passes_go_on(passes: str) -> None:
    result = planned(passes, data=WIDE_DATA)
    rows = {row.name: row for row in result.report.sites}
    assert str(rows["w (adapter)"].structure).startswith("low-rank:rank=4")
    assert (rows["w"].status == "planned") == ("quantize" in passes or "low-rank" in passes)
    error = result.report.output_error
    assert error is not None and 1e-3 < error.estimate < 1


@pytest.mark.parametrize(
    ("passes", "reason"), [("quantize", "its base was rewritten by an earlier pass"), ("block-lora,quantize:dense=false", "is not merged")]
)
def test_merging_comes_before_rounding(passes: str, reason: str) -> None:
    """What stands in integers has no weight that a branch could go into; a branch in integers is not forgotten."""
    if passes == "quantize":
        with pytest.raises(RewriteError, match=f"merge-lora changes nothing: .*{reason}"):
            planned(f"{passes},merge-lora")
        return
    row = next(row for row in planned(f"{passes},merge-lora").report.sites if row.kind == "adapter")
    assert reason in row.reason and row.structure == "low-rank:rank=4 in 8 bits"


@pytest.mark.parametrize("passes", ["merge-lora,pre-merge", "block-lora,merge-lora,pre-merge", "low-rank:rank=5,block-lora,pre-merge"])
def test_what_was_merged_or_reduced_is_not_planned_again(passes: str) -> None:
    """Once merged it is no branch; a reduced one beside a factored base is joined to it, or stays beside it."""
    result = planned(passes)
    row = next(row for row in result.report.sites if row.kind == "adapter")
    assert row.reason.count("merged into its base") == ("merge-lora" in passes)
    assert ("part of w: " in row.reason or "beside w: as one operator" in row.reason) == ("low-rank" in passes)
    before, after = (planned(p).graph.run(WIDE_FEED).values() for p in (passes.removesuffix(",pre-merge"), passes))
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(next(iter(after)), next(iter(before)), rtol=rtol, atol=atol)


@pytest.mark.parametrize("target", ["torch", "onnxruntime"])
def test_what_is_written_has_the_smaller_branch(target: str, tmp_path: Path) -> None:
    out = tmp_path / ("m.pt2" if target == "torch" else "m.onnx")
    common: dict[str, Any] = {"samples": 64, "objective": "params", "timing": False, "force": True}
    result = rewriter.rewrite(exported(), "block-lora", target=target, out=str(out), **common)
    assert result.exit_code == 0, result.message
    again = rewriter.plan(str(out), "merge-lora", samples=16) if target == "torch" else None
    if again is not None:  # plain aten: the branch is read again
        assert [row.shape for row in again.report.sites if row.name.endswith("(adapter)")] == [[48, 40]]


@pytest.mark.parametrize("text", ["energy=0", "energy=1.5"])
def test_shares_out_of_range(text: str) -> None:
    with pytest.raises(RewriteError, match=f"block-lora:{text}.* is out of range; give a share above 0"):
        planned(f"block-lora:{text}")


def test_rounding_level_is_that_of_the_type() -> None:
    assert BlockLora()._rank(thin(normal(4, 9), normal(9, 4)), 4, EXACT[torch.float32]) == (2, 4)
    assert W.shape == (12, 16)
