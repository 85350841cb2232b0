"""A file is either the old one or the new one: write beside the target under a temporary name, flush, rename."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rewriter.errors import RewriteError

_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A fresh folder on the same disk as `path`, so that a rename out of it is atomic; gone afterwards, whatever happens."""
    folder = path.parent
    if not folder.is_dir():
        raise RewriteError(f"{path}: the folder {folder} does not exist; create it or choose another output")
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=folder))
    except OSError as problem:
        raise RewriteError(f"{path}: cannot write in {folder} ({problem.strerror}); choose another output") from problem
    try:
        yield scratch
    except OSError as problem:
        text = problem.strerror or problem
        raise RewriteError(f"{path}: writing failed ({text}); nothing was replaced, free some space and try again") from problem
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def reserve(folder: Path, nbytes: int, files: int = 1) -> None:
    """OSError unless `files` more files of `nbytes` fit into `folder`: a writer in C++ that runs out of space may end the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    held = [folder / f"reserved-{i}" for i in range(files)]
    try:
        for path in held:
            with path.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))
    except OSError as problem:
        if problem.errno in _NO_SPACE:
            raise  # any other says that this disk cannot reserve, not that it is full
    finally:
        for path in held:
            path.unlink(missing_ok=True)


def publish(source: Path, target: Path) -> None:
    """Flush `source` to the disk, then let it take the name `target` in one step."""
    with source.open("rb+") as file:
        os.fsync(file.fileno())
    os.chmod(source, 0o666 & ~_umask())
    os.replace(source, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
