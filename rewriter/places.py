"""Where a run's files lie: OUT, the cache, and how an emitted model takes its final name."""

from __future__ import annotations

import glob
import importlib
from pathlib import Path
from typing import Any

from rewriter.cache import default_folder
from rewriter.errors import RewriteError
from rewriter.options import Options


def out_path(model: Any, options: Options) -> Path:
    """Where the model goes, checked before the work begins."""
    if options.out:
        path = Path(options.out)
    elif isinstance(model, str | Path):
        given = Path(model)
        torch_like = options.target == "torch" or (options.target is None and given.suffix != ".onnx")
        path = given.with_name(f"{given.stem if given.is_file() else given.name}.rewritten{'.pt2' if torch_like else '.onnx'}")
    else:
        raise RewriteError("a model in memory has no name to write next to; give out=, or use result.save(path)")
    if path.exists() and not options.force:
        raise RewriteError(f"{path} exists; give --force to replace it, or another -o OUT")
    if not path.parent.is_dir():
        raise RewriteError(f"the folder {path.parent} does not exist; make it, or give another -o OUT")
    return path


def check_suffix(path: Path, suffix: str) -> None:
    """A file whose name says another format would mislead whoever opens it."""
    if path.suffix in (".onnx", ".pt2") and path.suffix != suffix:
        raise RewriteError(f"{path} would hold an {suffix} model; give a name that ends in {suffix}, or another --target")


def cache_folder(options: Options) -> Path:
    """--cache, else the user's; RewriteError where a file has that name."""
    folder = Path(options.cache) if options.cache else default_folder()
    if folder.exists() and not folder.is_dir():
        raise RewriteError(f"--cache {folder} is a file; give a folder, which is made where there is none")
    return folder


def size(path: Path) -> int:
    """Bytes of a model file and of the data files that lie beside it under its name."""
    return sum(p.stat().st_size for p in path.parent.glob(f"{glob.escape(path.name)}*") if p.is_file())


def publish(emitted: Path, out: Path, force: bool) -> Path:
    """Move a model and its data files into place: data first, under names of their own, the model last."""
    if out.exists() and not force:
        raise RewriteError(f"{out} exists; give --force to replace it")
    publisher = importlib.import_module("rewriter.backends.files.publish")
    publisher.publish(emitted, out)
    return out
