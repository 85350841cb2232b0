"""raise-recurrence and diagonalize as users run them: a model in, a checked file out, the same results at every length."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor
from torch._higher_order_ops import scan

from rewriter import rewrite
from rewriter.errors import RewriteError
from rewriter.passes.raise_recurrence import spelled
from rewriter.pipeline import Result
from rewriter.registry import targets
from rewriter.rule import Context
from tests.detect.loops import CASES, exported, onnx_loop

STATES, CHANNELS = 12, 2
INPUTS = ["x:float32[batch,time,2]"]
TARGETS = {"onnxruntime": ".onnx", "onnx": ".onnx", "torch": ".pt2"}


class Linear(torch.nn.Module):
    """h' = h A + x B + s, y = h' C from zero; `last` gives the last state too."""

    def __init__(self, a: Tensor, last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.last = torch.nn.Parameter(a), last
        self.b, self.c = torch.nn.Linear(CHANNELS, len(a)), torch.nn.Linear(len(a), CHANNELS)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        def body(h: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            h = h @ self.a + self.b(u)
            return h, self.c(h)

        h, y = scan(body, x.new_zeros(x.shape[0], len(self.a)), x.transpose(0, 1))
        return (y.transpose(0, 1), h) if self.last else y.transpose(0, 1)


def stable(size: int = STATES, radius: float = 0.9) -> Tensor:
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    return radius * a / torch.linalg.eigvals(a).abs().max()


def run(model: torch.nn.Module, passes: str, target: str, folder: Path, **options: object) -> Result:
    out = folder / f"model{TARGETS[target]}"
    return rewrite(model, passes, INPUTS, target, out=str(out), tokens="64", samples=4, timing=False, cache=str(folder), **options)


def same(model: torch.nn.Module, result: Result, target: str, tolerance: float) -> None:
    assert result.path is not None, result.message
    runner = targets()[target]().open(result.path, 1)
    for tokens, batch in ((1, 1), (5, 2), (64, 1), (131, 3)):
        x = torch.randn(batch, tokens, CHANNELS)
        want = model(x)
        for a, b in zip(runner({"x": x}).values(), want if isinstance(want, tuple) else (want,), strict=True):
            assert float(((a - b).norm() / b.norm()).detach()) < tolerance


@pytest.fixture
def others_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured times are not what the test is about."""
    monkeypatch.setattr(Context, "seconds", lambda self, forms: [[1.0] + [0.5] * (len(forms) - 1)])


def reason(result: Result) -> str:
    return next(row.reason for row in result.report.sites if row.kind == "recurrence")


@pytest.mark.parametrize("target", TARGETS)
def test_a_scan_becomes_one_node(target: str, tmp_path: Path) -> None:
    model = Linear(stable(), last=True)
    result = run(model, "raise-recurrence", target, tmp_path)
    assert "in one node" in reason(result)
    assert any("at 1, " in note and "129 tokens" in note for note in result.report.notes)
    same(model, result, target, 1e-5)


def test_an_empty_sequence_is_an_error_and_no_crash(tmp_path: Path) -> None:
    """ONNX Runtime's Scan refuses it; one whose time axis is not in front divided by zero and took the process along."""
    result = run(Linear(stable(), last=True), "raise-recurrence", "onnxruntime", tmp_path)
    text = "import numpy, onnxruntime, sys; s = onnxruntime.InferenceSession(sys.argv[1])"
    feed = f"s.run(None, {{'x': numpy.zeros((2, 0, {CHANNELS}), 'float32')}})"
    done = subprocess.run([sys.executable, "-c", f"{text}; {feed}", str(result.path)], capture_output=True, text=True)
    assert done.returncode == 1 and "Scan" in done.stderr


def test_chunks_that_are_no_faster_are_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "seconds", lambda self, forms: [[1.0] + [0.95] * (len(forms) - 1)])
    result = run(Linear(stable()), "raise-recurrence", "onnxruntime", tmp_path)
    assert [row.structure for row in result.report.sites if row.kind == "recurrence"] == ["LinearSystem"]


def test_a_node_survives_the_conversion_of_an_old_opset(tmp_path: Path) -> None:
    """onnx's own converter, which takes what onnxscript's does not, drops the metadata of nodes."""
    model = onnx_loop()
    model.graph.opset_imports[""] = 13
    result = rewrite(model, "raise-recurrence", target="onnx", out=str(tmp_path / "m.onnx"), timing=False)
    assert result.report.sites[0].status == "rewritten"
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 20


