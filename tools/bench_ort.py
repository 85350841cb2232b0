"""ONNX Runtime on the CPU, one thread: structured forms over the dense MatMul of the same shape, in one process, interleaved.

    python tools/bench_ort.py

Before anything is printed every form is compared with the eager oracle. A figure is the
median of the repeats, each of which is a fresh paired measurement; the range in brackets is their least and largest.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table

from rewriter.algebra import Dense
from rewriter.backends.eager import EagerOps
from rewriter.backends.onnx import measure
from rewriter.backends.onnx.emit import attach
from rewriter.backends.onnx.ops import LOWERINGS
from rewriter.backends.onnx.run import Session
from rewriter.operator import AbstractMatrix, flatten
from rewriter.passes.structures.block_dense import BlockDense
from rewriter.passes.structures.low_rank import LowRank
from rewriter.passes.structures.monarch import Monarch
from rewriter.passes.structures.pivoted_low_rank import PivotedLowRank
from rewriter.tolerances import EQUAL

SHAPES = ((768, 3072), (3072, 768), (768, 768))
TOKENS = (1, 8, 64, 256)
TARGETS = {("low-rank", 1): 2.0, ("block-dense", 1): 2.0, ("low-rank", 64): 2.5, ("block-dense", 64): 2.5, ("monarch", 64): 1.8}
FACTOR = 4  # by which parameters shrink
REPEATS = 5


def forms(n: int, m: int) -> dict[str, AbstractMatrix]:
    """One member of each family at 1/FACTOR of the dense numbers."""
    budget = n * m // FACTOR
    rank = budget // (n + m)
    k = 4
    wide = budget // (n // k + m) // k
    grid = 8
    thin = max(1, budget // (grid * (n + m)))
    pivot = next(r for r in range(min(m, n) - 1, 0, -1) if r * (m + n - r) <= budget)
    return {
        "low-rank": LowRank(torch.randn(n, rank), torch.randn(rank, m)),
        "pivoted-low-rank": PivotedLowRank(torch.randn(n, pivot), torch.randn(pivot, m - pivot), (m - pivot) // 2),
        "block-dense": BlockDense(torch.randn(k, n // k, wide), torch.randn(k * wide, m), n),
        "monarch": Monarch(torch.randn(grid, n // grid, thin * grid), torch.randn(grid, grid * thin, m // grid), n, m),
    }


def check(form: AbstractMatrix) -> None:
    """SystemExit unless every lowering of the form equals the eager oracle."""
    x = torch.randn(5, form.shape[1])
    expected = form.product(EagerOps(), x)
    rtol, atol = EQUAL[torch.float32]
    with tempfile.TemporaryDirectory() as folder:
        for lowering in LOWERINGS:
            path = Path(folder) / "form.onnx"
            model = measure.stacked([form], 2)
            attach(model, lambda _spec, _rank, lowering=lowering: lowering)
            ir.save(model, path)
            (got,) = Session(str(path), 1)({"x": x}).values()
            if not torch.allclose(got, expected, rtol, atol * float(expected.abs().max())):
                raise SystemExit(f"red: {type(form).__name__} lowered by {lowering} differs from eager; no figure is printed")


def main() -> None:
    torch.manual_seed(0)
    console = Console(width=120)
    table = Table(title=f"speed-up over ORT's dense MatMul, 1 thread, params / {FACTOR}")
    for head in ("inputs x outputs", "form", "params", *(f"T={t}" for t in TOKENS), "targets"):
        table.add_column(head)
    for n, m in SHAPES:
        built = forms(n, m)
        for form in built.values():
            check(form)
        dense = Dense(torch.randn(n, m))
        for name, form in built.items():
            cells, verdicts = [], []
            for tokens in TOKENS:
                ratios = sorted(ratio(dense, form, tokens) for _ in range(REPEATS))
                middle = statistics.median(ratios)
                cells.append(f"{middle:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")
                if (n, m) == SHAPES[0] and (name, tokens) in TARGETS:
                    target = TARGETS[name, tokens]
                    verdicts.append(f"T={tokens} >= {target}: {'met' if middle >= target else 'MISSED'}")
            table.add_row(f"{n}x{m}", name, f"{form.cost().params / (n * m):.0%}", *cells, "\n".join(verdicts))
    console.print(table)


def ratio(dense: AbstractMatrix, form: AbstractMatrix, tokens: int) -> float:
    """dense seconds / seconds of the form's best lowering, all interleaved."""
    lowerings = [""] if not any(word in flatten(form)[1] for word in ("BlockDense", "Monarch")) else list(LOWERINGS)
    bodies = [(flatten(dense)[1], LOWERINGS[0]), *((flatten(form)[1], lowering or LOWERINGS[0]) for lowering in lowerings)]
    seconds = measure.time_bodies(bodies, 2, tokens, 1)
    return seconds[0] / min(seconds[1:])


if __name__ == "__main__":
    main()
