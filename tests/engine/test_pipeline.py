"""The whole job on small models: what is written, when nothing is, and that a run that fails leaves everything as it was."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from rewriter import compare, pipeline
from rewriter import report as reports
from rewriter.backends.files.export import export_module
from rewriter.backends.files.onnx_file import save_onnx
from rewriter.backends.files.pt2 import save_pt2
from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.fx.target import TorchTarget
from rewriter.errors import RewriteError
from rewriter.inputs import parse_input
from rewriter.options import Options
from rewriter.report import Latency
from rewriter.tolerances import EQUAL
from tests.engine.nets import WIDE, Net, WideMlp, decaying, linear, normal, planted

LOSSY = "low-rank:rank=6"


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    save_onnx(FxGraph.of(export_module(WideMlp().eval(), [parse_input(WIDE)], {})).to_onnx(20), path)
    return path


def run(model: Any, publish: bool = True, data: Any = None, **options: Any) -> pipeline.Result:
    given = {"passes": LOSSY, "objective": "params", "samples": 64, "timing": False, "quiet": True, **options}
    return pipeline.rewrite(model, Options(**given), data, publish_to_out=publish)


def listing(folder: Path) -> dict[str, int]:
    """Everything below a folder, hidden files too, with sizes."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("target", ["torch", "onnxruntime", "onnx"])