def test_a_transition_of_two_reflections_is_kept_as_factors_where_that_is_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    q, _ = torch.linalg.qr(torch.randn(STATES, 2, generator=torch.Generator().manual_seed(5)))
    model = Linear(torch.eye(STATES) - 1.5 * q @ q.T)
    costs = {"LinearSystem:factors=2": 1.0, "LinearSystem": 2.0}
    monkeypatch.setattr(Context, "seconds", lambda self, forms: [[costs.get(spelled(form), 3.0) for form in forms]])
    result = run(model, "raise-recurrence", "onnxruntime", tmp_path)
    (row,) = [r for r in result.report.sites if r.kind == "recurrence"]
    assert row.structure == "LinearSystem:factors=2" and "identity plus rank 2 transition" in row.reason
    same(model, result, "onnxruntime", 1e-5)


def test_a_diagonal_form_that_is_no_faster_is_left_with_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of the diagonal forms stands beside the dense one."""
    monkeypatch.setattr(Context, "seconds", lambda self, forms: [[1.0, 0.95] + [2.0] * (len(forms) - 2)])
    result = run(Linear(stable()), "diagonalize", "onnxruntime", tmp_path)
    assert reason(result).endswith("no diagonal form is faster by 10%: 950.000 ms against 1000.000 ms dense at T=64")


@pytest.mark.usefixtures("others_are_faster")
@pytest.mark.parametrize("target", ["onnxruntime", "torch"])
def test_a_dense_recurrence_becomes_diagonal(target: str, tmp_path: Path) -> None:
    model = Linear(stable())
    result = run(model, "diagonalize:error=1e-4", target, tmp_path)
    (row,) = [r for r in result.report.sites if r.kind == "recurrence"]
    assert row.status == "rewritten" and not row.exact and row.error is not None and row.error <= 1e-4
    assert "eig: A as it stands" in row.reason
    same(model, result, target, 1e-4)


@pytest.mark.usefixtures("others_are_faster")
def test_a_jordan_block_is_perturbed_or_truncated_and_within_its_bound(tmp_path: Path) -> None:
    a = 0.5 * torch.eye(STATES) + 0.5 * torch.diag(torch.ones(STATES - 1), 1)
    model = Linear(a)
    result = run(model, "diagonalize:error=5e-3", "onnxruntime", tmp_path)
    (row,) = [r for r in result.report.sites if r.kind == "recurrence"]
    assert row.error is not None and 0 < row.error <= 5e-3
    assert "truncated" in row.reason or "perturbed" in row.reason


@pytest.mark.parametrize(
    ("model", "passes", "said"),
    [
        (Linear(stable(), last=True), "diagonalize", "its state goes in or out in the model's own basis"),
        (Linear(torch.diag(stable().diagonal())), "diagonalize", "its transition is diagonal already"),
        (Linear(0.5 * torch.eye(STATES) + torch.diag(torch.ones(STATES - 1), 1)), "diagonalize:error=1e-9", "stays dense"),
        (torch.nn.LSTM(CHANNELS, STATES, batch_first=True), "raise-recurrence", "LSTM: non-linear in its state"),
    ],
)
def test_what_is_kept_says_why(model: torch.nn.Module, passes: str, said: str, tmp_path: Path) -> None:
    inputs = ["input:float32[batch,time,2]"] if isinstance(model, torch.nn.LSTM) else INPUTS
    result = rewrite(model, passes, inputs, "onnxruntime", out=str(tmp_path / "m.onnx"), timing=False, samples=4, cache=str(tmp_path))
    assert result.exit_code == 1 and said in reason(result)


def test_an_error_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match="error above 0"):
        run(Linear(stable()), "diagonalize:error=0", "onnxruntime", tmp_path)


@pytest.mark.usefixtures("others_are_faster")
def test_the_two_passes_compose(tmp_path: Path) -> None:
    """What diagonalize rewrote, raise-recurrence leaves alone."""
    model = Linear(stable())
    result = run(model, "diagonalize,raise-recurrence", "onnxruntime", tmp_path)
    assert "eig: A as it stands" in reason(result)
    same(model, result, "onnxruntime", 1e-3)


def test_a_source_that_the_target_cannot_be_given_is_rewritten_all_the_same(tmp_path: Path) -> None:
    """torch.onnx loses the parameters of a scan whose body holds an einsum of a dynamic batch."""
    out = tmp_path / "m.onnx"
    result = rewrite(exported(CASES["retention"], True), "raise-recurrence", None, "onnxruntime", out=str(out), samples=16)
    assert result.exit_code == 0 and out.exists() and not result.report.latency
    assert any("the model as it was given has no size and no times here: torch.onnx cannot" in note for note in result.report.notes)
