"""Attention on a cache of latents beside the dense one: GPT-2 small's shape, ONNX Runtime on the CPU, one token and a prompt.

    python tools/bench_decode_attention.py [--rank 64] [--groups 3] [--past 512] [--prompt 512] [--layers 12] [--threads 1] [--quick]

The weights are random (seed 0), so errors say nothing about text and are not shown: what is compared are bytes and times. Rows: the dense
model as transformers exports it; `low-rank-kv`; the same with the other linear layers in half of their numbers (`low-rank`, left out by
--plain). Times are medians of calls interleaved in one process, and ratios, dense over each, medians of paired ones with their 10th and
90th percentile; the cache is an input and an output, as long in each model, and of its own sizes. Red, and nothing is printed, where a file
of full rank does not decode what the dense one does, a prompt and then steps, or where an output is not finite.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rewriter
from rewriter.backends.files.flat import PAST, PRESENT
from rewriter.backends.files.onnx_file import save_onnx
from rewriter.backends.onnx.run import Session
from rewriter.opened import open_model
from rewriter.options import Options
from rewriter.places import size
from rewriter.timing import interleave
from rewriter.tolerances import EQUAL

STEPS = 3
Shapes = Mapping[str, tuple[int, int]]  # heads and width of each input of a cache


def built(where: Path, given: argparse.Namespace) -> Any:
    """The model with random weights, as an onnx_ir model."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    small = {"n_embd": 48, "n_head": 12, "vocab_size": 64} if given.quick else {}
    config = transformers.GPT2Config(n_layer=given.layers, **small, bos_token_id=1, eos_token_id=1)
    transformers.GPT2LMHeadModel(config).eval().save_pretrained(where)
    return open_model(str(where), Options()).graph.to_onnx(20)


def made(dense: Path, passes: str, out: Path, given: argparse.Namespace) -> str:
    """What the passes make of the file: why, in the words of the first attention."""
    options = {"samples": 8, "timing": False, "force": True, "tokens": f"1,{given.prompt}", "threads": given.threads, "objective": "params"}
    result = rewriter.rewrite(str(dense), passes, target="onnxruntime", out=str(out), dims="batch=1,past=0,seq=32", **options)
    if result.exit_code:
        raise SystemExit(f"red: {passes}: {result.message}; no figure is printed")
    return next(row.reason for row in result.report.sites if row.kind == "attention")


def shapes(file: Path) -> Shapes:
    found = {spec.name: spec.dims for spec in open_model(str(file), Options()).graph.specs() if spec.name.startswith(PAST)}
    return {name: (int(dims[1]), int(dims[3])) for name, dims in found.items()}


def call(ids: Tensor, past: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of one call."""
    before, now = next(iter(past.values())).shape[2], ids.shape[1]
    where = torch.arange(before, before + now)[None]
    return {"input_ids": ids, "attention_mask": torch.ones(1, before + now, dtype=torch.int64), "position_ids": where, **past}


def filled(own: Shapes, count: int) -> dict[str, Tensor]:
    """A cache of random numbers."""
    rng = torch.Generator().manual_seed(1)
    return {name: torch.randn(1, heads, count, width, generator=rng) for name, (heads, width) in own.items()}


def decoded(session: Session, own: Shapes, ids: Tensor, prompt: int) -> Tensor:
    past, rows, at = filled(own, 0), [], 0
    for count in (prompt, *[1] * STEPS):
        found = session(call(ids[:, at : at + count], past))
        rows.append(found["logits"])
        past = {name.replace(PRESENT, PAST): x for name, x in found.items() if name.startswith(PRESENT)}
        at += count
    return torch.cat(rows, 1)


def check(files: Mapping[str, Path], full: Path, given: argparse.Namespace) -> None:
    """SystemExit unless the file of full rank decodes what the dense one does, and all give finite numbers."""
    ids = torch.randint(50, (1, 16 + STEPS), generator=torch.Generator().manual_seed(2))
    found = {name: decoded(Session(str(path), given.threads), shapes(path), ids, 16) for name, path in {**files, "full rank": full}.items()}
    if wrong := [name for name, y in found.items() if not y.isfinite().all()]:
        raise SystemExit(f"red: {wrong[0]} gives what is not finite; no figure is printed")
    equal(found["full rank"], found["dense"])


def equal(got: Tensor, wanted: Tensor) -> None:
    if not torch.allclose(got, wanted, *EQUAL[torch.float32]):
        raise SystemExit(f"red: at full rank logits are off by {float((got - wanted).abs().max()):.1e}; no figure is printed")


def show(files: Mapping[str, Path], given: argparse.Namespace) -> None:
    sessions = [Session(str(path), given.threads) for path in files.values()]
    own = [shapes(path) for path in files.values()]
    bytes_of = [sum(4 * heads * width for heads, width in each.values()) for each in own]
    columns = [f"{time} token{'s' * (time > 1)} after {past}" for time, past in _calls(given)]
    table = Table(
        "model",
        "cache, bytes a token",
        "file, MB",
        *(f"{head}, ms" for head in columns),
        title=f"{given.layers} layers, {given.threads} thread(s)",
    )
    timings = []
    for time, past in _calls(given):
        ids = torch.randint(50, (1, time), generator=torch.Generator().manual_seed(3))
        calls = [session.bound(call(ids, filled(each, past))) for session, each in zip(sessions, own, strict=True)]
        timings.append(interleave(calls, seconds=given.seconds, again=True))
    for i, (name, path) in enumerate(files.items()):
        cells = []
        for timing in timings:
            low, ratio, high = timing.ratio(0, i)
            cells.append(f"{1e3 * timing.seconds(i):.2f}" + (f" ({ratio:.2f}x, {low:.2f} to {high:.2f})" if i else ""))
        table.add_row(name, f"{bytes_of[i]:,} ({bytes_of[i] / bytes_of[0]:.2f})", f"{size(path) / 1e6:.1f}", *cells)
    Console(width=150).print(table)


def _calls(given: argparse.Namespace) -> list[tuple[int, int]]:
    return [(1, given.past), (given.prompt, 0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and a short cache: whether it runs, no figures to keep")
    parser.add_argument("--rank", type=int, default=64, help="numbers a token for the keys of a group, and for its values")
    parser.add_argument("--groups", type=int, default=3, help="latents for the keys of a layer, and for its values")
    parser.add_argument("--past", type=int, default=512, help="tokens in the cache")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4, help="of timing each form")
    parser.add_argument("--plain", action="store_true", help="leave the other linear layers dense")
    given = parser.parse_args()
    if given.quick:
        given.past, given.prompt, given.layers, given.seconds, given.rank = 16, 8, 1, 0.05, 8
    with tempfile.TemporaryDirectory() as work:
        files = {"dense": Path(work) / "dense.onnx", "low-rank-kv": Path(work) / "kv.onnx"}
        save_onnx(built(Path(work) / "gpt2", given), files["dense"])
        asked = f"low-rank-kv:rank={given.rank}:groups={given.groups}:cached={given.past}"
        said = made(files["dense"], asked, files["low-rank-kv"], given)
        if not given.plain:
            files["and low-rank"] = Path(work) / "both.onnx"
            made(files["dense"], f"{asked},low-rank", files["and low-rank"], given)
        heads, width = next(iter(shapes(files["dense"]).values()))
        full = f"low-rank-kv:rank={heads // given.groups * width}:groups={given.groups}:cached={given.past}"
        made(files["dense"], full, Path(work) / "full.onnx", given)
        check(files, Path(work) / "full.onnx", given)
        show(files, given)
        print(said)


if __name__ == "__main__":
    main()
