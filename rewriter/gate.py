"""What an emitted model must hold before it is published: (exit code, why) where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rewriter.algebra import ByTokens
from rewriter.errors import RewriteError
from rewriter.job import Job
from rewriter.latency import grew
from rewriter.operator import AbstractMap
from rewriter.report import Latency, OutputError
from rewriter.tolerances import EQUAL

MAP_TEXT = 64 << 10  # bytes of nodes


def refused(job: Job, error: OutputError) -> tuple[int, str] | None:
    """An exact rewrite whose output moved is a fault; a bound that the emitted model exceeds is exit 3."""
    bound = job.options.max_error
    if bound is not None and error.upper > bound:
        return 3, f"the emitted model's error {error.upper:.3g} exceeds --max-error {bound}; nothing was written"
    if not job.lossy:
        allowed = tolerance(job)
        if not error.estimate <= allowed:
            raise RewriteError(f"an exact rewrite moved the output by {error.estimate:.3g}, {allowed:.1g} is allowed; nothing was written")
    return None


def _bought(job: Job) -> int:
    """Bytes that maps and second forms add for the sake of time: stored tensors, and the text of their forms."""
    bought = [d for d in job.decisions.values() if isinstance(d.operator, AbstractMap | ByTokens)]
    return sum(max(0, d.after.nbytes - d.before.nbytes) + MAP_TEXT for d in bought)


def tolerance(job: Job) -> float:
    """Of an exact rewrite's output."""
    dtypes = [d.site.dtype for d in job.decisions.values() if d.site.dtype in EQUAL]
    return 10 * max((EQUAL[d][0] for d in dtypes if d is not None), default=1e-4)


def not_smaller(rows: Sequence[Latency], nbytes: Mapping[str, int | None], job: Job, stored: int) -> tuple[int, str] | None:
    """An output that is larger or slower than the dense model is not written without --force."""
    if job.options.force or not job.rewritten:
        return None
    dense, now = nbytes["dense"], nbytes["rewritten"]
    # the report that travels in the model is no weight, and what a map or a second form stores to save time stands beside its site
    if dense is not None and now is not None and now - stored - _bought(job) > dense:
        return 1, f"the output grew from {dense:,} to {now:,} bytes; nothing was written (--force writes it all the same)"
    if grew(rows):
        said = ", ".join(f"{r.ratio:.2f}x at T={r.tokens}" for r in rows if r.ratio is not None)
        return 1, f"the rewritten model is slower than dense ({said}); nothing was written (--force writes it all the same)"
    return None
