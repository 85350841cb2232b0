"""Tests run the kernels in Triton's interpreter, except those marked `gpu`.

Triton reads TRITON_INTERPRET where a function is decorated, so the modules of kernels are imported under it once, and stand in for the
compiled ones during each of these tests alone: other tests of the process see neither them nor the variable.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from rewriter.backends import triton_kernels

KERNELS = ("chain_kernels", "delta_kernels")


@functools.cache
def imported(interpret: bool) -> dict[str, ModuleType]:
    """Both modules of kernels, for the interpreter or as they are compiled; what was imported before comes back."""
    importlib.import_module("triton")  # itself never as the interpreter has it
    names = {name: f"{triton_kernels.__name__}.{name}" for name in KERNELS}
    with pytest.MonkeyPatch.context() as patch:
        if interpret:
            patch.setenv("TRITON_INTERPRET", "1")
        for full in names.values():
            patch.delitem(sys.modules, full, raising=False)
        return {full: importlib.import_module(full) for full in names.values()}


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    interpret = request.node.get_closest_marker("gpu") is None
    for full, module in imported(interpret).items():
        monkeypatch.setitem(sys.modules, full, module)
    if interpret:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # so that what torch allocates is NaN
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy, which warns where numbers overflow as on a device
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def compiled(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The modules as a device runs them."""
    monkeypatch.delenv("TRITON_INTERPRET")
    modules = imported(False)
    for full, module in modules.items():
        monkeypatch.setitem(sys.modules, full, module)
    return {full.rsplit(".", 1)[1]: module for full, module in modules.items()}
