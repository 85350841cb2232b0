"""all-MiniLM-L6-v2 as a whole on the CPU: what a user already has, and what we make of it: time, size and error side by side.

    python tools/bench_models.py [--budget 0.5] [--minutes 15] [--threads 1] [--tokens 128] [--batches 1 16]

Rows: ONNX Runtime's dense float32 (its own optimiser on), its dynamic int8, torch.compile; then ours: dense weights in 8 bits, and a share
of the linear layers' numbers, healed for some minutes where asked, in 8 bits; both on stock operators and in kernels. Times are
medians of calls interleaved in one process; a cell is milliseconds and how many times as fast as ONNX Runtime's int8. The error is
1 - the mean cosine of sentence embeddings with the dense model's, on 600 sentences that nothing was fitted to. A row whose outputs are not
finite is red, and nothing is printed. Below, the time by operator at the first batch, of dense float32 and of ours in kernels.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from minilm import embeddings, folder, stored_forms
from pytext import gather
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rewriter
from rewriter.backends.files.folder import load_folder
from rewriter.backends.kernels.session import open_covered
from rewriter.backends.onnx.int8 import open_int8
from rewriter.backends.onnx.run import Session
from rewriter.places import size
from rewriter.timing import Timing, interleave

CALIBRATION, JUDGES = 2048, 600  # sentences
SECONDS = 4.0  # of each form at each batch
INT8 = "dense int8"
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Form:
    """A model under test; `path` where it is a file, and whether kernels run it."""

    name: str
    run: Run
    nbytes: int | None
    path: Path | None = None
    kernels: bool = False


def forms(work: Path, budget: float, minutes: float, threads: int, tokens: str) -> Iterator[Form]:
    lines = gather(CALIBRATION)
    dense = stored_forms(work, lines[:8])["onnx"]
    yield Form("dense float32", Session(str(dense), threads), size(dense), dense)
    yield Form(INT8, open_int8(dense, threads), None)
    yield Form("torch.compile", _compiled(threads), None)
    heal = f",heal:minutes={minutes}" if minutes else ""
    for name, passes, options in (
        ("8 bits", "fuse-attention,quantize", {}),
        (
            f"{budget} of the numbers, 8 bits",
            f"fuse-attention,auto{heal},quantize",
            {"budget": f"params={budget}", "include": ("encoder.*",)},
        ),
    ):
        out = work / f"{len(name)}.onnx"
        common = {"target": "onnxruntime", "timing": False, "objective": "nbytes", "tokens": tokens, "threads": threads, "force": True}
        result = rewriter.rewrite(str(folder()), passes, data=lines, out=str(out), **{**common, **options})
        if result.exit_code:
            raise SystemExit(f"red: {name}: {result.message}")
        yield Form(f"{name}, stock", Session(str(out), threads), size(out), out)
        yield Form(f"{name}, kernels", open_covered(out, threads), size(out), out, kernels=True)


def _compiled(threads: int) -> Run:
    from transformers import AutoModel

    compiled = torch.compile(AutoModel.from_pretrained(folder()).eval(), dynamic=True)  # not our reader's wrapper, which it traces anew

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), on(threads):
            return {"last_hidden_state": compiled(**feeds).last_hidden_state}

    return run


@contextlib.contextmanager
def on(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    torch.set_num_threads(before)


def feeds(batch: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(1000, 20_000, (batch, tokens), generator=torch.Generator().manual_seed(batch))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def errors(found: list[Form]) -> dict[str, float]:
    """SystemExit where a form gives what is not finite."""
    model, lines = load_folder(folder()), gather(JUDGES, held_out=True)
    wanted = embeddings(found[0].run, model, lines)
    made = {}
    for form in found:
        e = embeddings(form.run, model, lines)
        if not e.isfinite().all():
            raise SystemExit(f"red: {form.name} gives what is not finite; no figure is printed")
        made[form.name] = 1 - float((e * wanted).sum(1).mean())
    return made


def timed(found: list[Form], inputs: Mapping[str, Tensor]) -> Timing:
    return interleave([lambda f=f: f.run(inputs) for f in found], seconds=SECONDS)  # type: ignore[misc]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--minutes", type=float, default=15, help="of healing; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    given = parser.parse_args()
    console = Console(width=130)
    with tempfile.TemporaryDirectory() as folder_of_work:
        asked = ",".join(str(b * given.tokens) for b in given.batches)
        found = list(forms(Path(folder_of_work), given.budget, given.minutes, given.threads, asked))
        wrong = errors(found)
        timings = {b: timed(found, feeds(b, given.tokens)) for b in given.batches}
        heads = [f"ms at {b} x {given.tokens}" for b in given.batches]
        table = Table("model", *heads, "MB", "1 - cosine", title=f"{given.threads} thread{'s' * (given.threads > 1)}")
        base = next(i for i, f in enumerate(found) if f.name == INT8)
        for i, form in enumerate(found):
            cells = [f"{1e3 * t.seconds(i):.1f} ({t.ratio(base, i)[1]:.2f}x)" for t in timings.values()]
            table.add_row(form.name, *cells, f"{form.nbytes / 1e6:.1f}" if form.nbytes else "", f"{wrong[form.name]:.4f}")
        console.print(table)
        for form in [f for f in found if f.path is not None and (f.kernels or f is found[0])]:
            spent = by_operator(form, feeds(given.batches[0], given.tokens))
            console.print(f"{form.name}: " + ", ".join(f"{name} {ms:.2f}" for name, ms in spent.items() if ms >= 0.05) + " ms")


if __name__ == "__main__":
    main()
