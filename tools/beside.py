"""Forms of one model side by side: what a user already has and what we make of it; interleaved times, sizes, time by operator.

Shared by bench_models.py and bench_decoder.py, which bring the model, its inputs and the error.
"""

from __future__ import annotations

import collections
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rewriter
from rewriter.backends.kernels.session import open_covered
from rewriter.backends.onnx.int8 import quantise
from rewriter.backends.onnx.run import Session
from rewriter.places import size
from rewriter.timing import interleave

INT8 = "dense int8"
SHOWN = 0.05  # milliseconds of an operator that is listed
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Form:
    """A model under test; `path` where it is a file, and whether kernels run it."""

    name: str
    run: Run
    nbytes: int | None
    path: Path | None = None
    kernels: bool = False


def dense_forms(dense: Path, compiled: Run, threads: int) -> Iterator[Form]:
    """What a user already has, dense float32 first."""
    yield Form("dense float32", Session(str(dense), threads), size(dense), dense)
    int8 = dense.with_name("int8.onnx")
    if not int8.exists():
        quantise(dense, int8)
    yield Form(INT8, Session(str(int8), threads), size(int8), int8)
    yield Form("torch.compile", compiled, None)


def rewritten(name: str, source: Path, passes: str, out: Path, threads: int, **options: Any) -> Iterator[Form]:
    """The file that `passes` make of the source, unless it is there, on stock operators and in kernels; SystemExit where they make none."""
    if not out.exists():
        given = {"target": "onnxruntime", "out": str(out), "threads": threads, "timing": False, "force": True, **options}
        result = rewriter.rewrite(str(source), passes, **given)
        if result.exit_code:
            raise SystemExit(f"red: {name}: {result.message}")
    yield Form(f"{name}, stock", Session(str(out), threads), size(out), out)
    yield Form(f"{name}, kernels", open_covered(out, threads), size(out), out, kernels=True)


@contextlib.contextmanager
def on(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def by_operator(form: Form, inputs: Mapping[str, Tensor], rounds: int = 20) -> dict[str, float]:
    """Milliseconds of a call by operator, as ONNX Runtime's profiler has them."""
    assert form.path is not None
    with tempfile.TemporaryDirectory() as where:
        options = ort.SessionOptions()  # type: ignore[attr-defined]
        options.enable_profiling, options.profile_file_prefix, options.intra_op_num_threads = True, f"{where}/profile", 1
        make: Any = rewriter.inference_session if form.kernels else ort.InferenceSession  # type: ignore[attr-defined]
        session = make(str(form.path), options)
        arrays = {v.name: inputs[v.name].numpy() for v in session.get_inputs()}
        for _ in range(rounds):
            session.run(None, arrays)
        events = json.loads(Path(session.end_profiling()).read_text())
    total: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            total[event["args"]["op_name"]] += event["dur"]
    return {name: spent / rounds / 1000 for name, spent in total.most_common()}


@dataclass(frozen=True)
class Shown:
    """What is printed of the forms: `inputs` by the head of their column, `error` (what it is, and each form's)."""

    inputs: Mapping[str, Mapping[str, Tensor]]
    error: tuple[str, Mapping[str, float]]
    title: str
    seconds: float  # of each form at each of the inputs


def show(found: Sequence[Form], shown: Shown) -> None:
    """The table, and below it the time by operator at the first inputs, of dense float32 and of what kernels run."""
    console, (measure, wrong) = Console(width=130), shown.error
    timings = [interleave([partial(f.run, x) for f in found], seconds=shown.seconds, again=True) for x in shown.inputs.values()]
    table = Table("model", *(f"ms {head}" for head in shown.inputs), "MB", measure, title=shown.title)
    base = next(i for i, f in enumerate(found) if f.name == INT8)
    for i, form in enumerate(found):
        cells = [f"{1e3 * t.seconds(i):.1f} ({t.ratio(base, i)[1]:.2f}x)" for t in timings]
        table.add_row(form.name, *cells, _megabytes(form, found[0]), f"{wrong[form.name]:.4f}")
    console.print(table)
    first = next(iter(shown.inputs.values()))
    for form in [f for f in found if f.kernels or f is found[0]]:
        spent = by_operator(form, first)
        console.print(f"{form.name}: " + ", ".join(f"{name} {ms:.2f}" for name, ms in spent.items() if ms >= SHOWN) + " ms")


def _megabytes(form: Form, dense: Form) -> str:
    if form.nbytes is None or dense.nbytes is None:
        return ""
    return f"{form.nbytes / 1e6:.1f} ({form.nbytes / dense.nbytes:.2f})"
