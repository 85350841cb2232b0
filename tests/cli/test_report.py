"""The report's JSON is what the schema says, and its text is stable."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewriter import render
from rewriter.errors import RewriteError
from rewriter.pipeline import Result
from rewriter.report import Report, load, validate
from tests.cli.samples import full_report, unbounded

MESSAGE = "small.onnx: 3 of 18 sites rewritten, reloaded and checked"


def content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(full_report().to_json())
    return found


def bare() -> Report:
    """As when nothing was found."""
    empty = {"sites": 0, "rewritten": 0}
    return dataclasses.replace(full_report(), sites=[], matched=empty, output_error=None, latency=[], notes=[], recipe={}, nbytes={})


@pytest.mark.parametrize("report", [full_report(), full_report("planned"), bare()])
def test_round_trip(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "r.json")
    assert load(tmp_path / "r.json") == report


def test_schema_comes_first_and_figures_that_cannot_be_had_are_null(tmp_path: Path) -> None:
    report = dataclasses.replace(full_report(), output_error=unbounded(), seconds=math.nan)
    text = report.to_json()
    assert next(iter(json.loads(text))) == "schema"
    assert json.loads(text)["output_error"]["half_width"] is None
    assert json.loads(text)["seconds"] is None
    report.save(tmp_path / "r.json")
    loaded = load(tmp_path / "r.json")
    assert loaded.output_error == unbounded()
    assert loaded.output_error is not None
    assert not loaded.output_error.upper <= 1e9


def _breakages() -> dict[str, Callable[[dict[str, Any]], object]]:
    return {
        "unknown key": lambda c: c.update(extra=1),
        "no sites": lambda c: c.pop("sites"),
        "another schema": lambda c: c.update(schema=2),
        "sha256 of another length": lambda c: c["model"].update(sha256="ab"),
        "unknown key of a site": lambda c: c["sites"][0].update(extra=1),
        "unknown status": lambda c: c["sites"][0].update(status="done"),
        "empty reason": lambda c: c["sites"][0].update(reason=""),
        "shape of three": lambda c: c["sites"][0].update(shape=[1, 2, 3]),
        "null cost": lambda c: c["sites"][0]["cost"]["flops"].update(after=None),
        "no unit": lambda c: c["sites"][0]["cost"].pop("nbytes"),
        "text for a number": lambda c: c["output_error"].update(estimate="small"),
        "no law": lambda c: c["output_error"].update(law=""),
        "certain": lambda c: c["output_error"].update(confidence=1.0),
        "negative error": lambda c: c["output_error"].update(estimate=-0.1),
        "zero tokens": lambda c: c["latency"][0].update(tokens=0),
        "missing ratio": lambda c: c["latency"][0].pop("ratio"),
        "numeric version": lambda c: c["versions"].update(torch=2.13),
        "other size": lambda c: c["nbytes"].update(int8=3),
        "note of no text": lambda c: c["notes"].append(None),
    }


@pytest.mark.parametrize("name", _breakages())
def test_broken_reports_are_refused(name: str, tmp_path: Path) -> None:
    broken = copy.deepcopy(content())
    _breakages()[name](broken)
    with pytest.raises(RewriteError, match="not a report of schema 1") as caught:
        validate(broken)
    assert "\n" not in str(caught.value)
    (tmp_path / "r.json").write_text(json.dumps(broken))
    with pytest.raises(RewriteError):
        load(tmp_path / "r.json")


def rendered(report: Report, monkeypatch: pytest.MonkeyPatch, columns: int | None = None, quiet: bool = False) -> str:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", str(columns))
    stream = io.StringIO()
    render.show_result(Result(report, 0, MESSAGE), quiet, stream)
    return stream.getvalue()


def test_text_of_a_report(golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    golden("report.txt", rendered(full_report(), monkeypatch))


def test_text_of_a_narrow_plan(golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    golden("report_80.txt", rendered(full_report("planned"), monkeypatch, 80))


@pytest.mark.parametrize("columns", [80, 90, 100, 120, 200])
def test_no_line_is_wider_than_asked(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = rendered(full_report(), monkeypatch, columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert "\x1b" not in "".join(lines)


def test_quiet_and_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rendered(full_report(), monkeypatch, quiet=True) == MESSAGE + "\n"
    text = rendered(bare(), monkeypatch)
    assert "matched 0 of 0 sites" in text
    assert "latency" not in text


def test_many_like_reasons_are_told_by_example(monkeypatch: pytest.MonkeyPatch) -> None:
    site = full_report().sites[3]
    many = [dataclasses.replace(site, name=f"block.{i}", reason=f"1.{i:02}x slower at 1 token") for i in range(40)]
    text = rendered(dataclasses.replace(full_report(), sites=many), monkeypatch)
    assert "40 linear sites with other figures each, such as block.0: 1.00x slower at 1 token" in text
    assert "and 31 more (--report lists all)" in text


def test_control_characters_of_names_do_not_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [dataclasses.replace(s, name="a\x1b[2Jb\nc", reason="r\x07") for s in full_report().sites]
    text = rendered(dataclasses.replace(full_report(), sites=sites), monkeypatch)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "a [2Jb c" in text


def test_figures_that_could_not_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    text = rendered(dataclasses.replace(full_report(), output_error=unbounded()), monkeypatch)
    assert "no interval" in text
    assert "no int8 figure: onnxruntime cannot quantise this model" in text
