"""Whole-model latency: dense, dense int8 and rewritten, interleaved in one process, with ratios of paired samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rewriter.backend import Runner, Target
from rewriter.caches import Change, fitted
from rewriter.errors import RewriteError
from rewriter.graph import Graph
from rewriter.inputs import InputSpec, dim_names
from rewriter.report import Latency
from rewriter.sampling import invented

SECONDS = 1.5  # for each model at each token count
Batch = Mapping[str, Tensor] | str  # or why there can be none


def token_sizes(specs: Sequence[InputSpec], explicit: Mapping[str, int], tokens: int) -> dict[str, int]:
    """Sizes that bring `tokens` rows: batch 1 and every other dynamic dimension T, unless --dim says otherwise."""
    names = dim_names(specs)
    batch = {spec.dims[0] for spec in specs if spec.dims and isinstance(spec.dims[0], str)}
    lengths = [n for n in names if n not in batch]
    sizes = {n: 1 if n in batch and lengths else tokens for n in names}
    return {**sizes, **{n: 0 for n in names if n == "past"}, **explicit}


@dataclass(frozen=True)
class Reference:
    """The dense model as a target runs it, and its int8 form, or why there is none."""

    dense: Runner
    int8: Runner | None
    note: str
    threads: int

    @classmethod
    def of(cls, target: Target, dense: Path, threads: int) -> Reference:
        """From the dense model's file."""
        runner = target.open(dense, threads)
        try:
            return cls(runner, target.open_int8(dense, threads), "", threads)
        except RewriteError as error:
            return cls(runner, None, f"no int8 figure: {error}", threads)


def latencies(
    reference: Reference, rewritten: Runner, feeds: Sequence[Batch], tokens: Sequence[int], resized: Sequence[Change] = ()
) -> list[Latency]:
    """One row for each token count and its batch; what could not be had is None, with a note. Caches of other sizes are as long."""
    specs = [change.after for change in resized]
    return [_row(reference, rewritten, batch, count, specs) for batch, count in zip(feeds, tokens, strict=True)]


def batches(graph: Graph, specs: Sequence[InputSpec], explicit: Mapping[str, int], tokens: Sequence[int]) -> list[Batch]:
    """One batch of so many tokens for each count."""
    return [feeds_at(graph, specs, explicit, count) for count in tokens]


def feeds_at(graph: Graph, specs: Sequence[InputSpec], explicit: Mapping[str, int], tokens: int) -> Batch:
    """One of `tokens` tokens."""
    sizes = token_sizes(specs, explicit, tokens)
    first = next((spec.dims[0] for spec in specs if spec.dims), 1)
    rows = first if isinstance(first, int) else sizes[first]
    try:
        return next(iter(invented(graph, specs, sizes, max(rows, 1), seed=0, batch=max(rows, 1)).batches))
    except RewriteError as error:
        return str(error)


def _row(reference: Reference, rewritten: Runner, feeds: Batch, tokens: int, resized: Sequence[InputSpec]) -> Latency:
    from rewriter.timing import interleave

    int8, empty = reference.int8, Latency(tokens, reference.threads, None, None, None, None, None)
    if isinstance(feeds, str):
        return Latency(**{**vars(empty), "note": feeds})
    runners, own = [reference.dense, rewritten, *([int8] if int8 else [])], fitted(feeds, resized, drawn=True)
    calls: list[Callable[[], object]] = [lambda r=r: r(own if r is rewritten else feeds) for r in runners]  # type: ignore[misc]
    try:
        timing = interleave(calls, seconds=SECONDS, again=True)
    except Exception as error:  # a model that does not take this length is no reason to lose the run
        return Latency(**{**vars(empty), "note": f"not measured at {tokens} tokens: {str(error).splitlines()[0][:160]}"})
    low, middle, high = timing.ratio(0, 1)
    return Latency(
        tokens=tokens,
        threads=reference.threads,
        dense_seconds=timing.seconds(0),
        int8_seconds=timing.seconds(2) if int8 else None,
        rewritten_seconds=timing.seconds(1),
        ratio=middle,
        int8_ratio=timing.ratio(2, 1)[1] if int8 else None,
        note=reference.note,
        ratio_spread=[low, high],
    )


def grew(rows: Sequence[Latency]) -> bool:
    """Whether the rewritten model is slower at a token count that was asked for, beyond the spread of the measurement."""
    return any(r.ratio < 0.97 and r.ratio_spread[1] < 1 for r in rows if r.ratio is not None and r.ratio_spread is not None)
