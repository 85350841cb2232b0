"""Finds structures, passes, detectors, readers and targets by walking the rooms and by entry points; nothing is registered by hand.

A third-party package adds a structure or a pass as one file named by an entry point in the group `rewriter.plugins`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Any


def _import_folder(package: str) -> list[Any]:
    root = importlib.import_module(package)
    return [importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(root.__path__) if not m.name.startswith("_")]


@functools.cache
def load_structures() -> None:
    """Import every structure: the core's atoms, passes/structures/, and installed plug-ins."""
    importlib.import_module("rewriter.algebra")
    _import_folder("rewriter.passes.structures")
    load_plugins()


@functools.cache
def load_plugins() -> None:
    """Import what installed packages name under `rewriter.plugins`."""
    for entry in entry_points(group="rewriter.plugins"):
        entry.load()


def eager_ops() -> Any:
    """The oracle interpretation."""
    return importlib.import_module("rewriter.backends.eager").EagerOps()
