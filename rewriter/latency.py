"""Whole-model latency: dense, dense int8 and rewritten, interleaved in one process, with ratios of paired samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rewriter.backend import Runner, Target
from rewriter.errors import RewriteError
from rewriter.graph import Graph
from rewriter.inputs import InputSpec, dim_names
from rewriter.report import Latency
from rewriter.sampling import invented

SECONDS = 1.5  # for each model at each token count


def token_sizes(specs: Sequence[InputSpec], explicit: Mapping[str, int], tokens: int) -> dict[str, int]:
    """Sizes that bring `tokens` rows: batch 1 and every other dynamic dimension T, unless --dim says otherwise."""
    names = dim_names(specs)
    batch = {spec.dims[0] for spec in specs if spec.dims and isinstance(spec.dims[0], str)}
    lengths = [n for n in names if n not in batch]
    sizes = {n: 1 if n in batch and lengths else tokens for n in names}
    return {**sizes, **{n: 0 for n in names if n == "past"}, **explicit}


def latencies(
    target: Target,
    dense: Path,
    rewritten: Path,
    graph: Graph,
    specs: Sequence[InputSpec],
    explicit: Mapping[str, int],
    tokens: Sequence[int],
    threads: int,
) -> list[Latency]:
    """One row for each token count; what could not be had is None, with a note."""
    before, after = target.open(dense, threads), target.open(rewritten, threads)
    int8: Runner | None = None
    note = ""
    try:
        int8 = target.open_int8(dense, threads)
    except RewriteError as error:
        note = f"no int8 figure: {error}"
    return [_row(before, int8, after, feeds_at(graph, specs, explicit, count), count, threads, note) for count in tokens]


def feeds_at(graph: Graph, specs: Sequence[InputSpec], explicit: Mapping[str, int], tokens: int) -> Mapping[str, Tensor] | str:
    """One batch of `tokens` tokens, or why there can be none."""
    sizes = token_sizes(specs, explicit, tokens)
    first = next((spec.dims[0] for spec in specs if spec.dims), 1)
    rows = first if isinstance(first, int) else sizes[first]
    try:
        return next(iter(invented(graph, specs, sizes, max(rows, 1), seed=0, batch=max(rows, 1)).batches))
    except RewriteError as error:
        return str(error)


def _row(
    dense: Runner, int8: Runner | None, rewritten: Runner, feeds: Mapping[str, Tensor] | str, tokens: int, threads: int, note: str
) -> Latency:
    from rewriter.timing import interleave

    empty = Latency(tokens, threads, None, None, None, None, None)
    if isinstance(feeds, str):
        return Latency(**{**vars(empty), "note": feeds})
    runners = [dense, rewritten, *([int8] if int8 else [])]
    calls: list[Callable[[], object]] = [lambda r=r: r(feeds) for r in runners]  # type: ignore[misc]
    try:
        timing = interleave(calls, seconds=SECONDS)
    except Exception as error:  # a model that does not take this length is no reason to lose the run
        return Latency(**{**vars(empty), "note": f"not measured at {tokens} tokens: {str(error).splitlines()[0][:160]}"})
    low, middle, high = timing.ratio(0, 1)
    return Latency(
        tokens=tokens,
        threads=threads,
        dense_seconds=timing.seconds(0),
        int8_seconds=timing.seconds(2) if int8 else None,
        rewritten_seconds=timing.seconds(1),
        ratio=middle,
        int8_ratio=timing.ratio(2, 1)[1] if int8 else None,
        note=note,
        ratio_spread=[low, high],
    )


def grew(rows: Sequence[Latency]) -> bool:
    """Whether the rewritten model is slower at a token count that was asked for, beyond the spread of the measurement."""
    return any(r.ratio < 0.97 and r.ratio_spread[1] < 1 for r in rows if r.ratio is not None and r.ratio_spread is not None)
