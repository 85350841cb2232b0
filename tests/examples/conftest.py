"""The examples, imported as a user imports them; afterwards the registries are as they were, so that no other test meets them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewriter import registry
from rewriter.operator import AbstractOperator
from rewriter.rule import AbstractPass
from rewriter.structure import AbstractStructure

EXAMPLES = Path(__file__).parents[2] / "examples"
BASES: tuple[Any, ...] = (AbstractOperator, AbstractStructure, AbstractPass)


def imported(name: str) -> Iterator[Any]:
    registry.passes()
    with pytest.MonkeyPatch.context() as patch:
        for base in BASES:
            patch.setattr(base, "kinds", dict(base.kinds))
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module(name)
    del sys.modules[name]


@pytest.fixture(scope="module")
def kronecker() -> Iterator[Any]:
    yield from imported("kronecker")


@pytest.fixture(scope="module")
def my_pass() -> Iterator[Any]:
    yield from imported("my_pass")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits and timings of an example are nobody else's."""
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "cache"))
