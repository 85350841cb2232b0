"""Where the kernels run: a CUDA device, or Triton's interpreter on a CPU, by which they are tested."""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import RewriteError

OPTIONS = {"enable_fp_fusion": True}  # of every launch: a b + c rounded once, whatever a release of Triton does unasked
INSTALL = "install rewriter[gpu], or triton beside the torch that is there"


def kernels(name: str) -> Any:
    """A module of kernels, which imports triton; RewriteError where that is missing."""
    if importlib.util.find_spec("triton") is None:
        raise RewriteError(f"kernels for a GPU need triton, which is not installed; {INSTALL}")
    return importlib.import_module(f"rewriter.backends.triton_kernels.{name}")


def interpreted() -> bool:
    """Whether the kernels were imported under TRITON_INTERPRET=1."""
    module = kernels("chain_kernels")
    return not isinstance(module.product, module.triton.JITFunction)


def ready(device: str) -> torch.device:
    """The device; RewriteError where no kernel can run on it."""
    try:
        place = torch.device(device)
    except RuntimeError:
        raise RewriteError(f"device {device!r} is unknown; give cpu, cuda or cuda:N") from None
    if place.type == "cpu" and interpreted():
        return place
    if place.type != "cuda":
        raise RewriteError(f"device {device!r} has no kernels; give cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise RewriteError(f"device {device!r}: torch {torch.__version__} sees no CUDA device; give cpu, or install a torch built for CUDA")
    if (place.index or 0) >= torch.cuda.device_count():
        raise RewriteError(f"device {device!r} is not there; the last is cuda:{torch.cuda.device_count() - 1}")
    kernels("chain_kernels")
    return place


def chosen(x: Tensor) -> AbstractContextManager[Any]:
    """The device of `x` as the one where kernels start; RewriteError where there are none for it."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if x.device.type == "cpu" and interpreted():
        return nullcontext()
    raise RewriteError(f"the input is on {x.device}, this kernel runs on CUDA devices; move the module and its inputs to one")


def said() -> str:
    """What `rewrite kernels` says of them, in a line."""
    if not torch.cuda.is_available():
        return "none that torch sees"
    name = torch.cuda.get_device_name()
    return name if importlib.util.find_spec("triton") else f"{name}, without triton: {INSTALL}"
