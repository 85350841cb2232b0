"""timm without torchvision, which has no CPU build beside the torch that is tested here.

timm's models use none of torchvision: its data pipeline and two helpers import names from it. While timm is imported those names are empty
classes; afterwards no trace of them is left for anyone who asks whether torchvision is there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Word(type):
    """A class whose attributes are their own names, as an enumeration's would be told apart."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(ModuleType):
    """Any public name is a class of its own."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Word(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stubbed() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.append(finder)  # last: a real torchvision comes first
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, m in sys.modules.items() if isinstance(m, _Empty)]:
            del sys.modules[name]


def timm() -> Any:
    """The package, its models importable."""
    with _stubbed():
        return importlib.import_module("timm")
