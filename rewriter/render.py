"""Reports as text: every site, what it became or why it stayed, what was measured, and the outcome in the last line.

Lines are laid out here and printed by rich, which gives colour to a terminal and nothing to a pipe; there the width is COLUMNS or 120.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from rewriter.table import change, clean, columns, count, fold, middle, nbytes, number

if TYPE_CHECKING:
    from rewriter.compare import Comparison
    from rewriter.pipeline import Result
    from rewriter.report import Beside, Latency, OutputError, Report, SiteRow

WIDTH = 120
EACH = 8  # sites that are kept for like reasons are listed one by one up to here
UNITS = (("params", "params"), ("flops", "FLOP"), ("nbytes", "bytes"))


class _Console(Console):
    """rich ends the program with code 1 when the reader leaves; whoever prints decides that."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(stream: IO[str] | None = None) -> Console:
    """Plain and stable unless the stream is a terminal."""
    out = stream or sys.stdout
    if out.isatty():
        return _Console(file=out, highlight=False, markup=False, emoji=False)
    given = os.environ.get("COLUMNS", "")
    width = int(given) if given.isdigit() and int(given) >= 40 else WIDTH
    return _Console(file=out, width=width, color_system=None, force_terminal=False, highlight=False, markup=False, emoji=False)


def show_result(result: Result, quiet: bool, stream: IO[str] | None = None) -> None:
    """The report and, as the last line, what happened."""
    out = console(stream)
    if not quiet:
        print_lines(out, [*report_lines(result.report, out.width, result.exit_code == 0), ""])
    style = "bold green" if result.exit_code == 0 else "bold yellow"
    out.print(Text(clean(result.message), style), soft_wrap=True)


def show_verification(error: OutputError, code: int, quiet: bool, stream: IO[str] | None = None) -> None:
    """The certificate of `rewrite verify`."""
    out = console(stream)
    if not quiet:
        print_lines(out, [*error_lines(error, out.width), ""])
    bound = "" if error.bound is None else f", {'within' if code == 0 else 'above'} --max-error {error.bound:g}"
    out.print(Text(f"relative error at most {number(error.upper)} at {error.confidence:.0%} confidence{bound}", "bold"), soft_wrap=True)


def show_comparison(found: Comparison, quiet: bool, stream: IO[str] | None = None) -> None:
    """The tables of `rewrite bench`; A is dense, each B rewritten."""
    out = console(stream)
    several = len(found.contenders) > 1
    for contender in found.contenders:
        head = [Text(clean(contender.name), "bold")] if several else []
        error = [*error_lines(contender.error, out.width), ""] if contender.error else []
        if not quiet:
            print_lines(out, [*head, *latency_lines(contender.rows, out.width), "", *error])
    for contender in found.contenders:
        name = clean(contender.name) if several else "B"
        out.print(Text(f"{name} against A: " + (_speeds(contender.rows) or "nothing could be measured"), "bold"), soft_wrap=True)


def show_adapters(written: Sequence[Any], quiet: bool, stream: IO[str] | None = None) -> None:
    """What `rewrite adapters` wrote: each file, what it holds, how near a session with it is."""
    out = console(stream)
    for file in written if not quiet else ():
        print_lines(out, fold(f"{clean(str(file.path))}: {clean(file.said)}; off by {number(file.error)}", out.width, "", "    "))
    base, *others = written
    many = f"{len(others)} adapter{'s' if len(others) > 1 else ''}"
    out.print(Text(f"{clean(str(base.path))} with {many} beside it, each run and compared", "bold green"), soft_wrap=True)


def print_lines(out: Console, lines: Iterable[str | Text]) -> None:
    for line in lines:
        out.print(line if isinstance(line, Text) else Text(line), soft_wrap=True)


def report_lines(report: Report, width: int, done: bool = True) -> list[str | Text]:
    """A whole report but for its outcome; `done`: whether the model was written."""
    lines: list[str | Text] = [*_head(report, width), ""]
    changed = [row for row in report.sites if row.status != "kept"]
    if changed:
        lines += [*site_lines(changed, width, done), ""]
    kept = [row for row in report.sites if row.status == "kept"]
    if kept:
        lines += [*kept_lines(kept, width), ""]
    lines += total_lines(report, width, done)
    if report.output_error is not None:
        lines += ["", *error_lines(report.output_error, width)]
    if report.latency:
        lines += ["", *latency_lines(report.latency, width)]
    if report.notes:
        lines += ["", Text("notes", "bold"), *(line for note in report.notes for line in fold(clean(note), width, "  ", "    "))]
    return lines


