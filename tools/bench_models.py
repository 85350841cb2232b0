"""all-MiniLM-L6-v2 as a whole on the CPU: what a user already has, and what we make of it: time, size and error side by side.

    python tools/bench_models.py [--budgets 0.5] [--minutes 15] [--threads 1] [--tokens 128] [--batches 1 16] [--keep FOLDER]

Rows: ONNX Runtime's dense float32 (its own optimiser on), its dynamic int8, torch.compile; then ours: dense weights in 8 bits, in 4 bits,
and shares of the linear layers' numbers, each healed for some minutes where asked, in 8 bits; all on stock operators and in kernels. Times
are medians of calls interleaved in one process, each the second of two in a row; a cell is milliseconds and how many times as fast as ONNX
Runtime's int8. Sizes are of files, in brackets over the dense one's. The error is 1 - the mean cosine of sentence embeddings with the dense
model's, on 600 sentences that nothing was fitted to. A row whose outputs are not finite is red, and nothing is printed. Below, the time by
operator at the first batch, of dense float32 and of ours in kernels. Forms are chosen by bytes, not by time. A decoder: bench_decoder.py.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from beside import Form, Run, Shown, dense_forms, on, rewritten, show
from minilm import embeddings, folder, stored_forms
from pytext import gather
from torch import Tensor

from rewriter.backends.files.folder import load_folder

CALIBRATION, JUDGES = 2048, 600  # sentences
SECONDS = 4.0  # of each form at each batch


def forms(work: Path, budgets: Sequence[float], minutes: float, threads: int, tokens: str) -> Iterator[Form]:
    lines = gather(CALIBRATION)
    yield from dense_forms(stored_forms(work, lines[:8])["onnx"], _compiled(threads), threads)
    heal = f",heal:minutes={minutes}" if minutes else ""
    common = {"data": lines, "objective": "nbytes", "tokens": tokens}
    yield from rewritten("8 bits", folder(), "fuse-attention,quantize", work / "8.onnx", threads, **common)
    yield from rewritten("4 bits", folder(), "fuse-attention,quantize:bits=4", work / "4.onnx", threads, **common)
    for budget in budgets:
        share = {"budget": f"params={budget}", "include": ("encoder.*",), **common}
        name = f"{budget} of the numbers, 8 bits"
        yield from rewritten(name, folder(), f"fuse-attention,auto{heal},quantize", work / f"{budget}.onnx", threads, **share)


def _compiled(threads: int) -> Run:
    from transformers import AutoModel

    compiled = torch.compile(AutoModel.from_pretrained(folder()).eval(), dynamic=True)  # not our reader's wrapper, which it traces anew

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad(), on(threads):
            return {"last_hidden_state": compiled(**feeds).last_hidden_state}

    return run


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="*", default=(0.5,))
    parser.add_argument("--minutes", type=float, default=15, help="of healing; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--keep", type=Path, help="where the models stay; what lies there is not made again")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        work = given.keep or Path(passing)
        work.mkdir(parents=True, exist_ok=True)
        asked = ",".join(str(b * given.tokens) for b in given.batches)
        found = list(forms(work, given.budgets, given.minutes, given.threads, asked))
        inputs = {f"at {b} x {given.tokens}": feeds(b, given.tokens) for b in given.batches}
        title = f"{given.threads} thread{'s' * (given.threads > 1)}"
        show(found, Shown(inputs, ("1 - cosine", errors(found)), title, SECONDS))


if __name__ == "__main__":
    main()
