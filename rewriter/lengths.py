"""A rewritten recurrence is run at several lengths, some of them no multiple of any chunk: what is right at one may be wrong at another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from rewriter.backend import Runner
from rewriter.calibrate import Feeds
from rewriter.errors import RewriteError
from rewriter.graph import Graph
from rewriter.inputs import InputSpec, dim_names
from rewriter.latency import feeds_at
from rewriter.verify import ratio

LENGTHS = (1, 7, 64, 129)


def check_lengths(
    reference: Callable[[Feeds], Mapping[str, Tensor]],
    rewritten: Runner,
    graph: Graph,
    specs: Sequence[InputSpec],
    explicit: Mapping[str, int],
    allowed: float | None,
) -> str:
    """What was compared, for the report. RewriteError where the rewritten model fails, or (exact rewrites) differs by more than allowed."""
    if not dim_names(specs):
        return "recurrences: the model has one length, at which the certificate holds"
    errors: dict[int, float] = {}
    failures: list[str] = []
    for length in LENGTHS:
        feeds = feeds_at(graph, specs, explicit, length)
        if isinstance(feeds, str):
            failures.append(f"{length}: {feeds}")
            continue
        try:
            dense = reference(feeds)
        except RewriteError as problem:
            failures.append(f"the model as given fails at {length}: {problem}")
            continue
        if not all(bool(y.isfinite().all()) for y in dense.values() if y.is_floating_point()):
            failures.append(f"the model as given overflows at {length} on invented inputs")
            continue
        other = rewritten(feeds)
        errors[length] = max(_error(dense[name], other[name]) for name in dense if dense[name].is_floating_point())
        if allowed is not None and not errors[length] <= allowed:
            text = f"the rewritten recurrence is off by {errors[length]:.3g} at {length} tokens, {allowed:.1g} is allowed"
            raise RewriteError(f"{text}; nothing was written: leave it out with --exclude, and report it")
    said = ", ".join(f"{error:.1e} at {length}" for length, error in errors.items())
    return "; ".join([f"recurrences: relative error against the model as given {said} tokens", *failures])


def _error(dense: Tensor, other: Tensor) -> float:
    a, b = dense.double(), other.double()
    return ratio(float((a - b).square().sum()), float(a.square().sum()))
