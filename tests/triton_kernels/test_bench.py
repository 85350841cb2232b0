"""tools/bench_gpu.py: all of it but the device's clock and graphs runs here, and it prints no figure of what is off."""

from __future__ import annotations

import time
from types import ModuleType
from typing import Any

import pytest
import torch

from rewriter.backends.triton_kernels import chain, delta
from tests.tools import tool

SMALL = ["--widths", "32", "--tokens", "1", "--heads", "2", "--head-width", "16", "--seconds", "0"]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: ModuleType = tool("bench_gpu")
    monkeypatch.setattr(module, "graphed", module.launched)
    monkeypatch.setattr(module, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def elapsed(call: Any) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    monkeypatch.setattr(module, "elapsed", elapsed)
    return module


def test_every_family_and_recurrence_has_its_figures(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(torch.device("cpu"), bench.arguments(SMALL))
    out = capsys.readouterr().out
    for name in ("dense", "low-rank int8", "block-dense", "monarch int8", "block-shuffle", "kernel in a graph", "T=1, launched"):
        assert name in out
    assert "nan" not in out


@pytest.mark.parametrize("which", ["chain", "delta"])
def test_what_is_off_has_none(which: str, bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module: Any = {"chain": chain, "delta": delta}[which]
    right = module.run
    monkeypatch.setattr(module, "run", lambda *args: _spoiled(right(*args)))
    given = bench.arguments(SMALL)
    given.widths = given.widths if which == "chain" else ()
    with pytest.raises(SystemExit, match=r"red: .* differs from its plain form; no figure is printed"):
        bench.main(torch.device("cpu"), given)
    assert "T=1" not in capsys.readouterr().out


def _spoiled(found: Any) -> Any:
    return [1.2 * y for y in found] if isinstance(found, list) else 1.2 * found
