"""A verified model takes its final name: one rename, or, with a data file beside it, a save that puts the data first and the model last."""

from __future__ import annotations

import glob
import shutil
from pathlib import Path

from rewriter.backends.files import atomic


def publish(emitted: Path, out: Path) -> None:
    """Put the file at `emitted` where `out` says; a crash leaves the old file, or the new one, whole."""
    if any(p != emitted for p in emitted.parent.glob(f"{glob.escape(emitted.name)}*")):
        from rewriter.backends.files.onnx_file import load_onnx, save_onnx

        save_onnx(load_onnx(emitted), out, external_above=0)
        return
    stale = _stale(out)
    with atomic.scratch_beside(out) as scratch:
        held = scratch / out.name
        shutil.copyfile(emitted, held)
        atomic.publish(held, out)
    for path in stale:
        path.unlink(missing_ok=True)


def _stale(out: Path) -> list[Path]:
    """The data files of an older model at `out`, which nothing reads once it is replaced."""
    if not any(out.parent.glob(f"{glob.escape(out.name)}*.data")):  # spares parsing whatever else `out` is
        return []
    from rewriter.backends.files.onnx_file import stale_data

    return [out.parent / name for name in stale_data(out)]
