"""Tiny models, a target that measures by a rule, and contexts to run single passes in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewriter import registry
from rewriter.backend import Layer, Whole
from rewriter.backends.files.load import open_source
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.cache import FitCache
from rewriter.calibrate import Calibration, Samples
from rewriter.cost_model import by_form, measure_forms
from rewriter.graph import Graph, Site
from rewriter.operator import AbstractMatrix
from rewriter.options import Options
from rewriter.progress import Progress
from rewriter.rule import Context


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decaying(m: int, n: int, seed: int = 0, power: float = 2.0) -> Tensor:
    """An (m, n) weight of full rank whose singular values fall like i^-power."""
    u, _, v = torch.linalg.svd(normal(m, n, seed=seed, dtype=torch.float64), full_matrices=False)
    return (u * torch.arange(1, min(m, n) + 1, dtype=torch.float64) ** -power @ v).float()


def planted(m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    return normal(m, rank, seed=seed) @ normal(rank, n, seed=seed + 1) / rank**0.5


class Mlp(nn.Module):
    """x (batch, seq, 24) -> first -> relu -> second -> (batch, seq, 20)."""

    def __init__(self, first: Tensor | None = None, second: Tensor | None = None, bias: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32, bias), nn.Linear(32, 20, bias)
        self.first.weight = nn.Parameter(decaying(32, 24) if first is None else first)
        self.second.weight = nn.Parameter(decaying(20, 32, 1, 1.0) if second is None else second)
        if bias:
            self.first.bias, self.second.bias = nn.Parameter(normal(32, seed=2)), nn.Parameter(normal(20, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


MLP = "x:float32[batch,seq,24]"
WIDE = "x:float32[batch,seq,96]"


class WideMlp(nn.Module):
    """x (batch, seq, 96) -> first -> relu -> second; large enough that a factored file is smaller."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.first, self.second = linear(decaying(128, 96, power=power), normal(128, seed=2)), linear(decaying(64, 128, 1, power))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.second(torch.relu(self.first(x)))}


class Net(nn.Module):
    """forward(*inputs) = function(self, *inputs), with the first `arity` names of a, b, c."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) and part.is_floating_point() else part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made


def graph(module: nn.Module, *inputs: str) -> Graph:
    found: Graph = open_source(module.eval(), Options(inputs=inputs or (MLP,))).graph
    return found


def as_onnx(g: Graph) -> Graph:
    """The same model, read from ONNX."""
    return OnnxGraph(g.to_onnx(20))  # type: ignore[attr-defined]


def sites(g: Graph) -> list[Site]:
    return [s for s in registry.sites(g) if s.kind == "linear"]


def samples(*batches: Mapping[str, Tensor], key: str = "k") -> Samples:
    return Samples(list(batches), "data: test", key)


class FakeTarget:
    """Seconds by a rule; every comparison that was asked for is kept."""

    name = timed_as = "fake"
    suffix = ".fake"
    accepts = ("torch", "onnx")

    def __init__(self, seconds: Callable[[AbstractMatrix], float]) -> None:
        self.rule = seconds
        self.asked: list[list[str]] = []
        self.whole = 1.0  # seconds of a whole model

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def measure(self, forms: Sequence[AbstractMatrix], tokens: int, threads: int) -> list[float]:
        self.asked.append([type(f).__name__ for f in forms])
        return [self.rule(f) for f in forms]

    def layers(self, graph: Graph, sites: Sequence[Site], feeds: Mapping[str, Tensor]) -> Counter[Layer]:
        return by_form(graph, sites, feeds)

    def measure_layers(self, layers: Sequence[Layer], whole: Whole, threads: int) -> list[float]:
        *seconds, _ = measure_forms(self, layers, whole, threads)  # type: ignore[arg-type]
        return [*seconds, self.whole]


def context(g: Graph, folder: Path, target: Any = None, data: Samples | None = None, **changes: Any) -> Context:
    found = data if data is not None else samples({"x": normal(64, 5, 24, seed=9)})
    given: dict[str, Any] = {
        "target": target or FakeTarget(lambda form: float(form.cost().params)),
        "calibration": Calibration(g, found, Progress(True)),
        "tokens": (1, 256),
        "threads": 1,
        "objective": "params",
        "budget": None,
        "consent": False,
        "selected": sites(g),
        "fits": FitCache(folder),
        "progress": Progress(True),
    }
    return Context(**{**given, **changes})
