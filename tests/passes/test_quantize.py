"""quantize: dense and structured sites in 8 bits where that pays, with figures and errors; what it leaves keeps its form and says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import rewriter
from rewriter.algebra import Compose, Dense, Permutation
from rewriter.backends.kernels.session import coverage, open_covered
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.target import OnnxRuntimeTarget
from rewriter.errors import RewriteError
from rewriter.fit import site_cost
from rewriter.operator import AbstractMatrix
from rewriter.passes.correct import Correct
from rewriter.passes.pre_merge import PreMerge
from rewriter.passes.quantize import Quantize
from rewriter.passes.structures.low_rank import LowRank
from rewriter.passes.structures.pivoted_low_rank import PivotedLowRank
from rewriter.quantised import Quantised, quantised
from rewriter.rule import Decision
from tests.engine.nets import MLP, WIDE, FakeTarget, Mlp, Net, WideMlp, as_onnx, context, graph, linear, normal, samples
from tests.passes.blocks import Blocks, after_two, data


def numbers(operator: Any) -> float:
    return float(operator.cost().nbytes)


def slow_integers(operator: Any) -> float:
    return float(operator.cost().params)  # scales beside as many numbers


def decide(folder: Path, module: nn.Module, step: Quantize | None = None, tape: str = MLP, **changes: Any) -> dict[str, Decision]:
    g = graph(module, tape)
    return {d.site.name: d for d in (step or Quantize()).run(g, context(g, folder, **changes))}


@pytest.mark.parametrize("objective", ["nbytes", "params", "flops"])
def test_dense_sites_by_size(objective: str, tmp_path: Path) -> None:
    found = decide(tmp_path, Mlp(), objective=objective)
    for d in found.values():
        assert d.structure == "8 bits" and d.reason == "in 8 bits" and isinstance(d.operator, Quantised) and not d.exact
        assert d.after.nbytes < 0.4 * d.before.nbytes and d.error is not None and 0 < d.error < 0.02


def test_by_time_with_figures(tmp_path: Path) -> None:
    found = decide(tmp_path, Mlp(), objective="ms", target=FakeTarget(numbers))
    assert all("in 8 bits: 3." in d.reason and "x floats at T=" in d.reason for d in found.values())


def test_what_is_no_faster_keeps_its_floats(tmp_path: Path) -> None:
    found = decide(tmp_path, Mlp(), objective="ms", target=FakeTarget(slow_integers))
    for d in found.values():
        assert not d.rewritten and d.after == d.before
        assert d.reason.startswith("8 bits do not pay: ") and " ms in floats at T=" in d.reason


def test_structured_sites_keep_their_structure(tmp_path: Path) -> None:
    _, before, after = after_two(tmp_path, Blocks(), "quantize")
    for key, d in after.items():
        old = before[key]
        assert isinstance(d.operator, Quantised) and isinstance(d.operator.inside, LowRank) and isinstance(old.operator, AbstractMatrix)
        assert d.structure == f"{old.structure} in 8 bits"
        assert d.reason == f"{old.reason}; in 8 bits"
        assert d.error is not None and old.error is not None and d.error >= 0.9 * old.error
        assert d.after.nbytes < old.after.nbytes and d.before == old.before


@pytest.mark.parametrize("rows", ["neighbours", "anywhere"])
def test_pivots_are_not_rounded(rows: str, tmp_path: Path) -> None:
    """An error of a row that others are made of would reach them times their coefficients."""
    down, up = normal(24, 6), normal(6, 32, seed=2)
    up[:, 6] = up[:, 5] + 0.05 * up[:, 6]  # so that the fifth and sixth row say much by their difference
    inside, others = up[:, 5:11], torch.cat([up[:, :5], up[:, 11:]], 1)
    pivoted = PivotedLowRank(down @ inside, torch.linalg.solve(inside, others), 5)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    given = pivoted if rows == "neighbours" else Compose((pivoted, Permutation(order, 32)))
    d = after_given(tmp_path, given, "pivoted-low-rank:rank=6")
    assert isinstance(d.operator, Quantised) and isinstance(d.operator.inside, LowRank) and d.structure == "low-rank:rank=6 in 8 bits"
    as_it_was = quantised(given)
    assert as_it_was is not None
    off, off_as_it_was = ((form.dense() - given.dense()).norm() / given.dense().norm() for form in (d.operator, as_it_was))
    assert off < 0.01 < 0.02 < off_as_it_was


def test_plain_factors_that_would_be_larger_are_multiplied_out(tmp_path: Path) -> None:
    given = PivotedLowRank(normal(24, 16), normal(16, 16, seed=2), 0)  # 640 numbers; plain factors 896, all of it 768
    d = after_given(tmp_path, given, "pivoted-low-rank:rank=16")
    assert isinstance(d.operator, Quantised) and isinstance(d.operator.inside, Dense) and d.structure == "8 bits"
    assert (d.operator.dense() - given.dense()).norm() < 0.01 * given.dense().norm()


def test_factors_of_unlike_columns_are_balanced_first(tmp_path: Path) -> None:
    scale = torch.logspace(-3, 3, 6)
    given = LowRank(normal(24, 6) / scale, scale[:, None] * normal(6, 32, seed=2))
    d = after_given(tmp_path, given, "low-rank:rank=6")
    assert d.operator is not None and d.structure == "low-rank:rank=6 in 8 bits"
    assert isinstance(d.operator, Quantised) and (d.operator.dense() - given.dense()).norm() < 0.01 * given.dense().norm()


def after_given(folder: Path, operator: AbstractMatrix, structure: str) -> Decision:
    """What becomes of a site that an earlier pass made this."""
    g = graph(Net(lambda n, x: n.one(x), one=linear(operator.dense())), MLP)
    c = context(g, folder, objective="nbytes")
    (site,) = c.selected
    g.splice(site, operator, None)
    c.decisions[site.id] = Decision(site, "given", site_cost(site), operator.cost(), operator, structure)
    (d,) = Quantize().run(g, c)
    return d


def test_4_bits_by_size(tmp_path: Path) -> None:
    """Where a group of rows divides the inputs; where none does, 8 bits."""
    found = decide(tmp_path, Mlp(), Quantize(bits=4), objective="nbytes")
    for d in found.values():
        assert isinstance(d.operator, Quantised)
        bits = 4 if d.operator.shape[1] % 16 == 0 else 8
        assert d.structure == f"{bits} bits" and d.reason == f"in {bits} bits" and d.operator.bits == bits
        assert d.error is not None and 0 < d.error < (0.12 if bits == 4 else 0.02)
    assert {d.structure for d in found.values()} == {"4 bits", "8 bits"}


def test_4_bits_where_they_beat_8(tmp_path: Path) -> None:
    found = decide(tmp_path, Mlp(), Quantize(bits=4), objective="ms", target=FakeTarget(numbers))
    assert found["second"].structure == "4 bits" and found["second"].reason.startswith("in 4 bits: ")
    slow = FakeTarget(lambda form: numbers(form) * (9 if getattr(form, "bits", 8) == 4 else 1))
    found = decide(tmp_path, Mlp(), Quantize(bits=4), objective="ms", target=slow)
    assert {d.structure for d in found.values()} == {"8 bits"}


@pytest.mark.parametrize("bits", [2, 5, 16])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(RewriteError, match=f"quantize:bits={bits} is not allowed; give 8 or 4"):
        Quantize(bits=bits)


def test_dense_sites_may_stay(tmp_path: Path) -> None:
    found = decide(tmp_path, Mlp(), Quantize(dense=False), objective="nbytes")
    assert not any(d.rewritten for d in found.values())
    assert {d.reason for d in found.values()} == {"no earlier pass rewrote this one, and quantize:dense=false leaves those"}


class TiedHead(nn.Module):
    """ids (batch, seq) -> table -> first -> product with the same table -> (batch, seq, 200)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.head = nn.Embedding(200, 32), nn.Linear(32, 32), nn.Linear(32, 200, bias=False)
        self.table.weight = self.head.weight = nn.Parameter(normal(200, 32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.first(self.table(ids)))
        return y


TAPE = "ids:int64[batch,seq]"
TIED = "its weight is tied to table: the dense matrix has to stay"


def decide_head(folder: Path, **changes: Any) -> Decision:
    ids = samples({"ids": torch.arange(200).reshape(40, 5)})
    return decide(folder, TiedHead(), tape=TAPE, data=ids, **changes)["head"]


def test_a_tied_head_by_time_has_8_bits_beside_the_table(tmp_path: Path) -> None:
    head = decide_head(tmp_path, objective="ms", target=FakeTarget(numbers))
    assert head.rewritten and head.structure == "8 bits"
    assert head.reason.startswith("in 8 bits: ") and head.reason.endswith("; beside the dense matrix, which stays for table")
    assert head.operator is not None and head.after.nbytes == head.before.nbytes + head.operator.cost().nbytes


def test_a_tied_head_that_does_not_pay_stays(tmp_path: Path) -> None:
    by_size = decide_head(tmp_path, objective="nbytes")
    assert not by_size.rewritten and by_size.reason.startswith(TIED)
    by_time = decide_head(tmp_path, objective="ms", target=FakeTarget(slow_integers))
    assert not by_time.rewritten and by_time.reason.startswith(TIED) and "; 8 bits do not pay: " in by_time.reason


@pytest.mark.parametrize("source", ["module", "onnx"])
def test_a_tied_head_in_the_file(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntimeTarget, "measure", lambda _, forms, tokens, threads: [numbers(form) for form in forms])
    model = TiedHead().eval()
    given: Any = model if source == "module" else as_onnx(graph(model, TAPE)).model  # type: ignore[attr-defined]
    specs = [TAPE] if source == "module" else None
    result = rewriter.rewrite(
        given, "quantize", specs, "onnxruntime", objective="ms", timing=False, force=True, out=str(tmp_path / "m.onnx")
    )
    assert result.exit_code == 0, result.message
    assert result.report.matched["rewritten"] == 2
    stored = [list(t.dims) for t in onnx.load(str(tmp_path / "m.onnx")).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert stored.count([200, 32]) == 1  # the table, which is looked up in floats
    ids = torch.arange(6)[None]
    with torch.no_grad():
        dense = model(ids)
    for run in (Session(str(tmp_path / "m.onnx"), 1), open_covered(tmp_path / "m.onnx", 1)):
        (y,) = run({"ids": ids}).values()
        assert 0 < float((y - dense).norm() / dense.norm()) < 0.03


def test_other_floats_stay(tmp_path: Path) -> None:
    found = decide(tmp_path, Mlp().half(), tape=MLP.replace("float32", "float16"), objective="nbytes")
    assert {d.reason for d in found.values()} == {"its weight is float16; integers stand for float32 here"}


def test_weights_without_numbers_stay(tmp_path: Path) -> None:
    found = decide(tmp_path, Mlp(first=torch.zeros(32, 24)), objective="nbytes")
    assert found["first"].reason == "its weight is all zeros" and found["second"].rewritten


def rewritten(folder: Path, passes: str, target: str = "onnxruntime", **options: Any) -> rewriter.Result:
    suffix = ".pt2" if target == "torch" else ".onnx"
    given = {"target": target, "timing": False, "objective": "nbytes", "out": str(folder / f"m{suffix}"), **options}
    return rewriter.rewrite(WideMlp(), passes, [WIDE], **given)


@pytest.mark.parametrize(
    "passes",
    [
        "quantize",
        "quantize:bits=4",
        "low-rank:rank=16,quantize:bits=4",
        "low-rank:rank=16,quantize",
        "monarch:blocks=4:rank=4,quantize,pre-merge",
    ],
)
def test_a_file_runs_stock_and_with_kernels(passes: str, tmp_path: Path) -> None:
    result = rewritten(tmp_path, passes, force=True)
    assert result.exit_code == 0 and result.path is not None, result.message
    assert {
        s.structure.endswith("4 bits" if "=4" in passes.split("quantize")[1] else "8 bits") for s in result.report.sites if s.structure
    } == {True}
    x = normal(3, 7, 96).numpy()
    stock, fast = ort.InferenceSession(str(result.path)), rewriter.inference_session(result.path)  # type: ignore[attr-defined]
    (a,), (b,) = stock.run(None, {"x": x}), fast.run(None, {"x": x})
    assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a)  # inputs are rounded by tensor here, by row and block there
    assert not any(c.reason for c in coverage(result.path))


def test_a_file_is_about_a_quarter(tmp_path: Path) -> None:
    result = rewritten(tmp_path, "quantize")
    assert result.path is not None
    nbytes = result.report.nbytes
    assert nbytes["rewritten"] is not None and nbytes["dense"] is not None and nbytes["rewritten"] < 0.5 * nbytes["dense"]


def test_torch_files_hold_integers(tmp_path: Path) -> None:
    result = rewritten(tmp_path, "quantize", "torch")
    assert result.path is not None
    program = torch.export.load(result.path)
    assert torch.int8 in {t.dtype for t in program.state_dict.values()}


def test_a_bound_takes_integers_back(tmp_path: Path) -> None:
    result = rewritten(tmp_path, "quantize", max_error=1e-6)
    assert result.exit_code in (1, 3)
    assert all("given up for --max-error" in s.reason for s in result.report.sites)


def test_the_certificate_is_of_what_runs(tmp_path: Path) -> None:
    """Rounded inputs are part of the error that is reported."""
    result = rewritten(tmp_path, "quantize")
    assert result.report.output_error is not None
    assert 1e-4 < result.report.output_error.estimate < 0.05


def test_a_vector_stays(tmp_path: Path) -> None:
    found = decide(tmp_path, Net(lambda n, x: n.one(x), one=linear(normal(1, 24))), objective="nbytes")
    assert "single vector" in next(iter(found.values())).reason


def test_a_bound_is_one_on_what_runs(tmp_path: Path) -> None:
    """In the graph integers are multiplied as floats, in the file inputs are rounded too: sites are given up until the file holds it."""
    whole = rewritten(tmp_path, "quantize").report.output_error
    assert whole is not None
    result = rewritten(tmp_path, "quantize", max_error=0.9 * whole.estimate, force=True)
    assert result.exit_code in (0, 1), result.message
    assert sum("given up" in s.reason for s in result.report.sites) >= 1


def test_the_bias_takes_up_what_rounding_moves(tmp_path: Path) -> None:
    """Inputs far from zero: the error is that of what is left, and the shift is made anew."""
    _, before, after = after_two(tmp_path, Blocks(), "quantize")
    for key, d in after.items():
        old = before[key]
        assert (d.shift is None) == (old.shift is None)
        if d.shift is not None and old.shift is not None:
            assert not d.shift.equal(old.shift)
        assert d.error is not None and old.error is not None and abs(d.error - old.error) < 0.1 * old.error + 0.01


def test_a_merged_chain_is_rounded_whole(tmp_path: Path) -> None:
    parts = {"down": linear(normal(6, 24)), "up": linear(normal(20, 6, seed=2))}
    g = graph(Net(lambda n, x: n.up(n.down(x)), **parts), MLP)
    c = context(g, tmp_path, target=FakeTarget(lambda operator: 1.0 / operator.cost().params), objective="nbytes")
    c.decisions.update({d.site.id: d for d in PreMerge().run(g, c)})
    found = {d.site.name: d for d in Quantize().run(g, c)}
    assert found["down"].part_of == "up" and isinstance(found["up"].operator, Quantised)
    assert found["up"].structure == "merged in 8 bits" and found["up"].error is not None and found["up"].error < 0.02


def test_correct_leaves_integers_alone(tmp_path: Path) -> None:
    g, _, after = after_two(tmp_path, Blocks(), "quantize")
    c = context(g, tmp_path, data=data())
    c.decisions.update(after)
    assert {d.site.id: d for d in Correct().run(g, c)} == after
