"""LoRA adapters that peft made: merged, and swapped between runs, against peft itself; and what room for them costs.

    python tools/bench_adapters.py [--ranks 4 8 16] [--tokens 1 128] [--seconds 2] [--no-times]

First an encoder (BERT), GPT-2 with its transposed linears and a Llama-style decoder with grouped queries, small, with random weights, as
saved folders; adapters of each kind on attention and MLP linears, random. The error is |y' - y| / |y| of the first output on random tokens:
`merge-lora` against peft's own merge (its forward where it has no merge), each rank on one ONNX Runtime session against peft's forward.
Red, and nothing is printed, where a merged one is off by more than 1e-5 or a swapped one by more than 1e-4.

Then all-MiniLM-L6-v2 with room at queries, keys, values, the attention's output and both MLP linears, one thread: medians of calls
interleaved in one process, each the second of two in a row, as times the time of the model without room: without an adapter, with one of
each rank, and merged.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import peft
import torch
import transformers
from minilm import folder
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rewriter
from rewriter.backends.onnx.dynamic import Adapted
from rewriter.backends.onnx.run import Session
from rewriter.timing import interleave

MERGED, SWAPPED = 1e-5, 1e-4  # allowed errors
SMALL = {"vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "BERT": (transformers.BertModel, {**SMALL, "hidden_size": 64, "intermediate_size": 128}, ["query", "key", "value", "dense"]),
    "GPT-2": (transformers.GPT2LMHeadModel, {"vocab_size": 99, "n_layer": 2, "n_head": 4, "n_embd": 64}, ["c_attn", "c_proj", "c_fc"]),
    "Llama, 4 heads on 2": (
        transformers.LlamaForCausalLM,
        {**SMALL, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2},
        ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "ranks and scales by module": {
        "rank_pattern": {"query": 2, "c_attn": 3, "q_proj": 2},
        "alpha_pattern": {r".*\.(value|c_proj|v_proj)": 9},
    },
    "biases": {"lora_bias": True},
}
ROOM = ["query", "key", "value", "intermediate.dense", "output.dense"]


def tuned(name: str, work: Path, **settings: Any) -> Any:
    """peft's model; the base lies in work/base, the adapter in work/lora."""
    kind, config, targets = MODELS[name]
    torch.manual_seed(0)
    base = kind(kind.config_class(**config)).eval()
    base.save_pretrained(work / "base")
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": targets, "fan_in_fan_out": name == "GPT-2", **settings}
    made = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **chosen)).eval()
    made.save_pretrained(work / "lora")
    return made


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def tokens(session: Session, ids: Tensor) -> dict[str, Tensor]:
    """All inputs for these tokens and no cache."""
    shapes = {i.name: i.shape for i in session.session.get_inputs()}
    plain = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None].expand_as(ids), "token_type_ids": torch.zeros_like(ids)}
    feeds = {name: plain.get(name, torch.ones_like(ids)) for name in shapes if not name.startswith("past_")}
    caches = {name: shape for name, shape in shapes.items() if name.startswith("past_")}
    return feeds | {name: torch.zeros(len(ids), shape[1], 0, shape[3]) for name, shape in caches.items()}


def first(outputs: Mapping[str, Tensor]) -> Tensor:
    return next(iter(outputs.values()))


def merged(name: str, kind: str, work: Path, ids: Tensor) -> float:
    made = tuned(name, work, **KINDS[kind])
    result = rewriter.rewrite(
        str(work / "base"), "merge-lora", out=str(work / "m.onnx"), adapters=(str(work / "lora"),), samples=16, timing=False
    )
    if result.exit_code:
        raise SystemExit(f"red: {name}, {kind}: {result.message}")
    session = Session(str(work / "m.onnx"), 1)
    with torch.no_grad():
        biased = any(part.lora_bias["default"] and part.base_layer.bias is None for part in made.modules() if hasattr(part, "lora_bias"))
        wanted = (made if biased else made.merge_and_unload())(input_ids=ids)[0]
    return off(first(session(tokens(session, ids))), wanted)


