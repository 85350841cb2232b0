"""Planted structure: weights that are exactly in a family are found without being told, in torch and in ONNX, and the output stays.

    python tools/bench_planted.py

Target: relative output error at most 1e-5 in float32. `auto` runs without any option.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from planted import PLANTED, Planted
from rich.console import Console
from rich.table import Table

import rewriter
from rewriter.backends.files.export import export_module
from rewriter.backends.files.onnx_file import save_onnx
from rewriter.backends.fx.graph import FxGraph
from rewriter.inputs import parse_input

TARGET = 1e-5
SPEC = "x:float32[batch,31]"


def main() -> int:
    console, red = Console(width=120), 0
    table = Table(title="planted structure, found by `auto` alone")
    for head in ("planted", "input", "target", "found", "params before -> after", "relative output error", "at most 1e-5"):
        table.add_column(head)
    for name, build in PLANTED.items():
        torch.manual_seed(0)
        model = Planted(build()).eval()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "planted.onnx"
            save_onnx(FxGraph.of(export_module(model, [parse_input(SPEC)], {})).to_onnx(20), path)
            for given, inputs, target in ((model, [SPEC], "torch"), (model, [SPEC], "onnxruntime"), (path, None, "onnxruntime")):
                result = rewriter.rewrite(given, passes="auto", inputs=inputs, target=target, timing=False)
                row = next((s for s in result.report.sites if s.status == "rewritten" and s.name == "planted"), None)
                error = result.report.output_error.estimate if result.report.output_error else float("inf")
                good = row is not None and error <= TARGET
                red += not good
                params = "{before:,} -> {after:,}".format(**row.cost["params"]) if row else "-"
                kind = "module" if inputs else "onnx"
                table.add_row(name, kind, target, row.structure if row else "NOT FOUND", params, f"{error:.1e}", "yes" if good else "NO")
    console.print(table)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