@pytest.mark.parametrize("source", ["pt2", "onnx_file"])
def test_every_input_for_every_target(source: str, target: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(source)
    if source == "onnx_file" and target == "torch":
        with pytest.raises(RewriteError, match="--target torch needs a torch model, this one is ONNX; give --target onnxruntime or onnx"):
            run(str(path), target=target)
        return
    result = run(str(path), target=target)
    assert result.exit_code == 0 and result.report.matched == {"sites": 2, "rewritten": 2}
    out = path.with_name(f"m.rewritten.{'pt2' if target == 'torch' else 'onnx'}")
    assert result.path == out and str(out) in result.message
    x = normal(3, 5, 96, seed=4)
    if target == "torch":
        got = torch.export.load(out).module()(x=x)["y"]
    else:
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        (array,) = session.run(None, {"x": x.numpy()})
        got = torch.from_numpy(np.asarray(array))
    expected = WideMlp()(x)["y"].detach()
    error = float((got - expected).norm() / expected.norm())
    assert result.report.output_error is not None
    assert error < 4 * result.report.output_error.max
    assert error > EQUAL[torch.float32][0]  # it is the rewritten model that runs


@pytest.mark.parametrize(
    ("out", "target", "expected"),
    [("a.onnx", None, "onnxruntime"), ("a.pt2", None, "torch"), ("a.bin", None, "torch"), ("a.onnx", "onnx", "onnx")],
)
def test_the_target_is_asked_for_or_follows_the_suffix(pt2: Path, out: str, target: str | None, expected: str) -> None:
    assert run(str(pt2), out=str(pt2.parent / out), target=target).report.target == expected


def test_unknown_names_are_refused(pt2: Path) -> None:
    for options, said in (
        ({"target": "cuda"}, "--target cuda is unknown; give one of"),
        ({"passes": "svd"}, "svd"),
        ({"passes": ""}, "--passes is empty"),
        ({"out": str(pt2.parent / "none" / "m.pt2")}, "does not exist; make it, or give another -o OUT"),
        ({"metric": "no_such:thing"}, "--metric no_such:thing cannot be imported"),
        ({"include": ("nope.*",)}, r"--include 'nope.\*' matches no site"),
        ({"data": str(pt2.parent / "none.npz")}, "does not exist; give a .npz"),
        ({"out": str(pt2.parent / "a.pt2"), "target": "onnx"}, r"a\.pt2 would hold an \.onnx model; give a name that ends in \.onnx"),
        ({"cache": str(pt2)}, "is a file; give a folder"),
        ({"task": "fill-mask"}, "--task needs a Hugging Face folder"),
        ({"arch": "a:b"}, "--arch is for state dicts"),
        ({"dims": "depth=3"}, "--dim depth: no input has that dimension"),
    ):
        before = listing(pt2.parent)
        with pytest.raises(RewriteError, match=said):
            run(str(pt2), **options)
        assert listing(pt2.parent) == before


def test_an_existing_output_needs_force(pt2: Path) -> None:
    out = pt2.parent / "o.pt2"
    out.write_bytes(b"mine")
    with pytest.raises(RewriteError, match=r"o\.pt2 exists; give --force to replace it"):
        run(str(pt2), out=str(out))
    assert out.read_bytes() == b"mine"
    assert run(str(pt2), out=str(out), force=True).exit_code == 0
    assert out.read_bytes() != b"mine"


def test_same_seed_same_bytes(pt2: Path) -> None:
    def made(name: str, seed: int) -> bytes:
        folder = pt2.parent / name
        folder.mkdir()
        result = run(str(pt2), out=str(folder / "o.onnx"), target="onnxruntime", seed=seed, cache=str(folder / "cache"))
        assert result.path is not None
        return result.path.read_bytes()

    first, again, other = made("a", 0), made("b", 0), made("c", 1)
    assert _without(first, b"/a/") == _without(again, b"/b/")
    assert _without(first, b"/a/") != _without(other, b"/c/")


def _without(data: bytes, where: bytes) -> bytes:
    """The folder stands in the recipe that the file holds."""
    return data.replace(where, b"/-/")


def test_nothing_to_do_is_exit_1_and_writes_nothing(pt2: Path) -> None:
    before = listing(pt2.parent)
    result = run(str(pt2), passes="auto")
    assert result.exit_code == 1 and "a lossy form needs a bound" in result.message
    assert listing(pt2.parent) == before
    assert [row.status for row in result.report.sites] == ["kept", "kept"]
    allowed = run(str(pt2), passes="auto", allow_noop=True)
    assert allowed.exit_code == 0 and allowed.path is not None and allowed.path.exists()
    assert allowed.report.output_error is not None and allowed.report.output_error.estimate <= EQUAL[torch.float32][0]


def test_a_model_without_sites(tmp_path: Path) -> None:
    result = run(Net(lambda n, x: torch.sin(x)), publish=False, inputs=("x:float32[batch,4]",))
    assert result.exit_code == 1
    assert result.message == "nothing was rewritten: the model has no linear, attention, recurrence or adapter site"


def test_lossy_sites_are_given_up_worst_first(pt2: Path) -> None:
    free = run(str(pt2), publish=False).report
    assert free.output_error is not None
    worst = max(free.sites, key=lambda row: row.error or 0)
    bound = 0.9 * free.output_error.estimate
    result = run(str(pt2), max_error=bound)
    rows = {row.name: row for row in result.report.sites}
    assert result.exit_code == 0 and result.report.matched["rewritten"] == 1
    assert rows[worst.name].status == "kept"
    assert rows[worst.name].reason.startswith(f"given up for --max-error {bound}: low-rank:rank=6 had weighted error {worst.error:.3g}")
    assert rows[worst.name].cost["params"]["before"] == rows[worst.name].cost["params"]["after"]
    certificate = result.report.output_error
    assert certificate is not None and certificate.upper <= bound == certificate.bound


def test_a_bound_that_holds_gives_nothing_up(pt2: Path) -> None:
    result = run(str(pt2), max_error=10.0)
    assert result.exit_code == 0 and result.report.matched["rewritten"] == 2


def test_nothing_left_is_exit_1(pt2: Path) -> None:
    before = listing(pt2.parent)
    result = run(str(pt2), max_error=1e-9)
    assert result.exit_code == 1 and "given up for --max-error" in result.message
    assert listing(pt2.parent) == before


def test_a_bound_that_exact_rewrites_exceed_is_exit_3(tmp_path: Path) -> None:
    net = Net(lambda n, x: n.fc(x), fc=linear(planted(48, 40, 3)))
    result = run(net, publish=False, inputs=("x:float32[batch,40]",), passes="auto", max_error=0.0)
    assert result.exit_code == 3 and "with nothing lossy left" in result.message
    assert result.emitted is None


def test_the_bound_is_held_on_the_emitted_file_too(pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graph keeps and the file does not is caught after reloading."""
    whole = TorchTarget.open

    def worse(self: Any, path: Path, threads: int) -> Callable[..., Any]:
        inner = whole(self, path, threads)
        return lambda feeds: {name: 3 * value for name, value in inner(feeds).items()}

    monkeypatch.setattr(TorchTarget, "open", worse)
    before = listing(pt2.parent)
    result = run(str(pt2), max_error=1.0)
    assert result.exit_code == 3 and "the emitted model's error" in result.message
    assert listing(pt2.parent) == before


def test_an_exact_rewrite_that_moves_the_output_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TorchTarget.open
    monkeypatch.setattr(
        TorchTarget, "open", lambda self, path, threads: lambda f: {k: 1.01 * v for k, v in whole(self, path, threads)(f).items()}
    )
    net = Net(lambda n, x: n.fc(x), fc=linear(planted(48, 40, 3)))
    with pytest.raises(RewriteError, match=r"an exact rewrite moved the output by 0\.01"):
        run(net, publish=False, inputs=("x:float32[batch,40]",), passes="auto")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_exact_rewrite_that_gives_no_numbers_is_a_fault(poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TorchTarget.open
    monkeypatch.setattr(
        TorchTarget, "open", lambda self, path, threads: lambda f: {k: v * poison for k, v in whole(self, path, threads)(f).items()}
    )
    net = Net(lambda n, x: n.fc(x), fc=linear(planted(48, 40, 3)))
    with pytest.raises(RewriteError, match="an exact rewrite moved the output by inf"):
        run(net, publish=False, inputs=("x:float32[batch,40]",), passes="auto")


def test_a_file_that_grew_is_refused_without_force(tmp_path: Path) -> None:
    """At this size two factors and their names take more bytes than the matrix."""
    net = Net(lambda n, x: n.fc(x), fc=linear(decaying(9, 8)))
    options: dict[str, Any] = {"inputs": ("x:float32[batch,8]",), "passes": "low-rank:rank=4", "target": "onnxruntime"}
    refused = run(net, publish=False, **options)
    assert refused.exit_code == 1 and "the output grew from" in refused.message and refused.emitted is None
    forced = run(net, publish=False, force=True, **options)
    assert forced.exit_code == 0 and forced.emitted is not None and forced.emitted.exists()


def test_a_slower_model_is_refused_without_force(pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [Latency(1, 1, 0.1, 0.1, 0.2, 0.5, 0.5, "", [0.4, 0.6]), Latency(256, 1, 0.2, 0.2, 0.1, 2.0, 2.0, "", [1.9, 2.1])]
    monkeypatch.setattr(pipeline, "latencies", lambda *a: slow)
    before = listing(pt2.parent)
    refused = run(str(pt2), timing=True)
    assert refused.exit_code == 1 and "slower than dense (0.50x at T=1, 2.00x at T=256)" in refused.message
    assert listing(pt2.parent) == before
    assert refused.report.latency == slow
    assert run(str(pt2), timing=True, force=True).exit_code == 0


@pytest.mark.parametrize("stage", ["certify", "latencies", "publish", "_report"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_run_that_dies_leaves_no_litter(pt2: Path, stage: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    out = pt2.parent / "o.onnx"
    out.write_bytes(b"mine")
    before = listing(pt2.parent)

    def die(*args: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(pipeline, stage, die)
    with pytest.raises(type(error)):
        run(str(pt2), out=str(out), force=True, timing=True)
    assert listing(pt2.parent) == before
    assert out.read_bytes() == b"mine"


def test_a_full_disk_while_emitting(pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(pt2.parent)

    def half(self: Any, graph: Any, path: Path, options: Any) -> None:
        path.write_bytes(b"half a model")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TorchTarget, "emit", half)
    with pytest.raises(OSError, match="No space left"):
        run(str(pt2))
    assert listing(pt2.parent) == before


def test_plan_writes_nothing_and_rewrite_reuses_its_fits(pt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(pt2.parent)
    options = Options(passes=LOSSY, objective="params", samples=64, timing=False, quiet=True)
    planned = pipeline.plan(str(pt2), options)
    assert planned.exit_code == 0 and listing(pt2.parent) == before
    assert [row.status for row in planned.report.sites] == ["planned", "planned"]
    assert planned.report.output_error is not None and planned.report.latency == []

    def never(*args: Any) -> None:
        raise AssertionError("fitted again")

    monkeypatch.setattr("rewriter.fit._judged", never)
    monkeypatch.setattr("rewriter.calibrate.Calibration._run", never)
    done = pipeline.rewrite(str(pt2), options)
    rows = [(row.name, row.structure, row.error, row.reason) for row in done.report.sites]
    assert rows == [(row.name, row.structure, row.error, row.reason) for row in planned.report.sites]


def test_plan_says_what_rewrite_would_refuse(pt2: Path) -> None:
    options = Options(passes="auto", samples=64, timing=False, quiet=True)
    assert pipeline.plan(str(pt2), options).message.startswith("plan: nothing would be rewritten: 2 sites were kept")
    net = Net(lambda n, x: n.fc(x), fc=linear(planted(48, 40, 3)))
    exact = dataclasses.replace(options, inputs=("x:float32[batch,40]",), max_error=0.0)
    found = pipeline.plan(net, exact)
    assert found.exit_code == 0 and "plan: the output error exceeds --max-error 0.0" in found.message


def test_the_emitted_model_carries_its_report(pt2: Path) -> None:
    import onnx

    result = run(str(pt2), out=str(pt2.parent / "o.onnx"), target="onnxruntime")
    stored = {p.key: p.value for p in onnx.load(str(result.path)).metadata_props}["rewriter.report"]
    content = json.loads(stored)
    reports.validate(content)
    assert [row["reason"] for row in content["sites"]] == [row.reason for row in result.report.sites]
    assert str(pt2) == content["model"]["path"]


def test_recipe_replays_to_the_same_decisions(pt2: Path, tmp_path: Path) -> None:
    first = run(str(pt2), target="onnx", include=("first",), seed=3, tokens="2,8")
    first.report.save(tmp_path / "r.json")
    loaded = reports.load(tmp_path / "r.json")
    assert loaded.to_json() == first.report.to_json()
    again = pipeline.rewrite(str(pt2), dataclasses.replace(Options.from_recipe(loaded.recipe), force=True))
    assert again.report.sites == first.report.sites and again.report.target == "onnx"
    left_out = next(row for row in first.report.sites if row.name == "second")
    assert (left_out.status, left_out.reason) == ("kept", "not named by --include")


def test_a_second_structure_leaves_the_first_ones_sites(pt2: Path) -> None:
    result = run(str(pt2), passes=f"{LOSSY},block-dense:params=0.4")
    assert {row.structure for row in result.report.sites} == {"low-rank:rank=6"}


def test_a_rewritten_model_is_read_with_its_operators(pt2: Path) -> None:
    once = run(str(pt2), out=str(pt2.parent / "o.onnx"), target="onnxruntime")
    twice = run(str(once.path), passes="monarch", target="onnxruntime")
    assert twice.exit_code == 1
    assert all(row.reason == "already structured: LowRank" for row in twice.report.sites if row.kind == "linear"), twice.report.sites


def test_metric_is_reported(pt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def gap(dense, rewritten, feeds):\n    return float((dense['y'] - rewritten['y']).abs().max())\n"
    (tmp_path / "my_metric.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    error = run(str(pt2), metric="my_metric:gap").report.output_error
    assert error is not None and error.metric is not None
    assert error.metric["name"] == "my_metric:gap" and error.metric["estimate"] > 0


def test_verify_and_bench_compare_models_of_one_interface(pt2: Path, tmp_path: Path) -> None:
    out = run(str(pt2), out=str(tmp_path / "o.pt2")).path
    options = Options(samples=32, quiet=True, tokens="4", max_error=1e-6)
    error, code = compare.verify(str(pt2), str(out), options)
    assert code == 3 and error.upper > 1e-6 and error.bound == 1e-6
    same, code = compare.verify(str(pt2), str(pt2), options)
    assert code == 0 and same.upper == 0
    (found,) = compare.bench(str(pt2), [str(out)], options).contenders
    (row,) = found.rows
    assert row.tokens == 4 and row.ratio is not None and row.ratio > 0 and found.error is None
    assert row.predicted_seconds is not None
    other = tmp_path / "other.pt2"
    save_pt2(_renamed(), other)
    calls: list[Callable[[], object]] = [
        lambda: compare.verify(str(pt2), str(other), options),
        lambda: compare.bench(str(pt2), [str(out), str(other)], options),
    ]
    for call in calls:
        with pytest.raises(RewriteError, match="the models' inputs differ: x against z; compare models of one interface"):
            call()


def _renamed() -> torch.export.ExportedProgram:
    class Renamed(WideMlp):
        def forward(self, z: Tensor) -> dict[str, Tensor]:
            return super().forward(z)

    return export_module(Renamed().eval(), [parse_input(WIDE.replace("x:", "z:"))], {})


def test_external_data_is_published_with_its_model(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.backends.files.onnx_file.MAX_INLINE_NBYTES", 1000)
    folder = onnx_file.parent / "out"
    folder.mkdir()
    result = run(str(onnx_file), out=str(folder / "o.onnx"))
    assert sorted(os.listdir(folder)) == ["o.onnx", "o.onnx.data"]
    moved = folder.rename(folder.with_name("moved"))
    session = onnxruntime.InferenceSession(str(moved / "o.onnx"), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": normal(2, 3, 96).numpy()})[0].shape == (2, 3, 64)  # type: ignore[union-attr]
    assert result.report.nbytes["rewritten"] == sum(p.stat().st_size for p in moved.iterdir())


def test_rewriter_is_not_needed_to_run_what_it_wrote(pt2: Path) -> None:
    import subprocess
    import sys

    out = run(str(pt2), out=str(pt2.parent / "o.pt2")).path
    code = (
        "import sys, torch\n"
        f"y = torch.export.load({str(out)!r}).module()(x=torch.ones(2, 7, 96))['y']\n"
        "assert y.shape == (2, 7, 64)\n"
        "assert not any(name.split('.')[0] == 'rewriter' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