def _head(report: Report, width: int) -> list[str | Text]:
    path = report.model["path"] or "a model in memory"
    given = f"{clean(str(path))} ({report.model['format']}"
    size = report.nbytes.get("dense")
    given += f", {nbytes(size)})" if size is not None else ")"
    took = f"{report.seconds:.1f} s" if math.isfinite(report.seconds) else "unknown"
    return [
        *fold(f"{given} for {report.target}", width, "model   ", "        "),
        *fold(f"{', '.join(map(clean, report.passes))}; seed {report.seed}; took {took}", width, "passes  ", "        "),
    ]


def site_lines(rows: Sequence[SiteRow], width: int, done: bool) -> list[str | Text]:
    """Sites that change: figures, then the reason; neighbours with one reason share it. Below 100 columns names have their own line."""
    planned = any(row.status == "planned" for row in rows)
    verb = "would become" if planned else "became" if done else "would have become"
    titles = ["site", "kind", "shape", verb, "params", "FLOP per token", "error"]
    cells = [[clean(r.name), r.kind, _shape(r), _becomes(r), *_costs(r), _error(r)] for r in rows]
    if width >= 100:
        head, body = columns(titles, cells, width, [(0, 40), (3, 16), (0, 24)])
    else:
        head, body = columns(titles[2:], [row[2:] for row in cells], width - 2, [(1, 16)])
        head = ["site", *(f"  {line}" for line in head)]
        body = [[middle(f"{row[0]} ({row[1]})", width), *(f"  {line}" for line in block)] for row, block in zip(cells, body, strict=True)]
    lines: list[str | Text] = [Text(line, "bold") for line in head]
    for reason, group in groupby(zip(rows, body, strict=True), key=lambda pair: pair[0].reason):
        members = list(group)
        lines += [line for _, block in members for line in block]
        lead = f"{len(members)} alike: " if len(members) > 1 else ""
        lines += [Text(line, "dim") for line in fold(lead + clean(reason), width, "    ", "    ")]
    return lines


def kept_lines(rows: Sequence[SiteRow], width: int) -> list[str | Text]:
    """Sites that stay, grouped by reason; reasons that differ in their numbers alone are listed up to EACH, then told by example."""
    alike: dict[tuple[str, str], list[SiteRow]] = {}
    for row in rows:
        alike.setdefault((row.kind, re.sub(r"\d+(\.\d+)?", "#", row.reason)), []).append(row)
    lines: list[str | Text] = [Text("kept as they were", "bold")]
    for (kind, _), group in alike.items():
        by_reason: dict[str, list[SiteRow]] = {}
        for row in group:
            by_reason.setdefault(row.reason, []).append(row)
        if len(by_reason) > EACH:
            first = group[0]
            said = f"{len(group)} {kind} sites with other figures each, such as {clean(first.name)}: {clean(first.reason)}"
            lines += [*fold(said, width, "  ", "    "), *_names(group[1:], width)]
            continue
        for reason, members in by_reason.items():
            if len(members) == 1:
                lines += fold(f"{clean(members[0].name)} ({kind}): {clean(reason)}", width, "  ", "    ")
            else:
                lines += [*fold(f"{len(members)} {kind} sites: {clean(reason)}", width, "  ", "    "), *_names(members, width)]
    return lines


