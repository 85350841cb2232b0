"""Architectures: `plan` lists every linear that a model has, counted from its modules, and `rewrite` emits, reloads and verifies it.

    python tools/bench_architectures.py [NAME ...]

Small sizes, random weights, built offline from transformers and torch.nn (the tests' zoo). Each is rewritten by low-rank:params=0.5
for torch and for ONNX Runtime. "yes, k": k sites rewritten, the emitted file reloaded, its certificate finite. "kept": nothing may be
rewritten, and why.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from rewriter import registry
from rewriter.errors import RewriteError
from rewriter.graph import Graph
from rewriter.options import Options
from rewriter.pipeline import rewrite
from tests.files_zoo.zoo import ZOO, count_linears, module, program

TARGETS = ("torch", "onnxruntime")


def listed(graph: Graph) -> tuple[int, str]:
    """Linear sites, and the other kinds with their numbers."""
    kinds = [site.kind for site in registry.sites(graph)]
    others = ", ".join(f"{kinds.count(k)} {k}" for k in sorted(set(kinds) - {"linear"}))
    return kinds.count("linear"), others


def verified(name: str, target: str) -> str:
    """k of n rewritten, or the one line that refuses."""
    spec = tuple(map(str, ZOO[name].specs))
    options = Options(passes="low-rank:params=0.5", target=target, inputs=spec, timing=False, force=True, quiet=True, samples=32)
    try:
        result = rewrite(program(name), options, publish_to_out=False)
    except RewriteError as error:
        return f"NO: {error}"
    error = result.report.output_error
    if result.exit_code == 1 and not result.report.matched["rewritten"]:
        return f"kept: {result.report.sites[0].reason}"
    if result.exit_code or error is None or not math.isfinite(error.upper):
        return f"NO: {result.message}"
    return f"yes, {result.report.matched['rewritten']}"


def main() -> int:
    from rewriter.backends.fx.graph import FxGraph

    console, red = Console(width=120), 0
    table = Table(title="every linear is listed, every rewrite verified")
    for head in ("architecture", "linears in modules", "linears listed", "also listed", *TARGETS):
        table.add_column(head)
    for name in sys.argv[1:] or ZOO:
        count = count_linears(module(name))
        found, others = listed(FxGraph.of(program(name)))
        cells = [verified(name, target) for target in TARGETS]
        red += found < count or any(cell.startswith("NO") for cell in cells)
        table.add_row(name, str(count), str(found), others, *cells)
    console.print(table)
    console.print(f"{len(sys.argv[1:] or ZOO)} architectures, {red} red")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
