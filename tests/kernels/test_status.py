"""`rewrite kernels`: what is there, what would be taken, and one line where something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewriter import cli
from rewriter.backends.kernels import library, session, status
from tests.kernels.test_session import fresh, rewritten

__all__ = ["fresh", "rewritten"]


def test_status_and_coverage(rewritten: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["kernels", "status", str(rewritten)]) == 0
    out = capsys.readouterr().out
    assert str(library.described().path) in out
    assert "a     Monarch    yes + bias + gelu" in out
    assert out.endswith("6 of 6 structured layers run in kernels under rewriter.inference_session\n")


def test_what_is_not_built_is_not_built_by_asking(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    assert cli.run(["kernels"]) == 0
    assert "built     no; `rewrite kernels build` does it" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.so"))


def test_build_compiles_again(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = session.trusted()
    monkeypatch.setattr(status, "trusted", lambda: real)
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path))
    commands = []
    monkeypatch.setattr(library, "_compile", lambda command: commands.append(command) or Path(command[-1]).write_bytes(b""))
    assert cli.run(["kernels", "build"]) == 0
    assert cli.run(["kernels", "build"]) == 0
    assert len(commands) == 2 and commands[0][0] == library.compiler()


def test_wrong_words_and_files_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"a model")
    for words, said in (
        (["kernels", "start"], "rewrite kernels start: there are status and build"),
        (["kernels", "status", str(tmp_path / "none.onnx")], "there is no such file"),
        (["kernels", "status", str(tmp_path / "m.onnx")], "m.onnx"),
    ):
        assert cli.run(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_no_compiler_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWRITER_KERNELS", "off")
    assert cli.run(["kernels"]) == 2
    assert "switched off by REWRITER_KERNELS=off" in capsys.readouterr().err
