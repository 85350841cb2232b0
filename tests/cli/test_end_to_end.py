"""The command itself, in a process of its own: exit codes, one line on stderr, files, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rewriter.backends.files.export import export_module
from rewriter.backends.files.pt2 import save_pt2
from rewriter.inputs import parse_input
from rewriter.report import validate

REWRITE = str(Path(sys.executable).with_name("rewrite"))
LOSSY = ("--passes", "low-rank:rank=8", "--objective", "params", "--samples", "32", "--no-timing")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 48)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    save_pt2(export_module(Small().eval(), [parse_input("x:float32[batch,seq,64]")], {}), folder / "m.pt2")
    return folder


def _interruptible() -> None:
    """A shell has what it starts in the background, perhaps this test run, ignore interrupts; children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(folder: Path, *args: str, **how: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "REWRITER_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": _interruptible, **how}
    return subprocess.Popen([REWRITE, *args], cwd=folder, env=environment, text=True, **given)  # type: ignore[call-overload, no-any-return]


def rewrite(folder: Path, *args: str) -> tuple[int, str, str]:
    process = started(folder, *args)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_the_main_job(home: Path) -> None:
    code, out, err = rewrite(home, "m.pt2", *LOSSY, "-o", "o.onnx", "--report", "r.json")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "o.onnx: 2 of 2 sites rewritten, reloaded and checked"
    content = json.loads((home / "r.json").read_text())
    validate(content)
    assert content["matched"] == {"sites": 2, "rewritten": 2} and content["target"] == "onnxruntime"
    code, out, err = rewrite(home, "verify", "o.onnx", "o.onnx", "--samples", "16", "--quiet")
    assert (code, out, err) == (0, "relative error at most 0 at 95% confidence\n", "")
    code, out, err = rewrite(home, "replay", "r.json", "-o", "again.onnx", "--quiet")
    assert (code, err) == (0, "") and out == "again.onnx: 2 of 2 sites rewritten, reloaded and checked\n"


@pytest.mark.parametrize(
    ("args", "code", "where", "said"),
    [
        (("m.pt2", "--passes", "auto", "--no-timing", "-o", "n.pt2"), 1, "out", "nothing was rewritten: 2 sites were kept"),
        (("none.pt2",), 2, "err", "rewrite: none.pt2: there is no such file or folder; give"),
        (("m.pt2", *LOSSY, "--max-error", "inf"), 2, "err", "rewrite: --max-error inf is out of range"),
        (("m.pt2", *LOSSY, "--seed", "-1"), 2, "err", "rewrite: --seed -1 is out of range"),
        (("m.pt2", *LOSSY, "--metric", "os:getcwd", "-o", "n.pt2"), 2, "err", "rewrite: --metric os:getcwd failed (TypeError"),
        (("verify", "m.pt2", "o.pt2", "--max-error", "1e-6", "--samples", "16", "--quiet"), 3, "out", "above --max-error 1e-06"),
    ],
)
def test_exit_codes_and_their_line(home: Path, args: tuple[str, ...], code: int, where: str, said: str) -> None:
    if not (home / "o.pt2").exists():
        assert rewrite(home, "m.pt2", *LOSSY, "-o", "o.pt2")[0] == 0
    found, out, err = rewrite(home, *args)
    text = out if where == "out" else err
    assert found == code and said in text.splitlines()[-1]
    assert err.count("\n") == (where == "err") and "Traceback" not in err
    assert not (home / "n.pt2").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_litter(home: Path, number: signal.Signals, tmp_path: Path) -> None:
    """Stopped while it writes: as soon as something lies in its scratch folder."""
    process = started(home, "m.pt2", *LOSSY, "-o", str(tmp_path / "o.pt2"))
    deadline = time.monotonic() + 120
    while process.poll() is None and not any(tmp_path.glob(".rewrite-*/*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (128 + number, -number), err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_changes_no_exit_code(home: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = started(home, "m.pt2", *LOSSY, "-o", "piped.pt2", stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "")
    assert (home / "piped.pt2").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written_is_said_with_what_happened(home: Path) -> None:
    with open("/dev/full", "w") as full:
        process = started(home, "m.pt2", *LOSSY, "-o", "full.pt2", stdout=full.fileno())
        _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.startswith("rewrite: standard output cannot be written") and "full.pt2: 2 of 2 sites rewritten" in err
    assert err.count("\n") == 1