def _names(rows: Sequence[SiteRow], width: int) -> list[Text]:
    shown = ", ".join(middle(clean(row.name), max(20, width // 2)) for row in rows[:EACH])
    more = f" and {len(rows) - EACH} more (--report lists all)" if len(rows) > EACH else ""
    return [Text(line, "dim") for line in fold(shown + more, width, "      ", "      ")]


def total_lines(report: Report, width: int, done: bool) -> list[str | Text]:
    """Sums over all sites, and the files' sizes."""
    from rewriter.report import totals

    before, after = totals(report.sites)
    planned = any(row.status == "planned" for row in report.sites)
    count, all_ = report.matched["rewritten"], report.matched["sites"]
    said = f"matched {count} of {all_} sites{' (planned)' if planned else '' if done else ' (not written)'}: "
    said += ", ".join(f"{title} {change(before.of(unit), after.of(unit), unit)}" for unit, title in UNITS)
    dense, now = report.nbytes.get("dense"), report.nbytes.get("rewritten")
    if dense is not None and now is not None:
        said += f"; model file {change(dense, now, 'nbytes')}"
    explained = "Figures are sums over the sites; FLOP: 2 per multiply-add, per token, as executed on the target; biases left out."
    return [*fold(said, width, "", "    "), *(Text(line, "dim") for line in fold(explained, width, "    ", "    "))]


def error_lines(error: OutputError, width: int) -> list[str | Text]:
    """The certificate: figure, interval, tail, law."""
    interval = f" +- {number(error.half_width)}" if math.isfinite(error.half_width) else ", no interval"
    norm = "relative L2" if error.norm == "relative_l2" else clean(error.norm)
    said = f"{norm} error {number(error.estimate)}{interval} ({error.confidence:.0%}, Student-t over {_replications(error)})"
    said += f", p99 {number(error.p99)}, max {number(error.max)}"
    said += f", cosine {error.cosine:.4f}" if error.cosine is not None else ""
    said += f"; bound {error.bound:g}" if error.bound is not None else "; no bound was asked"
    lines: list[str | Text] = [*fold(f"worst output '{clean(error.output)}': {said}", width, "error   ", "        ")]
    lines += fold(f"on {error.samples} samples, {clean(error.law)}; it holds for such inputs", width, "        ", "        ")
    if error.precision is not None and not error.reached:
        lines += fold(_missed(error), width, "        ", "        ")
    if error.metric is not None:
        figures = [error.metric["estimate"], error.metric["half_width"]]
        estimate, half = (number(f) if f is not None else "unknown" for f in figures)
        lines += fold(f"{clean(str(error.metric['name']))}: {estimate} +- {half}", width, "        ", "        ")
    if error.beside is not None:
        lines += fold(_beside(error.beside), width, "beside  ", "        ")
    return lines


def _replications(error: OutputError | Beside) -> str:
    each = error.samples / max(error.replications, 1)
    return f"{error.replications} replications of {'' if each.is_integer() else 'about '}{each:.0f}"


def _missed(error: OutputError) -> str:
    """Why the interval is wider than it was asked to be, and what makes it narrower."""
    way = "--samples draws more" if "invented" in error.law else "these are all held-out samples; give more --data"
    return f"a half-width of {error.precision:.2g} of the error was not reached: {way}"


def _beside(other: Beside) -> str:
    """The figure under the second law."""
    if other.estimate is None:
        return f"no figure on inputs that are {clean(other.law)}: {clean(other.note)}"
    half = ", no interval" if other.half_width is None else f" +- {number(other.half_width)}"
    tail = ", ".join(f"{name} {number(value)}" for name, value in (("p99", other.p99), ("max", other.max)) if value is not None)
    return f"{number(other.estimate)}{half} ({_replications(other)}), {tail}, on inputs that are {clean(other.law)}"


def latency_lines(rows: Sequence[Latency], width: int) -> list[str | Text]:
    """Dense, dense int8 and rewritten, with ratios; what could not be had is a dash, and its note stands below."""
    threads = rows[0].threads if rows else 1
    lines: list[str | Text] = [Text(f"latency of the whole model, medians, {threads} thread{'s' if threads > 1 else ''}", "bold")]
    foretold = ["predicted"] if any(r.predicted_seconds is not None for r in rows) else []
    titles = ["tokens", "dense", "dense int8", *foretold, "rewritten", "dense / rewritten", "int8 / rewritten"]
    known = [(r.dense_seconds, r.int8_seconds, *([r.predicted_seconds] if foretold else []), r.rewritten_seconds) for r in rows]
    seconds = [map(_seconds, figures) for figures in known]
    cells = [[str(r.tokens), *figures, _spread(r), _times(r.int8_ratio)] for r, figures in zip(rows, seconds, strict=True)]
    head, body = columns(titles, cells, width - 2)
    lines += [f"  {line}" for line in head] + [f"  {line}" for block in body for line in block]
    notes = dict.fromkeys(r.note for r in rows if r.note)
    return [*lines, *(line for note in notes for line in fold(clean(note), width, "  - ", "    "))]


def _becomes(row: SiteRow) -> str:
    return clean(row.structure or "part of another")


def _costs(row: SiteRow) -> list[str]:
    return [f"{count(row.cost[unit]['before'])} -> {count(row.cost[unit]['after'])}" for unit in ("params", "flops")]


def _shape(row: SiteRow) -> str:
    return "x".join(map(str, row.shape)) if row.shape else "-"


def _error(row: SiteRow) -> str:
    return "exact" if row.exact else "-" if row.error is None else number(row.error)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _spread(row: Latency) -> str:
    spread: Any = row.ratio_spread
    return _times(row.ratio) + (f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread and None not in spread and row.ratio is not None else "")


def _speeds(rows: Sequence[Latency]) -> str:
    return ", ".join(f"{r.ratio:.2f}x as fast at {r.tokens} token{'s' if r.tokens > 1 else ''}" for r in rows if r.ratio is not None)
