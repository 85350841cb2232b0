"""Attention on a latent as transformers exports it, and absorbed, under ONNX Runtime on the CPU.

    python tools/bench_mla.py [--quick] [--cached 2048] [--prompt 256] [--layers 2] [--threads 1] [--seconds 2]

A DeepSeek-V3 model with random weights (seed 0), its attention of DeepSeek-V2-Lite's sizes (16 heads of 128 + 64 on a latent of 512),
exported with its cache as inputs and outputs. transformers caches the latent and expands all of it in every call; `absorb` expands it in
calls of many tokens only. Both files go through ONNX Runtime's own optimiser. The core is what lies between the query, the cache and the
result of the first layer's attention, cut out of either file. Times are medians of calls interleaved in one process; a ratio is expanded
over absorbed with its 10th and 90th percentile. Red, and nothing is printed, where the logits of a prompt and of steps after it are not
those of the torch model, or where the cores differ.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rewriter
from rewriter import registry
from rewriter.backends.files.flat import PAST, PRESENT
from rewriter.backends.files.onnx_file import save_onnx
from rewriter.backends.onnx.run import Session
from rewriter.opened import open_model
from rewriter.options import Options
from rewriter.passes.detect.latent import read
from rewriter.passes.detect.magnitudes import sources
from rewriter.passes.structures.attention import Attention
from rewriter.timing import interleave
from rewriter.tolerances import EQUAL

LITE = {"num_attention_heads": 16, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
TINY = {"num_attention_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
BATCH, STEPS = 1, 3


def built(where: Path, given: argparse.Namespace) -> Any:
    """The model with random weights, saved as a folder."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    width = 64 if given.quick else 1024
    heads = TINY if given.quick else LITE
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": 512, "num_hidden_layers": given.layers}
    config = transformers.DeepseekV3Config(
        **sizes, **heads, num_key_value_heads=heads["num_attention_heads"], q_lora_rank=None, first_k_dense_replace=given.layers
    )
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    model.save_pretrained(where)
    return model


def empty(model: Any) -> dict[str, Tensor]:
    """A cache of nothing."""
    widths = {"keys": model.config.kv_lora_rank, "values": model.config.qk_rope_head_dim}
    layers = range(model.config.num_hidden_layers)
    return {f"{PAST}{i}_{side}": torch.zeros(BATCH, 1, 0, width) for i in layers for side, width in widths.items()}


