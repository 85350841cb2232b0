"""Certificates of whole runs: the second law beside the data's, bounds inside an interval, what a seed names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewriter import compare, pipeline
from rewriter import report as reports
from rewriter.errors import RewriteError
from rewriter.options import Options
from tests.engine.nets import Net, decaying, linear, normal

LOSSY = "low-rank:rank=6"


def run(model: Any, publish: bool = True, data: Any = None, **options: Any) -> pipeline.Result:
    given = {"passes": LOSSY, "objective": "params", "samples": 64, "timing": False, "quiet": True, **options}
    return pipeline.rewrite(model, Options(**given), data, publish_to_out=publish)


def test_data_have_the_invented_law_beside_them(pt2: Path, tmp_path: Path) -> None:
    """In `rewrite`, `plan` and `verify`; without data there is one law only, and its report says what was drawn."""
    data = {"x": 3 * normal(64, 5, 96, seed=7).abs()}
    np.savez(tmp_path / "d.npz", x=data["x"].numpy())
    result = run(str(pt2), data=data, out=str(tmp_path / "o.pt2"))
    planned = pipeline.plan(str(pt2), Options(passes=LOSSY, objective="params", timing=False, quiet=True), data)
    judged, _ = compare.verify(str(pt2), str(tmp_path / "o.pt2"), Options(data=str(tmp_path / "d.npz"), quiet=True))
    for found in (result.report.output_error, planned.report.output_error, judged):
        assert found is not None and found.beside is not None and found.beside.estimate is not None
        assert found.law.startswith("data: ") and found.beside.law == "invented: standard normals; scrambled Sobol' points"
        assert (found.beside.samples, found.beside.replications, found.precision) == (64, 16, None)
    alone = run(str(pt2), publish=False).report.output_error
    assert alone is not None and alone.beside is None and alone.samples == 64 and alone.precision == 0.05
    assert judged.estimate > judged.half_width > 0


def test_a_model_that_takes_no_invented_inputs_keeps_its_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scalar input cannot be invented: the data's figure stands alone, and the report says why."""
    net = Net(lambda n, x: n.fc(x), fc=linear(decaying(48, 40)))
    monkeypatch.setattr("rewriter.inputs._check_inventable", _refuse)
    result = run(net, publish=False, inputs=("x:float32[batch,40]",), data={"x": normal(64, 40)}, passes="low-rank:rank=4")
    found = result.report.output_error
    assert result.exit_code == 0 and found is not None and found.beside is not None
    assert found.beside.estimate is None and "cannot be invented" in found.beside.note
    reports.validate(json.loads(result.report.to_json()))


def _refuse(*given: Any) -> None:
    raise RewriteError("input 'n' cannot be invented")


def test_a_site_is_not_given_up_while_more_samples_may_save_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound between the error and the upper end of a first interval: drawn on until it is outside, all sites stay."""
    net, spec = Net(lambda n, x: n.fc(x), fc=linear(decaying(48, 40))), ("x:float32[batch,40]",)
    options: dict[str, Any] = {"publish": False, "inputs": spec, "passes": "low-rank:rank=4", "force": True}
    first = run(net, precision=0.9, **options).report.output_error
    far = run(net, precision=0.003, **options).report.output_error
    assert first is not None and far is not None
    bound = (max(far.upper, first.estimate) + first.upper) / 2
    assert far.upper < bound < first.upper
    result = run(net, precision=0.9, max_error=bound, **options)
    found = result.report.output_error
    assert result.exit_code == 0 and result.report.matched["rewritten"] == 1
    assert found is not None and found.samples > first.samples and found.upper <= bound
    monkeypatch.setattr("rewriter.verify._undecided", lambda found: False)
    assert run(net, precision=0.9, max_error=bound, **options).report.matched["rewritten"] == 0


def test_a_seed_names_the_certificate(pt2: Path) -> None:
    first, again, other = (run(str(pt2), publish=False, seed=seed).report.output_error for seed in (0, 0, 1))
    assert first == again != other
