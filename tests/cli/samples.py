"""A report that has everything: fitted, exact, kept for one reason, kept for reasons that differ in figures, figures that are missing."""

from __future__ import annotations

import dataclasses
import math

from rewriter.compare import Comparison, Contender
from rewriter.report import Beside, Latency, OutputError, Report, SiteRow


def cost(before: int, after: int) -> dict[str, dict[str, int]]:
    return {"params": _pair(before, after), "flops": _pair(2 * before, 2 * after), "nbytes": _pair(4 * before, 4 * after)}


def _pair(before: int, after: int) -> dict[str, int]:
    return {"before": before, "after": after}


def linear(name: str, status: str, structure: str | None, reason: str, error: float | None, after: int, exact: bool = False) -> SiteRow:
    return SiteRow(name, "linear", [1536, 384], "float32", status, structure, exact, reason, error, cost(589824, after))


def full_report(status: str = "rewritten") -> Report:
    sites = []
    for i in range(2):
        reason = "least weighted error of 6 forms at 50% of params; 2.1x dense at 256 tokens"
        sites.append(linear(f"encoder.layer.{i}.intermediate.dense", status, "low-rank:rank=154", reason, 0.0431, 295680))
    spelled = "monarch:blocks=4:rows=4:rank=12"
    reason = f"the weight is exactly {spelled}: 92,160 numbers instead of 589,824"
    sites.append(linear("encoder.layer.0.attention.output.dense_with_a_long_name.projection", status, spelled, reason, None, 92160, True))
    for i in range(3):
        reason = f"low-rank would be {1.1 + i / 10:.1f}x slower at 1 token"
        sites.append(linear(f"encoder.layer.{i}.output.dense", "kept", None, reason, None, 589824))
    for i in range(12):
        name, reason = f"encoder.layer.{i}.attention", "no pass for it yet"
        sites.append(SiteRow(name, "attention", None, None, "kept", None, False, reason, None, cost(0, 0)))
    return Report(
        model={"path": "m.pt2", "sha256": "ab" * 32, "format": "pt2"},
        passes=["auto:params=0.5", "pre-merge"],
        target="onnxruntime",
        seed=0,
        matched={"sites": len(sites), "rewritten": 3},
        sites=sites,
        output_error=OutputError(
            norm="relative_l2", output="last_hidden_state", estimate=0.21, half_width=0.01, confidence=0.95, p99=0.33, max=0.4,
            cosine=0.97, law="data: cal.npz", samples=2048, bound=0.25, replications=16,
            metric={"name": "tasks:accuracy", "estimate": 0.91, "half_width": 0.02}, precision=0.01, reached=False,
            beside=Beside("invented: uniform token ids below 99; scrambled Sobol' points", 0.31, 0.02, 0.5, 0.6, 64, 16),
        ),
        latency=[
            Latency(1, 1, 0.002, 0.0011, 0.0014, 1.43, 0.79, "", [1.31, 1.52]),
            Latency(256, 1, 0.02, None, 0.011, 1.8, None, "no int8 figure: onnxruntime cannot quantise this model", [1.7, 1.9]),
        ],
        versions={"rewriter": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.32.0"},
        seconds=41.0,
        recipe={"budget": "params=0.5", "tokens": "1,256"},
        notes=["torch 2.12.1 is installed; tested with torch 2.13, other versions may behave differently"],
        nbytes={"dense": 44_000_000, "rewritten": 39_800_000},
    )  # fmt: skip


def unbounded() -> OutputError:
    """One sample: no interval."""
    return OutputError("relative_l2", "y", 0.1, math.inf, 0.95, 0.1, 0.1, None, "data: one.npz", 1, None, 1)


def comparison(*names: str) -> Comparison:
    """Models that get slower and better from the first to the last, and the dense one's int8."""
    report = full_report()
    assert report.output_error is not None
    found = []
    for i, name in enumerate(names):
        rows = (
            [dataclasses.replace(row, ratio=(row.ratio or 0) / (1 + i), predicted_seconds=0.0015) for row in report.latency]
            if i
            else report.latency
        )
        found.append(Contender(name, rows, dataclasses.replace(report.output_error, estimate=0.21 / (1 + i))))
    return Comparison(found, dataclasses.replace(report.output_error, estimate=0.5))
