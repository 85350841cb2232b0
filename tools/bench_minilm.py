"""all-MiniLM-L6-v2 at half of its encoder's linear parameters: errors at each site and cosines of sentence embeddings, against baselines.

    python tools/bench_minilm.py [--quick | --families]

Calibrated on 2,048 sentences from Python's own text, judged on 600 from other files. Baselines at equal parameters: activation-weighted low
rank (our own, which also takes the mean error up in the bias), plain SVD, plain Monarch projection. Every emitted model is reloaded and
compared by the pipeline before it is judged; a red check ends the run. `--families` compares weighted errors at four sites instead.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from minilm import embeddings, folder, stored_forms
from pytext import gather
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rewriter import pipeline, registry
from rewriter.backends.files.folder import FolderModel, load_folder
from rewriter.backends.files.load import open_source
from rewriter.calibrate import Calibration, Samples
from rewriter.graph import load_weight
from rewriter.moments import isotropic
from rewriter.options import Options
from rewriter.report import Report
from rewriter.structure import Fitted

SHARE = 0.5
JUDGES = 600
SITES = ("0.attention.self.query", "3.attention.output.dense", "5.intermediate.dense", "5.output.dense")
FAMILIES = ("low-rank", "monarch", "block-dense", "blast")


def rewritten(model: Path, data: Path, target: str, passes: str, work: Path) -> tuple[Report, Path]:
    """One run of the pipeline; SystemExit with its message where it did not end well."""
    out = work / f"{model.stem}-{passes.split(':')[0]}-{target}{'.pt2' if target == 'torch' else '.onnx'}"
    options = Options(passes=passes, data=str(data), target=target, out=str(out), force=True, timing=False, include=("encoder.*",))
    result = pipeline.rewrite(str(model), options)
    if result.exit_code or result.path is None:
        raise SystemExit(f"red: {result.message}")
    return result.report, result.path


def cosine(path: Path, target: str, model: FolderModel, lines: list[str], dense: Tensor) -> float:
    """Mean cosine of the emitted model's embeddings with the dense ones."""
    runner = registry.targets()[target]().open(path, 2)
    return float((embeddings(runner, model, lines) * dense).sum(-1).mean())


def plain(name: str, model: FolderModel, lines: list[str], dense: Tensor) -> float:
    """The family's Frobenius projection at every encoder linear, as tools without calibration do it."""
    source = open_source(str(folder()), Options())
    graph = source.graph
    sites = [s for s in registry.sites(graph) if s.kind == "linear" and s.name.startswith("encoder.")]
    structure = registry.structures()[name](**({"blocks": 4} if name == "monarch" else {}))
    for site in sites:
        weight = load_weight(graph, site)
        fitted = structure.fit(weight, isotropic(weight.shape[1]), int(SHARE * weight.numel()), torch.Generator().manual_seed(0))
        assert isinstance(fitted, Fitted)
        graph.splice(site, fitted.operator)
    return float((embeddings(graph.run, model, lines) * dense).sum(-1).mean())


def families(model: FolderModel) -> Table:
    """Each family's weighted error at a few sites at half of their numbers, and the seconds of its fit, one thread."""
    torch.set_num_threads(1)
    graph, lines = open_source(str(folder()), Options()).graph, gather(512)
    wanted = {f"encoder.layer.{name}" for name in SITES}
    sites = [s for s in registry.sites(graph) if s.name in wanted]
    samples = Samples([model.encode(lines[i : i + 32]) for i in range(0, len(lines), 32)], "text", "families")
    table = Table(title=f"weighted errors at {SHARE:.0%} of params, calibrated on {len(lines)} sentences")
    for head in ("site", "shape", *FAMILIES):
        table.add_column(head)
    for site, moments in (pair for group in Calibration(graph, samples).moments(sites) for pair in group):
        weight, cells = load_weight(graph, site), []
        assert moments is not None
        for name in FAMILIES:
            begun = time.perf_counter()
            fit = registry.structures()[name]().fit(
                weight, moments.centered(), int(SHARE * weight.numel()), torch.Generator().manual_seed(0)
            )
            assert isinstance(fit, Fitted)
            cells.append(f"{fit.weighted_error:.4f}, {time.perf_counter() - begun:.1f} s\n{fit.spelling.partition(':')[2]}")
        table.add_row(site.name.removeprefix("encoder.layer."), "{} x {}".format(*weight.shape), *cells)
    return table


def worse(auto: Report, low: Report) -> int:
    """Sites where auto's weighted error exceeds low rank's."""
    baseline = {s.name: s.error for s in low.sites}
    return sum((s.error or 0) > (baseline[s.name] or 0) for s in auto.sites if s.status == "rewritten")


def kept(report: Report) -> float:
    rows = [s for s in report.sites if s.status == "rewritten"]
    return sum(s.cost["params"]["after"] for s in rows) / sum(s.cost["params"]["before"] for s in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the folder for torch, without the plain baselines")
    parser.add_argument("--families", action="store_true", help="only the weighted errors of the families at a few sites")
    given = parser.parse_args()
    quick, console, model = given.quick, Console(width=120), load_folder(folder())
    if given.families:
        return console.print(families(model))
    lines = gather(JUDGES, held_out=True)
    source = open_source(str(folder()), Options())
    dense = embeddings(source.graph.run, model, lines)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        sentences = gather(2048)
        text = work / "calibration.txt"
        text.write_text("\n".join(sentences) + "\n", encoding="utf-8")
        forms = stored_forms(work, sentences)
        cases = [("folder", "torch"), ("folder", "onnxruntime"), ("pt2", "torch"), ("pt2", "onnxruntime"), ("onnx", "onnxruntime")]
        table = Table(title=f"linears to {SHARE:.0%} of params, judged on {len(lines)} sentences of other files")
        for head in ("input", "target", "sites", "params", "sites worse", "cosine auto", "cosine low rank", "output error auto"):
            table.add_column(head)
        for form, target in cases[: 1 if quick else None]:
            data = text if form == "folder" else forms["npz"]
            auto, path = rewritten(forms[form], data, target, f"auto:params={SHARE}", work)
            low, low_path = rewritten(forms[form], data, target, f"low-rank:params={SHARE}", work)
            figures = [cosine(p, target, model, lines, dense) for p in (path, low_path)]
            assert auto.output_error is not None
            error = f"{auto.output_error.estimate:.3f} +- {auto.output_error.half_width:.3f}"
            count, share = str(auto.matched["rewritten"]), f"{kept(auto):.1%}"
            table.add_row(form, target, count, share, str(worse(auto, low)), f"{figures[0]:.4f}", f"{figures[1]:.4f}", error)
    console.print(table)
    if not quick:
        svd, monarch = plain("low-rank", model, lines, dense), plain("monarch", model, lines, dense)
        console.print(f"without calibration, at equal params: plain SVD {svd:.4f}, plain Monarch (4 blocks) {monarch:.4f}")


if __name__ == "__main__":
    main()
