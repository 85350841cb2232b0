"""Loops as torch exports them (scan, hence ONNX Scan) against the same files after raise-recurrence or diagonalize, under ONNX Runtime.

The first row is the standard's own operator, which ONNX Runtime has no kernel for: it expands the node into a Scan. Each row is one
model: exported, rewritten, reloaded, compared with the source at four lengths (a difference ends the bench), then both files timed in
turn in one process; the ratio is the median of paired ratios, its spread the 10th and 90th percentile.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx import helper
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._higher_order_ops import scan

from rewriter import rewrite

HEADS, WIDTH = 4, 64


class Scanned(nn.Module):
    """A step over sequences (batch, time, ...), from the zero state; with `unit` the second sequence is brought to unit length first."""

    def __init__(
        self, step: Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]], state: tuple[int, ...], unit: bool = False
    ) -> None:
        super().__init__()
        self.step, self.state, self.unit = step, state, unit

    def forward(self, *given: Tensor) -> Tensor:
        inputs = [nn.functional.normalize(x, dim=-1) if self.unit and i == 1 else x for i, x in enumerate(given)]

        def body(state: Tensor, row: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            new, y = self.step(state, row)
            return new.clone(), y.clone()

        _, y = scan(body, inputs[0].new_zeros(inputs[0].shape[0], *self.state), [x.transpose(0, 1) for x in inputs])
        return y.transpose(0, 1)


def write(state: Tensor, k: Tensor, v: Tensor, beta: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    error = (v - (k.unsqueeze(-2) @ state).squeeze(-2)) * beta.unsqueeze(-1)
    state = state + k.unsqueeze(-1) @ error.unsqueeze(-2)
    return state, (q.unsqueeze(-2) @ state).squeeze(-2)


def delta(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, beta = x
    return write(state, k, v, torch.sigmoid(beta), q)


def product(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, beta = x
    beta = 2 * torch.sigmoid(beta)
    for j in range(2):
        state, y = write(state, k[:, j], v[:, j], beta[:, j], q)
    return state, y


def gated(state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    state = torch.sigmoid(x[0]) * state + x[1]
    return state, state


class Linear(nn.Module):
    """h' = h A + u b, y = h' c: 64 states, one input, one output."""

    def __init__(self, states: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(states, states, generator=generator)
        self.a = nn.Parameter(0.95 * a / torch.linalg.eigvals(a).abs().max())
        self.b = nn.Parameter(torch.randn(1, states, generator=generator) / states**0.5)
        self.c = nn.Parameter(torch.randn(states, 1, generator=generator) / states**0.5)

    def forward(self, state: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        state = state @ self.a + x[0] @ self.b
        return state, state @ self.c


def operator() -> ir.Model:
    """The delta rule as one node of ai.onnx, since opset 27."""
    names, widths = ("given_0", "given_1", "given_2", "", "", "given_3"), (*[HEADS * WIDTH] * 3, HEADS)
    options = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "update_rule": "delta", "scale": 1.0}

    def value(name: str, width: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", "time", width])

    node = helper.make_node("LinearAttention", names, ["y", "last"], **options)
    inputs = [value(f"given_{i}", width) for i, width in enumerate(widths)]
    graph = helper.make_graph([node], "operator", inputs, [value("y", HEADS * WIDTH)])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)], ir_version=11))


@dataclass(frozen=True)
class Row:
    name: str
    model: nn.Module | ir.Model
    shapes: tuple[tuple[int, ...], ...]  # of the sequences at one step
    passes: str
    tokens: int
    target: str  # of the issue; "" without one


_H = (HEADS, WIDTH)
_FLAT = (*[(HEADS * WIDTH,)] * 3, (HEADS,))
ROWS = (
    Row("ai.onnx LinearAttention, delta", operator(), _FLAT, "raise-recurrence", 256, "20x"),
    Row("delta rule, 4 heads of 64", Scanned(delta, (*_H, WIDTH), True), (_H, _H, _H, (HEADS,)), "raise-recurrence", 256, "20x"),
    Row("2 Householder factors", Scanned(product, (*_H, WIDTH), True), (_H, (2, *_H), (2, *_H), (2, HEADS)), "raise-recurrence", 256, ""),
    Row("time-invariant, 64 states", Scanned(Linear(), (64,)), ((1,),), "raise-recurrence", 1024, "5x"),
    Row("the same, diagonal", Scanned(Linear(), (64,)), ((1,),), "diagonalize", 1024, "5x"),
    Row("input-gated diagonal, 1,024", Scanned(gated, (1024,)), ((1024,), (1024,)), "raise-recurrence", 512, ""),
)


def main() -> None:
    warnings.simplefilter("ignore")
    table = Table(title="ONNX Runtime, CPU, 1 thread: the exported Scan against the rewritten file")
    for column in ("recurrence", "pass", "steps", "Scan ms", "rewritten ms", "ratio (spread)", "target", "as", "relative error"):
        table.add_column(column)
    for row in ROWS:
        inputs = [f"given_{i}:float32[{','.join(['batch', 'time', *map(str, s)])}]" for i, s in enumerate(row.shapes)]
        torch.manual_seed(0)
        samples = {f"given_{i}": torch.randn(4, row.tokens, *shape) for i, shape in enumerate(row.shapes)}
        with tempfile.TemporaryDirectory() as folder:
            out, specs = str(Path(folder) / "m.onnx"), inputs
            if isinstance(row.model, ir.Model):
                samples, specs = {name: x / WIDTH**0.5 for name, x in samples.items()}, None  # keys of about unit length
            result = rewrite(row.model, row.passes, specs, "onnxruntime", samples, out=out, tokens=str(row.tokens), force=True)
        found = [s for s in result.report.sites if s.kind == "recurrence"]
        error = result.report.output_error
        if result.exit_code or [s.status for s in found] != ["rewritten"] or error is None:
            sys.exit(f"{row.name}: {result.message}; {[s.reason for s in found]}")
        (timing,) = result.report.latency
        if timing.dense_seconds is None or timing.rewritten_seconds is None or timing.ratio_spread is None:
            sys.exit(f"{row.name}: not measured: {timing.note}")
        low, high = timing.ratio_spread
        before, after = (f"{1e3 * seconds:.2f}" for seconds in (timing.dense_seconds, timing.rewritten_seconds))
        figures = (before, after, f"{timing.ratio:.1f}x ({low:.1f}-{high:.1f})")
        name = str(found[0].structure).rpartition(", ")[2]
        table.add_row(row.name, row.passes, f"{row.tokens:,}", *figures, row.target, name, f"{error.estimate:.1e}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
