"""Error against time, as a picture: one panel for each token count, a point for each model, the frontier through those that none beats.

The dense model has no error; its time is the dashed line. Bars: the 10th and 90th percentile of paired times, the certificate's interval.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter.cache import write_atomically
from rewriter.compare import Comparison
from rewriter.errors import RewriteError
from rewriter.report import OutputError

SUFFIXES = (".png", ".svg")
INCHES = 4.5  # of a panel's side


@dataclass(frozen=True)
class Point:
    """A model at one token count; milliseconds with their spread, the relative error with its half width."""

    name: str
    ms: float
    low: float
    high: float
    error: float
    half_width: float


def check_plot(path: str | None) -> None:
    """RewriteError unless a picture can be drawn there: before the work begins."""
    if path is None:
        return
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise RewriteError(f"--plot {path} has no known suffix; give a file that ends in {' or '.join(SUFFIXES)}")
    if file.is_dir() or not file.parent.is_dir():
        raise RewriteError(f"--plot {path} cannot be written; give a file in a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise RewriteError("--plot needs matplotlib; pip install 'rewriter[plot]', or leave --plot out")


def points(found: Comparison, tokens: int) -> tuple[float | None, list[Point]]:
    """The dense model's milliseconds, and a point for each model whose time and error are known. Times are told by their ratio to dense."""
    rows = [(c, row) for c in found.contenders for row in c.rows if row.tokens == tokens and row.dense_seconds and row.ratio]
    if not rows:
        return None, []
    dense = 1e3 * min(row.dense_seconds or 0.0 for _, row in rows)
    made = []
    for contender, row in rows:
        low, high = row.ratio_spread or (row.ratio, row.ratio)
        made += _point(contender.name, dense / (row.ratio or 1), dense / high, dense / low, contender.error)  # type: ignore[operator]
    row = rows[0][1]
    if row.int8_seconds and row.dense_seconds:
        ms = dense * row.int8_seconds / row.dense_seconds
        made += _point("dense int8", ms, ms, ms, found.int8_error)
    return dense, made


def _point(name: str, ms: float, low: float, high: float, error: OutputError | None) -> list[Point]:
    return [] if error is None else [Point(name, ms, min(low, ms), max(high, ms), error.estimate, error.half_width)]


def frontier(given: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both time and error, by rising time."""
    kept: list[Point] = []
    for point in sorted(given, key=lambda p: (p.ms, p.error)):
        if not kept or point.error < kept[-1].error:
            kept.append(point)
    return kept


def draw(found: Comparison, path: Path) -> None:
    """Write the picture; its suffix says the format. The same figures give the same bytes."""
    matplotlib: Any = importlib.import_module("matplotlib")
    figure_module: Any = importlib.import_module("matplotlib.figure")
    counts = list(dict.fromkeys(row.tokens for c in found.contenders for row in c.rows))
    figure = figure_module.Figure(figsize=(INCHES * len(counts), INCHES), layout="constrained")
    for axes, tokens in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        _panel(axes, found, tokens)
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}

    def write(temporary: Path) -> None:
        with matplotlib.rc_context({"svg.hashsalt": "rewriter"}):
            figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150, metadata=metadata)

    write_atomically(path, write)


def _panel(axes: Any, found: Comparison, tokens: int) -> None:
    dense, given = points(found, tokens)
    axes.set_title(f"{tokens} token{'s' if tokens > 1 else ''}")
    axes.set_xlabel("milliseconds, median")
    axes.set_ylabel("relative error of the output")
    if dense is not None:
        axes.axvline(dense, linestyle="--", color="grey", label="dense")
    for p in given:
        bars = {"xerr": [[p.ms - p.low], [p.high - p.ms]], "yerr": [[min(p.half_width, p.error)], [p.half_width]]}
        axes.errorbar(p.ms, p.error, fmt="o", capsize=2, label=p.name, **bars)
    best = frontier(given)
    axes.plot([p.ms for p in best], [p.error for p in best], color="black", linewidth=0.8, zorder=0)
    if given and min(p.error for p in given) > 0:
        axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.legend(fontsize="small")
