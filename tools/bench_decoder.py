"""GPT-2 small's shape as a whole on the CPU, one token with a cache: what a user already has, and what we make of it.

    python tools/bench_decoder.py [--share 0.5] [--passes low-rank] [--threads 1] [--past 128] [--layers 12] [--keep FOLDER]

The weights are random (seed 0): nobody can fetch trained ones here. So the errors are those of numbers, of 8 bits and of a structure that
random weights do not have, and say nothing about text. Rows: ONNX Runtime's dense float32 (its own optimiser on), its dynamic int8,
torch.compile; then ours: dense weights in 8 bits, in 4 bits, and each linear layer in a share of its numbers, in 8 bits; all on stock
operators and in kernels. The cache is an input and an output. Times are medians of calls interleaved in one process, each the second of two
in a row, at batch 1; a cell is milliseconds and how many times as fast as ONNX Runtime's int8. Sizes are of files, in brackets over the
dense one's. The error is |y' - y| / |y| of logits over all steps of all prompts: each form decodes the same random tokens from its own
cache, whose oldest token is dropped at each step, so that its length stays. Red, and nothing is printed, where outputs are not finite, or
where dense float32 or torch.compile are off from the torch model. Below, the time by operator, of dense float32 and of ours in kernels.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from beside import Form, Run, Shown, dense_forms, on, rewritten, show
from torch import Tensor

from rewriter.backends.files.flat import CACHES, PAST, PRESENT
from rewriter.backends.files.onnx_file import save_onnx
from rewriter.opened import open_model
from rewriter.options import Options
from rewriter.tolerances import EQUAL

PROMPTS, STEPS = 4, 4
FAITHFUL = ("dense float32", "torch.compile")  # what has to be equal to the torch model


def built(layers: int, where: Path) -> Any:
    """The model with random weights, saved as a folder at `where`."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers)).eval()
    model.save_pretrained(where)
    return model


def step(model: Any, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One step in torch, by the names that the exported model has."""
    cache, layers = transformers.DynamicCache(), model.config.n_layer
    for i in range(layers):
        cache.update(feeds[f"{PAST}{i}_keys"], feeds[f"{PAST}{i}_values"], i)
    plain = {name: x for name, x in feeds.items() if not name.startswith(PAST)}
    logits = model(**plain, **{CACHES[0]: cache}, use_cache=True).logits
    return {"logits": logits, **states(cache, PRESENT)}


def states(cache: Any, prefix: str) -> dict[str, Tensor]:
    held = {i: {"keys": layer.keys, "values": layer.values} for i, layer in enumerate(cache.layers)}
    return {f"{prefix}{i}_{side}": state for i, both in held.items() for side, state in both.items()}


def torch_run(model: Any, threads: int, compiled: bool) -> Run:
    call = torch.compile(step, dynamic=False) if compiled else step

    def run(feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with torch.no_grad(), on(threads):
            return call(model, dict(feeds))

    return run


def prompts(model: Any, past: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """For each prompt of random tokens the inputs of the next step, and the tokens of all steps."""
    rng, found = torch.Generator().manual_seed(1), []
    for _ in range(PROMPTS):
        ids = torch.randint(model.config.vocab_size, (1, past + STEPS), generator=rng)
        with torch.no_grad():
            cache = model(input_ids=ids[:, :past], use_cache=True)[CACHES[0]]
        plain = {"attention_mask": torch.ones(1, past + 1, dtype=torch.int64), "position_ids": torch.tensor([[past]])}
        found.append(({"input_ids": ids[:, past : past + 1], **plain, **states(cache, PAST)}, ids[:, past:]))
    return found


def decoded(run: Run, start: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """(steps, vocabulary): the logits of each step."""
    feeds, rows = dict(start), []
    for i in range(ids.shape[1]):
        feeds |= {"input_ids": ids[:, i : i + 1], "position_ids": start["position_ids"] + i}
        made = run(feeds)
        rows.append(made["logits"][0, -1])
        feeds |= {name.replace(PRESENT, PAST): state[:, :, 1:] for name, state in made.items() if name.startswith(PRESENT)}
    return torch.stack(rows)


def errors(found: list[Form], model: Any, past: int, threads: int) -> dict[str, float]:
    """SystemExit where a form gives what is not finite, or is off where it has to be equal to the torch model."""
    given, eager, logits = prompts(model, past), torch_run(model, threads, compiled=False), {}
    wanted = torch.cat([decoded(eager, *prompt) for prompt in given])
    for form in found:
        y = logits[form.name] = torch.cat([decoded(form.run, *prompt) for prompt in given])
        if not y.isfinite().all():
            raise SystemExit(f"red: {form.name} gives what is not finite; no figure is printed")
        if form.name in FAITHFUL and not torch.allclose(y, wanted, *EQUAL[torch.float32]):
            raise SystemExit(f"red: {form.name} is off from the torch model by {float((y - wanted).abs().max()):.1e}; no figure is printed")
    dense = logits[found[0].name]
    return {name: float((y - dense).norm() / dense.norm()) for name, y in logits.items()}


def forms(model: Any, work: Path, given: argparse.Namespace) -> Iterator[Form]:
    folder, dense = work / "gpt2", work / "dense.onnx"
    save_onnx(open_model(str(folder), Options()).graph.to_onnx(20), dense)
    yield from dense_forms(dense, torch_run(model, given.threads, compiled=True), given.threads)
    common = {"objective": "ms", "kernels": True, "tokens": "1", "dims": f"batch=1,past={given.past},seq=1", "samples": given.samples}
    yield from rewritten("8 bits", dense, "fuse-attention,quantize", work / "8.onnx", given.threads, **common)
    yield from rewritten("4 bits", dense, "fuse-attention,quantize:bits=4", work / "4.onnx", given.threads, **common)
    passes = f"fuse-attention,{given.passes}:params={given.share},quantize"
    yield from rewritten(f"{given.passes} at {given.share}, 8 bits", dense, passes, work / "share.onnx", given.threads, **common)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.5, help="of each linear layer's numbers")
    parser.add_argument("--passes", default="low-rank", help="what takes params=SHARE; auto takes minutes more")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--past", type=int, default=128, help="tokens in the cache")
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick look")
    parser.add_argument("--samples", type=int, default=32, help="invented, to calibrate and certify with")
    parser.add_argument("--seconds", type=float, default=4, help="of timing each form")
    parser.add_argument("--keep", type=Path, help="where the models stay; what lies there is not made again")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as passing:
        work = given.keep or Path(passing)
        work.mkdir(parents=True, exist_ok=True)
        model = built(given.layers, work / "gpt2")
        found = list(forms(model, work, given))
        wrong = errors(found, model, given.past, given.threads)
        threads = f"{given.threads} thread{'s' * (given.threads > 1)}"
        title = f"GPT-2 small's shape, {given.layers} layers, random weights (errors say nothing about text), {threads}"
        inputs = {f"one token after {given.past}": prompts(model, given.past)[0][0]}
        show(found, Shown(inputs, ("error of logits", wrong), title, given.seconds))


if __name__ == "__main__":
    main()
