"""A write that cannot be finished says so in one line and leaves what was there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewriter.backends.files import atomic
from rewriter.errors import RewriteError


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    target = tmp_path / "none" / "model.pt2"
    with pytest.raises(RewriteError, match="does not exist; create it") as caught, atomic.scratch_beside(target):
        pytest.fail("no scratch folder can be beside it")
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**kwargs: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", refuse)
    with (
        pytest.raises(RewriteError, match=r"cannot write in .*\(Read-only file system\); choose another"),
        atomic.scratch_beside(tmp_path / "x"),
    ):
        pytest.fail("there is no scratch folder")


def test_the_scratch_folder_goes_whatever_happens(tmp_path: Path) -> None:
    def fill(target: Path) -> None:
        with atomic.scratch_beside(target) as scratch:
            (scratch / "half").write_bytes(b"1")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RewriteError, match=r"writing failed \(No space.*free some space"):
        fill(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_published_file_has_the_mode_of_a_new_one(mask: int, mode: int, tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").chmod(0o400 | 0o200 | 0o111)
    before = os.umask(mask)
    try:
        atomic.publish(tmp_path / "new", tmp_path / "old")
        assert os.umask(mask) == mask  # asking for it left it as it was
    finally:
        os.umask(before)
    assert (tmp_path / "old").stat().st_mode & 0o777 == mode


def test_room_is_reserved_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda handle, offset, nbytes: asked.append(nbytes))
    atomic.reserve(tmp_path, 1000, files=2)
    assert asked == [1000, 1000]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_no_room_is_an_error_and_leaves_nothing(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, offset: int, nbytes: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=os.strerror(code)):
        atomic.reserve(tmp_path, 1000)
    assert list(tmp_path.iterdir()) == []


def test_disks_that_cannot_reserve_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    atomic.reserve(tmp_path, 1000)
    monkeypatch.delattr(os, "posix_fallocate")
    atomic.reserve(tmp_path, 1000)
    assert list(tmp_path.iterdir()) == []


_SAVE = """
import resource, sys
from pathlib import Path
import torch
from rewriter.backends.files.pt2 import save_pt2
from rewriter.errors import RewriteError
program = torch.export.export(torch.nn.Linear(1500, 1500), (torch.ones(1, 1500),))
resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
try:
    save_pt2(program, Path(sys.argv[1]))
except RewriteError as problem:
    print(problem)
"""


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve")
def test_a_file_size_limit_does_not_end_the_process(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _SAVE, str(tmp_path / "m.pt2")], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("\n") == 1 and "writing failed (File too large)" in done.stdout and "free some space" in done.stdout
    assert list(tmp_path.iterdir()) == []