def swapped(name: str, ranks: Sequence[int], work: Path, ids: Tensor) -> Iterator[float]:
    """One session for all ranks, the last one first."""
    wanted = {}
    for rank in ranks:
        made = tuned(name, work / f"r{rank}", r=rank)
        with torch.no_grad():
            wanted[rank] = made(input_ids=ids)[0]
    folders = [work / f"r{rank}" / "lora" for rank in ranks]
    model, *files = rewriter.dynamic_adapters(str(work / f"r{ranks[0]}" / "base"), folders, work / "room.onnx", samples=16)
    session = Session(str(model), 1)
    found = {rank: first(Adapted(session, file)(tokens(session, ids))) for rank, file in reversed([*zip(ranks, files, strict=True)])}
    for rank in ranks:
        yield off(found[rank], wanted[rank])


def judged(error: float, allowed: float, what: str) -> str:
    if not error <= allowed:
        raise SystemExit(f"red: {what} is off by {error:.1e}, more than {allowed:g}; no figure is printed")
    return f"{error:.1e}"


def errors(ranks: Sequence[int], work: Path) -> Table:
    ids = torch.randint(99, (2, 12), generator=torch.Generator().manual_seed(1))
    table = Table("adapter", *MODELS, title="relative error of the first output")
    for i, kind in enumerate(KINDS):
        found = [merged(name, kind, work / f"{i}{j}", ids) for j, name in enumerate(MODELS)]
        table.add_row(f"{kind}, merged", *(judged(e, MERGED, f"{n}, {kind}") for n, e in zip(MODELS, found, strict=True)))
    columns = [list(swapped(name, ranks, work / f"s{j}", ids)) for j, name in enumerate(MODELS)]
    for i, rank in enumerate(ranks):
        row = [column[i] for column in columns]
        table.add_row(f"rank {rank}, swapped", *(judged(e, SWAPPED, f"{n}, rank {rank}") for n, e in zip(MODELS, row, strict=True)))
    return table


def times(ranks: Sequence[int], counts: Sequence[int], seconds: float, work: Path) -> Table:
    folders = []
    for rank in ranks:
        base: nn.Module = transformers.AutoModel.from_pretrained(folder())
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=ROOM, init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(work / f"r{rank}")
        folders.append(work / f"r{rank}")
    common: dict[str, Any] = {"samples": 16, "force": True}
    plain, whole = work / "plain.onnx", work / "merged.onnx"
    rewriter.rewrite(str(folder()), "pre-merge", out=str(plain), timing=False, allow_noop=True, target="onnxruntime", **common)
    rewriter.rewrite(str(folder()), "merge-lora", out=str(whole), adapters=(str(folders[-1]),), timing=False, **common)
    model, *files = rewriter.dynamic_adapters(str(folder()), folders, work / "room.onnx", **common)
    base_run, room = Session(str(plain), 1), Session(str(model), 1)
    runs: dict[str, Any] = {"without room": base_run, "merged": Session(str(whole), 1), "room, no adapter": room}
    runs |= {f"rank {rank}": Adapted(room, file) for rank, file in zip(ranks, files, strict=True)}
    table = Table("all-MiniLM-L6-v2", *(f"{count} token{'s' * (count > 1)}" for count in counts), title="milliseconds, times without room")
    columns = []
    for count in counts:
        feeds = tokens(base_run, torch.randint(1000, 20_000, (1, count), generator=torch.Generator().manual_seed(0)))
        timing = interleave([partial(run, feeds) for run in runs.values()], seconds=seconds, again=True)
        columns.append([f"{1e3 * timing.seconds(i):.2f} ({timing.ratio(i, 0)[1]:.2f})" for i in range(len(runs))])
    for name, *cells in zip(runs, *columns, strict=True):
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=(4, 8, 16))
    parser.add_argument("--tokens", type=int, nargs="+", default=(1, 128))
    parser.add_argument("--seconds", type=float, default=2, help="of timing each form")
    parser.add_argument("--no-times", action="store_true", help="the errors alone")
    given = parser.parse_args()
    transformers.logging.disable_progress_bar()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as work:
        console.print(errors(given.ranks, Path(work)))
        if not given.no_times:
            console.print(times(given.ranks, given.tokens, given.seconds, Path(work)))
    console.print(f"onnxruntime {ort.__version__}, peft {peft.__version__}")


if __name__ == "__main__":
    main()
