"""A command line whose pipeline only remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rewriter import cli, pipeline
from rewriter.options import Options
from tests.cli.samples import full_report


@dataclass
class Asked:
    """The calls so far, and what the next one gives back or raises."""

    calls: list[tuple[str, Any, Options]] = field(default_factory=list)
    exit_code: int = 0
    error: BaseException | None = None

    def job(self, name: str) -> Callable[..., pipeline.Result]:
        def run(model: Any, options: Options) -> pipeline.Result:
            self.calls.append((name, model, options))
            if self.error is not None:
                raise self.error
            return pipeline.Result(full_report(), self.exit_code, f"{name}: code {self.exit_code}")

        return run

    @property
    def options(self) -> Options:
        return self.calls[-1][2]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()
    for name in ("rewrite", "plan"):
        monkeypatch.setattr(pipeline, name, found.job(name))
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a file m.pt2 in it, that no reader would take."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pt2").write_bytes(b"a model")
    return tmp_path


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def rewrite(capsys: pytest.CaptureFixture[str], folder: Path) -> Callable[..., Said]:
    def call(*args: str) -> Said:
        code = cli.run(args)
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return call
