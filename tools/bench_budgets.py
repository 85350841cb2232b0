"""One budget in every unit: what the linear sites then cost in each of them, the error, the whole model's time, and how long the run took.

    python tools/bench_budgets.py [--share 0.6] [--layers 2] [--tokens 128]

The first layers of all-MiniLM-L6-v2, calibrated on 512 sentences of Python's own text; ms once on stock operators and once in kernels. A
share is of what the sites cost dense; that of ms is the whole model's, medians interleaved in one process. Red where the budget is not kept
in its own unit (for ms the linear layers are what is bounded, so the whole model is only shown), and then nothing is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from minilm import stored_forms
from pytext import gather
from rich.console import Console
from rich.table import Table

from rewriter import pipeline
from rewriter.options import Options

UNITS = ("params", "flops", "nbytes")
SENTENCES = 512


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    asked = parser.parse_args()
    table = Table(
        title=f"auto under one budget of {asked.share} in each unit: {asked.layers} layers of MiniLM, {asked.tokens} tokens, 1 thread"
    )
    for head in ("budget", *UNITS, "output error", "whole model, rewritten / dense time", "seconds of the run"):
        table.add_column(head, justify="right")
    red, layers = 0, [f"encoder.layer.{i}." for i in range(asked.layers)]
    with tempfile.TemporaryDirectory() as folder:
        given = stored_forms(Path(folder), gather(SENTENCES))
        for unit, kernels in (*[(u, False) for u in (*UNITS, "ms")], ("ms", True)):
            options = Options(
                passes="auto",
                budget=f"{unit}={asked.share}",
                data=str(given["npz"]),
                include=tuple(f"{layer}*" for layer in layers),
                tokens=str(asked.tokens),
                out=str(Path(folder) / f"{unit}{kernels}.onnx"),
                cache=str(Path(folder) / "cache"),
                kernels=kernels,
                force=True,
            )
            begun = time.perf_counter()
            result = pipeline.rewrite(str(given["onnx"]), options)
            took = time.perf_counter() - begun
            report = result.report
            assert report.output_error is not None
            sites = [s for s in report.sites if s.name.startswith(tuple(layers))]
            shares = {u: sum(s.cost[u]["after"] for s in sites) / sum(s.cost[u]["before"] for s in sites) for u in UNITS}
            row = report.latency[0]
            if row.ratio is None or row.ratio_spread is None:
                raise SystemExit(f"red: {unit}: {row.note}")
            red += shares.get(unit, 0) > asked.share
            low, high = (1 / r for r in reversed(row.ratio_spread))
            table.add_row(
                f"{unit}{', kernels' if kernels else ''}",
                *[f"{shares[u]:.2f}" for u in UNITS],
                f"{report.output_error.estimate:.3f}",
                f"{1 / row.ratio:.2f} ({low:.2f} to {high:.2f})",
                f"{took:.0f}",
            )
    if red:
        print(f"red: {red} budgets were not kept", file=sys.stderr)
        return 1
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
