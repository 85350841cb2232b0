"""Residual blocks, and what two passes in a row make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rewriter.calibrate import Samples
from rewriter.graph import Graph
from rewriter.registry import parse_passes
from rewriter.rule import AbstractPass, Context, Decision
from rewriter.tolerances import EQUAL
from rewriter.verify import certify
from tests.engine.nets import as_onnx, context, decaying, graph, linear, normal, planted, samples, sites

WIDTH = 20
TAPE = f"x:float32[batch,seq,{WIDTH}]"


class Blocks(nn.Module):
    """x + b(tanh(a(x))), three times; `bias` of the second linears."""

    def __init__(self, bias: bool = True, exact: bool = False) -> None:
        super().__init__()
        first = [planted(28, WIDTH, 2, i) if exact and i == 0 else decaying(28, WIDTH, i, 0.4) for i in range(3)]
        self.a = nn.ModuleList(linear(w, normal(28, seed=i)) for i, w in enumerate(first))
        self.b = nn.ModuleList(linear(decaying(WIDTH, 28, i + 9, 0.4), normal(WIDTH, seed=i) if bias else None) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(torch.tanh(a(x)))
        return x


def data(seed: int = 0) -> Samples:
    return samples(*[{"x": normal(8, 4, WIDTH, seed=100 * seed + i)} for i in range(16)])


def close(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> None:
    rtol, atol = EQUAL[dtype]
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def made(module: nn.Module, onnx: bool = False) -> Graph:
    g = graph(module, TAPE)
    return as_onnx(g) if onnx else g


def after_one(g: Graph, c: Context, spelled: str = "low-rank:params=0.5") -> dict[str, Decision]:
    """Run a pass, and tell the context what it did."""
    (step,) = parse_passes(spelled)
    found = {d.site.id: d for d in step.run(g, c)}
    c.decisions.update(found)
    return found


def after_two(
    folder: Path,
    module: nn.Module,
    second: AbstractPass | str,
    first: str = "low-rank:params=0.5",
    names: Sequence[str] = (),
    onnx: bool = False,
) -> tuple[Graph, dict[str, Decision], dict[str, Decision]]:
    """(graph, decisions of the first pass, of the second)."""
    g = made(module, onnx)
    c = context(g, folder, data=data())
    c.selected = [s for s in c.selected if not names or s.name in names]
    before = after_one(g, c, first)
    step = parse_passes(second)[0] if isinstance(second, str) else second
    step.requires(g)
    after = {d.site.id: d for d in step.run(g, c)}
    assert list(after) == [s.id for s in c.selected]
    return g, before, after


def error(g: Graph, module: nn.Module) -> float:
    """Of the outputs, on samples that no pass saw."""
    return certify(made(module, g.format == "onnx").run, g.run, data(1)).estimate


def spliced(module: nn.Module, decisions: Mapping[str, Decision], onnx: bool = False) -> Graph:
    """The dense model with these done to it."""
    g = made(module, onnx)
    for site in sites(g):
        d = decisions.get(site.id)
        if d is not None and d.operator is not None:
            g.splice(site, d.operator, d.shift)
    return g
