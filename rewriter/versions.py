"""Which versions a result depends on, read from installed packages' metadata, so that nothing heavy is imported to say so."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

TESTED = {"torch": "2.13", "onnxruntime": "1.32"}  # what the test suite runs with
_RECORDED = ("torch", "onnxruntime", "onnx", "onnx-ir", "onnxscript", "transformers")


@functools.cache
def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """What a report records: this package, Python, and the installed packages that read, run and write models."""
    found = {name: text for name in _RECORDED if (text := _installed(name)) is not None}
    return {"rewriter": _installed("rewriter") or "unknown", "python": platform.python_version(), **found}


def untested() -> list[str]:
    """One line for each installed package whose version is not the tested one."""
    found = [(name, _installed(name), tested) for name, tested in TESTED.items()]
    return [
        f"{name} {have} is installed; tested with {name} {tested}, other versions may behave differently"
        for name, have, tested in found
        if have is not None and ".".join(have.split(".")[:2]) != tested
    ]


_said: set[str] = set()


def warn_untested() -> list[str]:
    """`untested`, each line once per process."""
    fresh = [line for line in untested() if line not in _said]
    _said.update(fresh)
    return fresh
