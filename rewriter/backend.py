"""What the pipeline asks of a target: emit a graph, open what was emitted, measure forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rewriter.graph import Graph, Site
from rewriter.operator import AbstractOperator


@dataclass(frozen=True)
class EmitOptions:
    """How a model is written."""

    opset: int = 20  # 18 to 25
    flatten: bool = False  # inline the functions, for runtimes without them
    tokens: tuple[int, ...] = (1, 256)  # token counts that lowerings are chosen for
    threads: int = 1
    provenance: Mapping[str, str] = field(default_factory=dict)  # stored in the emitted model


class Runner(Protocol):
    """An emitted model, reloaded from its file."""

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Layer:
    """What a rewrite exchanges in a model, on one batch: a linear layer, attention, or another map, with what goes with it."""

    key: str  # the same where the time is the same
    tokens: int  # that it runs on
    what: Any = field(compare=False, repr=False)  # how its target runs it alone


@dataclass(frozen=True)
class Whole:
    """A model on one batch, to be timed beside its layers."""

    key: str  # of the model and the batch
    call: Callable[[], object]


class Target(Protocol):
    """A place that models are emitted for."""

    name: str  # "onnxruntime" | "onnx" | "torch"
    timed_as: str  # what else times depend on: the name, and how it is run
    suffix: str  # ".onnx" | ".pt2"
    accepts: tuple[str, ...]  # graph formats it can emit: "torch", "onnx"

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which the target's file holds weights of this type."""
        ...

    def emit(self, graph: Graph, path: Path, options: EmitOptions) -> list[str]:
        """Write the model to `path` atomically; checked, dynamic dimensions still dynamic, input and output names and order preserved.

        Gives back what is to be said of how it was written, for the report's notes.
        """
        ...

    def open(self, path: Path, threads: int) -> Runner:
        """Reload an emitted file as a user would."""
        ...

    def open_int8(self, path: Path, threads: int) -> Runner:
        """The dynamic int8 form of the dense model in `path`: the baseline that a user already has. RewriteError where it cannot be had."""
        ...

    def measure(self, forms: Sequence[AbstractOperator], tokens: int, threads: int) -> list[float]:
        """Seconds per call of each form, matrices on `tokens` rows, maps on one sequence of `tokens`: interleaved in one process, medians,
        weights cold for few tokens; cached by hardware and versions."""
        ...

    def layers(self, graph: Graph, sites: Sequence[Site], feeds: Mapping[str, Tensor]) -> Counter[Layer]:
        """How often each layer is run on the batch: those at the sites and those that were rewritten."""
        ...

    def measure_layers(self, layers: Sequence[Layer], whole: Whole, threads: int) -> list[float]:
        """Seconds of each layer alone, as `measure` takes them, then those of a whole model in the same rounds."""
        ...
