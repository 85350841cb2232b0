"""Layers on the CPU: kernels and stock forms over ONNX Runtime's dense float32 and its dense int8, interleaved in one process.

    python tools/bench_speed.py [--shapes 768x3072 4096x4096] [--tokens 1 64] [--factors 4] [--threads 1 2]

Of each family a member that stores 1/F of the numbers, F from 2 to 16; N:M sparse ones beside, without a target. Rows: stock operators and
kernels, each in float32 and in int8, and in 4 bits (stock: MatMulNBits) for decoding.
A cell is "times as fast as dense float32 / as dense int8"; weights are cold up to 8 tokens. Before a table is printed, kernels and the
stock forms in float32 are compared with their plain form; where one is off, the program ends (stock int8 rounds inputs by tensor and is
held to the same rounding in the tests). Targets stand below each table with what was reached.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table

from rewriter.algebra import Dense, Sparse
from rewriter.backends.kernels import naive
from rewriter.backends.kernels.library import Kernels
from rewriter.backends.kernels.pack import FORMATS, pack
from rewriter.backends.kernels.plan import plan
from rewriter.backends.kernels.session import session_of, trusted
from rewriter.backends.onnx.emit import attach
from rewriter.backends.onnx.int8 import open_int8
from rewriter.backends.onnx.measure import FEW_TOKENS, KERNEL, body_call, copies_of, stacked
from rewriter.backends.onnx.nibbles import NBITS
from rewriter.backends.onnx.ops import LOWERINGS
from rewriter.backends.onnx.run import CPU, Session
from rewriter.operator import AbstractMatrix, flatten
from rewriter.passes.structures.block_dense import BlockDense
from rewriter.passes.structures.low_rank import LowRank
from rewriter.passes.structures.monarch import Monarch
from rewriter.quantised import quantised
from rewriter.timing import Timing, interleave
from rewriter.tolerances import EQUAL

SHAPES = ("768x768", "768x3072", "3072x768", "1024x4096", "4096x4096")
TOKENS = (1, 8, 64, 256, 1024)
FACTORS = (2, 4, 8, 16)
TARGETED = ("low-rank", "block-dense", "monarch")
SHARED = 64  # columns with the same rows: a panel of the kernel
SECONDS = 0.25  # of each form in each cell
LARGE = 8_000_000  # bytes of a dense weight that no cache holds
DENSE, INT8 = "dense float32", "dense int8"


class Cell(NamedTuple):
    """One form at one token count: over dense float32, over dense int8, and the share of the arithmetic's peak."""

    ratio: float
    int8_ratio: float
    peak: float


@dataclass(frozen=True)
class Row:
    """A form under test; `copies` of its weights in one session."""

    family: str
    how: str  # "stock", "stock int8", "kernel", "kernel int8"
    form: AbstractMatrix
    call: Callable[[], object]
    copies: int


