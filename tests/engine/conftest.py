"""A cache of its own for every test, so that nothing is reused that a test did not make; and a model's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter.backends.files.export import export_module
from rewriter.backends.files.pt2 import save_pt2
from rewriter.inputs import parse_input
from tests.engine.nets import WIDE, WideMlp


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("REWRITER_CACHE", str(folder))
    return folder


@pytest.fixture
def pt2(tmp_path: Path) -> Path:
    path = tmp_path / "m.pt2"
    save_pt2(export_module(WideMlp().eval(), [parse_input(WIDE)], {}), path)
    return path