def call(ids: Tensor, past: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of one call."""
    before, now = next(iter(past.values())).shape[2], ids.shape[1]
    positions = torch.arange(before, before + now).expand(len(ids), -1).contiguous()
    return {"input_ids": ids, "attention_mask": torch.ones(len(ids), before + now, dtype=torch.int64), "position_ids": positions, **past}


def filled(model: Any, count: int) -> dict[str, Tensor]:
    """A cache of random numbers, as large as what a norm leaves."""
    rng = torch.Generator().manual_seed(1)
    return {name: torch.randn(BATCH, 1, count, x.shape[3], generator=rng) for name, x in empty(model).items()}


def check(model: Any, sessions: Mapping[str, Session], prompt: int) -> None:
    """SystemExit unless each file decodes what the torch model gives: a prompt, then one token after the other."""
    ids = torch.randint(512, (BATCH, prompt + STEPS), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model(ids).logits
    for name, session in sessions.items():
        past, rows, at = empty(model), [], 0
        for count in (prompt, *[1] * STEPS):
            made = session(call(ids[:, at : at + count], past))
            rows.append(made["logits"])
            past = {key.replace(PRESENT, PAST): x for key, x in made.items() if key.startswith(PRESENT)}
            at += count
        equal(torch.cat(rows, 1), wanted, f"{name}: logits")


def equal(got: Tensor, wanted: Tensor, what: str) -> None:
    if not torch.allclose(got, wanted, *EQUAL[torch.float32]):
        raise SystemExit(f"red: {what} are off by {float((got - wanted).abs().max()):.1e}; no figure is printed")


@dataclass(frozen=True)
class Core:
    """The first layer's attention, cut out of a file; `inputs`: what it takes, with names for the sizes that vary."""

    session: Session
    inputs: Mapping[str, tuple[int | str, ...]]

    def feeds(self, time: int, cached: int) -> dict[str, Tensor]:
        """Random queries and latents of unit size, a mask that hides nothing; integers give their sizes alone."""
        rng, sizes = torch.Generator().manual_seed(3), {"batch": BATCH, "seq": time, "past": cached, "past+seq": cached + time}
        shapes = {name: [n if isinstance(n, int) else sizes[n] for n in dims] for name, dims in self.inputs.items()}
        floats = [name for name, kind in self.session.input_types.items() if kind == "tensor(float)"]
        found = {name: torch.randn(shape, generator=rng) if name in floats else torch.zeros(shape).long() for name, shape in shapes.items()}
        return {name: x * 0 if x.shape[2:] == (time, cached + time) else x for name, x in found.items()}


def cores(dense: Path, absorbed: Path, threads: int) -> dict[str, Core]:
    """Of either file: query, latent, rotated part and mask to the result."""
    graph: Any = open_model(str(dense), Options()).graph
    site = next(s for s in registry.sites(graph) if s.kind == "attention")
    assert isinstance(site.form, Attention) and site.region is not None and site.region.outputs[0] is not None
    found, out = read(graph, site.form, site.region), site.region.outputs[0].value
    if isinstance(found, str):
        raise SystemExit(f"red: {found}; no figure is printed")
    ports = [port.value for port in found.region.inputs]
    shaped = sources(graph, out, ports) or []
    other = ir.load(absorbed)
    node = next(n for n in other.graph if n.domain == "structured")
    cuts = {"expanded": (graph.model, out.name, [*ports, *shaped]), "absorbed": (other, node.outputs[0].name, ports)}
    made = {}
    for name, (model, result, values) in cuts.items():
        cut = ir.Model(ir.convenience.extract(model.graph, [v.name for v in values], [result]), ir_version=model.ir_version)
        cut.functions.update(model.functions)
        session = Session(ir.to_proto(cut).SerializeToString(), threads)
        made[name] = Core(session, {v.name: graph.shape(v) for v in values})
    return made


def core_calls(found: Mapping[str, Core], time: int, cached: int) -> list[Callable[[], object]]:
    """SystemExit where they differ."""
    feeds = {name: core.feeds(time, cached) for name, core in found.items()}
    (first,), (second,) = (core.session(feeds[name]).values() for name, core in found.items())
    equal(second, first, f"cores at T={time} after {cached}")
    return [core.session.bound(feeds[name]) for name, core in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and a short cache: whether it runs, no figures to keep")
    parser.add_argument("--cached", type=int, default=2048, help="tokens in the cache")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2, help="of timing each form")
    given = parser.parse_args()
    if given.quick:
        given.cached, given.prompt, given.layers, given.seconds = 64, 8, 1, 0.05
    with tempfile.TemporaryDirectory() as work:
        folder, files = Path(work) / "model", {name: Path(work) / f"{name}.onnx" for name in ("expanded", "absorbed")}
        model = built(folder, given)
        save_onnx(open_model(str(folder), Options()).graph.to_onnx(20), files["expanded"])  # type: ignore[attr-defined]
        options = {"tokens": f"1,{given.prompt}", "threads": given.threads, "samples": 4, "timing": False, "out": str(files["absorbed"])}
        result = rewriter.rewrite(str(files["expanded"]), f"absorb:cached={given.cached}", target="onnxruntime", **options)
        if result.exit_code:
            raise SystemExit(f"red: {result.message}; no figure is printed")
        sessions = {name: Session(str(path), given.threads) for name, path in files.items()}
        check(model, sessions, given.prompt)
        show(model, sessions, cores(*files.values(), given.threads), given)
        print(next(row.reason for row in result.report.sites if row.kind == "attention"))


def show(model: Any, sessions: Mapping[str, Session], found: Mapping[str, Core], given: argparse.Namespace) -> None:
    table = Table("call", "cache", "what", "expanded ms", "absorbed ms", "expanded / absorbed", title=f"MLA, {given.threads} thread(s)")
    for time, cached in ((1, given.cached), (given.prompt, 0)):
        whole = call(torch.zeros(BATCH, time, dtype=torch.int64), filled(model, cached))
        calls = {"attention core": core_calls(found, time, cached), "whole model": [s.bound(whole) for s in sessions.values()]}
        for what, pair in calls.items():
            timing = interleave(pair, seconds=given.seconds, again=True)
            low, ratio, high = timing.ratio(0, 1)
            cells = [f"{1e3 * timing.seconds(i):.2f}" for i in range(2)]
            table.add_row(f"T = {time}", f"{cached:,}", what, *cells, f"{ratio:.2f}x ({low:.2f} to {high:.2f})")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