def families(n: int, m: int, factor: int) -> dict[str, AbstractMatrix]:
    """Members at 1/factor of the numbers: low rank, column blocks, a grid."""
    numbers = n * m // factor
    k, grid = 4, 8
    rank, wide, thin = (max(1, numbers // d) for d in (n + m, k * (n // k + m), grid * (n + m)))
    return {
        "low-rank": LowRank(_normal(n, rank), _normal(rank, m)),
        "block-dense": BlockDense(_normal(k, n // k, wide), _normal(k * wide, m), n),
        "monarch": Monarch(_normal(grid, n // grid, thin * grid), _normal(grid, grid * thin, m // grid), n, m),
    }


def sparse(n: int, m: int, factor: int) -> dict[str, AbstractMatrix]:
    """The same share of the numbers by a pattern for each column, or for 64 columns at a time."""
    kept, group = (2, 4) if factor == 2 else (1, factor)
    return {
        f"{kept}:{group}": Sparse.of(_normal(n, m), kept, group),
        f"{kept}:{group} shared": Sparse.of(_normal(n, m), kept, group, SHARED),
    }


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape) / shape[-2] ** 0.5


def timed(form: AbstractMatrix, tokens: int, threads: int, lowering: str) -> tuple[Callable[[], object], int]:
    spec = flatten(form)[1]
    copies = copies_of(spec, tokens)
    return body_call(spec, lowering, 2, tokens, threads, copies, CPU, 20), copies


def dense_int8(form: AbstractMatrix, tokens: int, threads: int) -> tuple[Callable[[], object], int]:
    """As a user has it: onnxruntime's own quantiser on the dense model."""
    copies = copies_of(flatten(form)[1], tokens) * (4 if tokens <= FEW_TOKENS else 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        model = stacked([Dense(torch.randn(*reversed(form.shape))) for _ in range(copies)], 2, apart=True)
        attach(model)
        ir.save(model, path)
        session = open_int8(path, threads)
    feeds = session.arrays({name: torch.randn(tokens, form.shape[1]) for name in session.input_types})
    return lambda: session.session.run(None, feeds), copies


def rows(n: int, m: int, factor: int, tokens: int, threads: int) -> Iterator[Row]:
    dense = Dense(torch.randn(n, m))
    yield Row(DENSE, "", dense, *timed(dense, tokens, threads, LOWERINGS[0]))
    yield Row(INT8, "", dense, *dense_int8(dense, tokens, threads))
    halves = quantised(dense, 4)
    assert halves is not None
    yield Row("dense", "stock int4", halves, *timed(halves, tokens, threads, NBITS))
    yield Row("dense", "kernel int4", halves, *timed(halves, tokens, threads, KERNEL))
    for family, form in {**families(n, m, factor), **sparse(n, m, factor)}.items():
        rounded = quantised(form)
        assert rounded is not None
        for suffix, one in (("", form), (" int8", rounded)):
            for lowering in LOWERINGS if family in TARGETED[1:] else LOWERINGS[:1]:
                yield Row(family, f"stock{suffix}", one, *timed(one, tokens, threads, lowering))
            yield Row(family, f"kernel{suffix}", one, *timed(one, tokens, threads, KERNEL))
        if family in TARGETED:
            halves = quantised(form, 4)
            assert halves is not None
            yield Row(family, "kernel int4", halves, *timed(halves, tokens, threads, KERNEL))


def check(n: int, m: int, factor: int, library: Kernels) -> None:
    """SystemExit unless kernel and stock bodies of every form equal the plain form."""
    rtol, atol = EQUAL[torch.float32]
    forms = {"dense": Dense(_normal(n, m)), **families(n, m, factor)}
    for family, form in forms.items():
        x, halves = torch.randn(7, n), quantised(form, 4)
        assert halves is not None
        found = session_of(pack(plan(halves), library.layout), n, m, library)({"x": x})["y"]
        _near(found, naive.run(plan(halves), x), f"{family} {n}x{m} in 4 bits at 1/{factor}")
    for family, form in {**families(n, m, factor), **sparse(n, m, factor)}.items():
        x = torch.randn(7, n)
        wanted = naive.run(plan(form), x)
        found = [session_of(pack(plan(form), library.layout), n, m, library)({"x": x})["y"]]
        for lowering in LOWERINGS:
            model = stacked([form], 2)
            attach(model, lambda _spec, _rank, lowering=lowering: lowering)
            found.append(Session(ir.to_proto(model).SerializeToString(), 1)({"x": x})["y0"])
        rounded = quantised(form)
        assert rounded is not None
        integers, expected = session_of(pack(plan(rounded), library.layout), n, m, library)({"x": x})["y"], naive.run(plan(rounded), x)
        _near(integers, expected, f"{family} {n}x{m} in int8 at 1/{factor}")
        if not all(torch.allclose(y, wanted, rtol, atol) for y in found):
            raise SystemExit(f"red: {family} {n}x{m} at 1/{factor} differs from its plain form; no figure is printed")


def _near(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """A sum's last place may round to a next step."""
    if not (found - wanted).norm() <= EQUAL[torch.bfloat16][0] * wanted.norm():
        raise SystemExit(f"red: {what} differs from its plain form; no figure is printed")


def peaks(library: Kernels) -> dict[str, float]:
    """Multiply-adds a second of one core, weights in the first cache."""
    run = library.library.structured_peak
    run.restype = ctypes.c_int64
    found = {}
    for name in ("float32", "bfloat16", "int8"):
        rates = []
        for _ in range(5):
            start = time.perf_counter()
            count = run(ctypes.c_int64(FORMATS.index(name)), ctypes.c_int64(20_000))
            rates.append(count / (time.perf_counter() - start))
        found[name] = max(rates)
    return found


def measured(n: int, m: int, factor: int, tokens: int, threads: int, peak: dict[str, float]) -> dict[tuple[str, str], Cell]:
    """Of each family and way the fastest spelling."""
    forms = list(rows(n, m, factor, tokens, threads))
    timing: Timing = interleave([row.call for row in forms], seconds=SECONDS, rounds=100)
    seconds = [timing.seconds(i) / row.copies for i, row in enumerate(forms)]
    cells: dict[tuple[str, str], Cell] = {}
    for row, each in zip(forms, seconds, strict=True):
        integer = row.family == INT8 or "int" in row.how
        arithmetic = peak["int8" if integer else "float32"] * threads
        cell = Cell(seconds[0] / each, seconds[1] / each, row.form.cost(tokens).flops / 2 / each / arithmetic)
        key = (row.family, row.how)
        cells[key] = max(cells.get(key, cell), cell)
    return cells


def verdicts(n: int, m: int, factor: int, threads: int, table: dict[int, dict[tuple[str, str], Cell]]) -> Iterator[str]:
    """The targets of one table with what was reached."""
    true = {family: n * m / form.cost().params for family, form in families(n, m, factor).items()}
    for family, f in true.items():
        for tokens, cells in table.items():
            kernel, integer, plain = (cells[family, how] for how in ("kernel", "kernel int8", "stock"))
            if tokens <= FEW_TOKENS and 4 * n * m >= LARGE:
                yield _said(f"{family} kernel T={tokens}", kernel.ratio, 0.9 * f, f"0.9 F = {0.9 * f:.1f}")
            if tokens >= 256 and threads == 1:
                yield _said(f"{family} kernel T={tokens}", kernel.peak, 0.85, "0.85 of the FMA peak")
            if factor == 4:
                wanted = 2.5 if tokens <= FEW_TOKENS else 1.8
                yield _said(f"{family} kernel int8 T={tokens}", integer.int8_ratio, wanted, f"{wanted}x dense int8")
            if tokens >= 64:
                yield _said(f"{family} stock T={tokens}", plain.ratio, 0.6 * f, f"0.6 F = {0.6 * f:.1f}")


def _said(what: str, reached: float, wanted: float, target: str) -> str:
    return f"{what}: {reached:.2f} of {target}: {'met' if reached >= wanted else 'MISSED'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxM")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="T")
    parser.add_argument("--factors", nargs="+", type=int, default=FACTORS, metavar="F")
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2), metavar="N")
    given = parser.parse_args()
    torch.manual_seed(0)
    library, console = trusted(), Console(width=130)
    peak = peaks(library)
    console.print("peak of one core: " + ", ".join(f"{name} {2 * rate / 1e9:.0f} GFLOP/s" for name, rate in peak.items()))
    reached: list[str] = []
    for n, m in (tuple(map(int, shape.split("x"))) for shape in given.shapes):
        for factor in given.factors:
            check(n, m, factor, library)
            for threads in given.threads:
                cells = {t: measured(n, m, factor, t, threads, peak) for t in given.tokens}
                _show(console, f"{n} x {m} at 1/{factor}, {threads} thread{'s' * (threads > 1)}", cells)
                lines = list(verdicts(n, m, factor, threads, cells))
                reached += lines
                short = [line for line in lines if "MISSED" in line]
                console.print(*short or [f"all {len(lines)} targets met"], sep="\n")
    missed = sum("MISSED" in line for line in reached)
    console.print(f"{len(reached) - missed} of {len(reached)} targets met")


def _show(console: Console, title: str, cells: dict[int, dict[tuple[str, str], Cell]]) -> None:
    table = Table("form", "how", *(f"T={t}" for t in cells), title=f"{title}: over dense float32 / over dense int8")
    for key in next(iter(cells.values())):
        if key[0] != DENSE:
            table.add_row(*key, *(f"{c[key].ratio:.2f} / {c[key].int8_ratio:.2f}" for c in cells.values()))
    console.print(table)


if __name__ == "__main__":
    main()
