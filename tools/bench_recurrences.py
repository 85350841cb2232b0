"""transformers' own recurrences under ONNX Runtime: exported as they are, at one length, against raised to one node of any length.

The functions are the ones that Qwen3-Next and Mamba-2 call, at sizes that such models have; the raised file runs on stock operators and in
this package's kernels. All are timed in turn in one process; a ratio is the median of paired ratios to the file as it is, its spread the
10th and 90th percentile. Nothing is printed where results differ. Below, recurrences alone: every stock form against the kernel.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule

from rewriter import registry
from rewriter.backend import EmitOptions
from rewriter.backends.files.export import export_module
from rewriter.backends.files.quiet import muted
from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.kernels.recurrences import sizes_of
from rewriter.backends.kernels.session import open_covered, trusted
from rewriter.backends.onnx.measure import KERNEL, examples, time_bodies
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.sequence_ops import lowerings
from rewriter.inputs import parse_input
from rewriter.operator import AbstractRecurrence, flatten
from rewriter.passes.structures.diagonal_recurrence import DiagonalRecurrence
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.timing import interleave
from rewriter.tolerances import EQUAL

HEADS, WIDTH = 16, 128  # Qwen3-Next
SSM_HEADS, SSM_WIDTH, SSM_STATES, SSM_CHUNK = 24, 64, 128, 256  # Mamba-2, 130 million


class Prefill(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        out: Tensor = torch_chunk_gated_delta_rule(query, key, value, -g.exp(), beta.sigmoid(), use_qk_l2norm_in_kernel=True)[0]
        return out


class Decode(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        out, last = torch_recurrent_gated_delta_rule(
            query, key, value, -g.exp(), beta.sigmoid(), initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
        return out, last


class Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Parameter(-torch.rand(SSM_HEADS) - 0.5), nn.Parameter(torch.ones(SSM_HEADS))

    def forward(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        out = mamba2_chunk_scan(x, dt, self.a, b, c, SSM_CHUNK, D=self.d, dt_softplus=True)
        return out[0] if isinstance(out, tuple) else out


@dataclass(frozen=True)
class Row:
    name: str
    module: nn.Module
    shapes: dict[str, tuple[int, ...]]  # after batch and time; "state" has no time
    tokens: int
    target: str


_DELTA = {name: (HEADS, WIDTH) for name in ("query", "key", "value")} | {"g": (HEADS,), "beta": (HEADS,)}
ROWS = (
    Row("gated delta rule, prefill", Prefill(), _DELTA, 512, "8x"),
    Row("gated delta rule, decode", Decode(), _DELTA | {"state": (HEADS, WIDTH, WIDTH)}, 1, "4x"),
    Row("Mamba-2 scan, prefill", Scan(), {"x": (24, 64), "dt": (24,), "b": (1, 128), "c": (1, 128)}, 512, "8x"),
)


def inputs(row: Row) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lead = {name: (1,) if name == "state" else (1, row.tokens) for name in row.shapes}
    return {name: torch.randn(*lead[name], *shape, generator=generator) for name, shape in row.shapes.items()}


def as_it_is(row: Row, path: Path) -> None:
    """By torch alone, at the one length."""
    with torch.no_grad(), muted():
        program = torch.export.export(row.module.eval(), (), inputs(row))
        torch.onnx.export(program, f=path, dynamo=True, verbose=False)


def raised(row: Row, path: Path) -> str:
    """With dynamic batch and length; what the export says of it."""
    leads = {name: "batch" if name == "state" else "batch,time" for name in row.shapes}
    specs = [parse_input(f"{name}:float32[{leads[name]},{','.join(map(str, shape))}]") for name, shape in row.shapes.items()]
    notes: list[str] = []
    program = export_module(row.module, specs, {}, notes)
    registry.targets()["onnxruntime"]().emit(FxGraph.of(program), path, EmitOptions(tokens=(row.tokens,), threads=1))
    return "; ".join(notes)


ALONE: dict[str, AbstractRecurrence] = {
    "RG-LRU, 2,560 states": DiagonalRecurrence(2560),
    "Mamba scan, 768 channels of 16 states": DiagonalRecurrence(768, 16, read=True),
    "gated delta rule, 12 heads of 64 x 64": LinearAttention(12, 64, 64, 12, 12, decay="head"),
    "Mamba-2, 24 heads of 64 x 64": LinearAttention(24, 64, 64, 1, 1, rule="plain", decay="head"),
    "GLA, 8 heads of 128 x 128": LinearAttention(8, 128, 128, 8, 8, rule="plain", decay="key"),
    "product of 2 Householder factors, 12 heads of 64 x 64": LinearAttention(12, 64, 64, 12, 12, factors=2),
}
OPSET = 23


def check(name: str, operator: AbstractRecurrence, tokens: int = 9) -> None:
    """SystemExit where the kernel is off from one step after the other."""
    xs = [x / 8 for x in examples(operator, tokens).values()]
    wanted = operator.spelled("sequential", registry.eager_ops(), *xs)
    found = trusted().recur(sizes_of(operator), xs, [y.shape for y in wanted], 1)
    off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
    if off > EQUAL[torch.float32][0]:
        sys.exit(f"{name}: the kernel is off by {off:.2g}")


def alone() -> Table:
    """Milliseconds of each form; the ratio is the fastest stock one over the kernel."""
    table = Table(title="recurrences alone, 1 thread, milliseconds")
    for column in ("recurrence", "tokens", "stock forms", "kernel", "fastest stock / kernel"):
        table.add_column(column)
    for name, operator in ALONE.items():
        check(name, operator)
        spec = flatten(operator)[1]
        forms = lowerings(spec, True, OPSET)
        for tokens in (1, 64, 512):
            *stock, kernel = (1e3 * s for s in time_bodies([(spec, form) for form in (*forms, KERNEL)], 0, tokens, 1, opset=OPSET))
            said = ", ".join(f"{form} {ms:.3f}" for form, ms in zip(forms, stock, strict=True))
            table.add_row(name, str(tokens), said, f"{kernel:.3f}", f"{min(stock) / kernel:.1f}x")
    return table


def main() -> None:
    warnings.simplefilter("ignore")
    table = Table(title=f"ONNX Runtime, CPU, 1 thread; {HEADS} heads of {WIDTH}, {SSM_HEADS} heads of {SSM_WIDTH} with {SSM_STATES} states")
    for column in (
        "function",
        "tokens",
        "as it is ms",
        "raised ms",
        "ratio (spread)",
        "target",
        "kernels ms",
        "ratio (spread)",
        "largest error",
    ):
        table.add_column(column)
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder) / "before.onnx", Path(folder) / "after.onnx"
            as_it_is(row, before)
            said = raised(row, after)
            if "raised to one" not in said:
                sys.exit(f"{row.name} was not raised: {said}")
            slow, fast, kernels = Session(str(before), 1), Session(str(after), 1), open_covered(after, 1)
        feeds = inputs(row)
        expected = row.module(**feeds)
        expected = expected if isinstance(expected, tuple) else (expected,)
        results = [*fast(feeds).values(), *kernels(feeds).values()]
        errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, [*expected, *expected], strict=True)]
        if max(errors) > EQUAL[torch.float32][0]:
            sys.exit(f"{row.name}: the raised function is off by {max(errors):.2g}")
        timing = interleave([functools.partial(s.session.run, None, s.arrays(feeds)) for s in (slow, fast, kernels)], seconds=3)
        cells = [f"{1e3 * timing.seconds(0):.2f}"]
        for which, target in ((1, [row.target]), (2, [])):
            low, middle, high = timing.ratio(0, which)
            cells += [f"{1e3 * timing.seconds(which):.2f}", f"{middle:.1f}x ({low:.1f}-{high:.1f})", *target]
        table.add_row(row.name, str(row.tokens), *cells, f"{max(errors):.1e}")
    Console(width=140).print(table, alone())


if __name__ == "__main__":
    main()
