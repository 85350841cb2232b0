"""The certificate: how far the rewritten model's outputs are from the dense ones, on which inputs, with an interval.

Samples are dealt into R replications; each gives e_r = |y' - y| / |y| over its samples (L2), and the report says mean(e) +- t_{(1+c)/2,
R-1} sd(e)/sqrt(R) (Student-t over replications; Hickernell, Jiang, Liu, Owen 2014 for replicated (quasi) Monte Carlo). It holds for its
input law and no other.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rewriter.calibrate import Feeds, Samples, padding_mask
from rewriter.errors import RewriteError
from rewriter.report import OutputError

REPLICATIONS = 16
CONFIDENCE = 0.95
Run = Callable[[Feeds], Mapping[str, Tensor]]
_METRIC = "MODULE:FUNCTION(dense, rewritten, feeds) -> float"
Metric = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Feeds], float]


@dataclass
class _Tally:
    """Per sample of one output: squared error and squared norm; cosines of rows."""

    lost: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)

    def add(self, dense: Tensor, other: Tensor, mask: Tensor | None) -> None:
        for i in range(dense.shape[0] if dense.dim() else 1):
            a, b = (dense[i], other[i]) if dense.dim() else (dense, other)
            if mask is not None and a.dim() >= 2 and a.shape[0] == mask.shape[1]:
                a, b = a[mask[i]], b[mask[i]]
            a, b = a.double(), b.double()
            self.lost.append(float(((a - b) ** 2).sum()))
            self.norm.append(float((a**2).sum()))
            if a.dim() and a.shape[-1] > 1:
                self.cosines.append(float(torch.nn.functional.cosine_similarity(a, b, -1).mean()))


def certify(
    reference: Run, rewritten: Run, samples: Samples, bound: float | None = None, metric: tuple[str, Metric] | None = None
) -> OutputError:
    """The certificate of the worst float output; RewriteError where shapes differ or nothing can be compared."""
    tallies: dict[str, _Tally] = {}
    scores: list[float] = []
    for batch in samples.batches:
        mask, dense, other = padding_mask(batch), reference(batch), rewritten(batch)
        for name, value in dense.items():
            if other[name].shape != value.shape:
                raise RewriteError(
                    f"output '{name}' changed its shape: {list(value.shape)} became {list(other[name].shape)}; the rewrite is wrong"
                )
            if value.is_floating_point():
                tallies.setdefault(name, _Tally()).add(value, other[name], mask if value.dim() >= 3 else None)
        if metric is not None:
            scores.append(_score(metric, dense, other, batch))
    if not tallies:
        raise RewriteError("the model has no float output to compare")
    found = [_certificate(name, tally, samples, bound) for name, tally in tallies.items()]
    worst = max(found, key=lambda c: c.upper if not math.isnan(c.upper) else math.inf)
    if metric is None:
        return worst
    estimate, half = student_t(scores)
    return replace(worst, metric={"name": metric[0], "estimate": estimate, "half_width": half})


def load_metric(name: str | None) -> tuple[str, Metric] | None:
    """--metric MODULE:FUNCTION with its name; RewriteError where it cannot be imported."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found: Metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewriteError(f"--metric {name} cannot be imported: {error}; give {_METRIC}") from error
    return name, found


def _score(metric: tuple[str, Metric], dense: Mapping[str, Tensor], other: Mapping[str, Tensor], batch: Feeds) -> float:
    try:
        return float(metric[1](dense, other, batch))
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise RewriteError(f"--metric {metric[0]} failed ({said}); give {_METRIC}") from error


def _certificate(name: str, tally: _Tally, samples: Samples, bound: float | None) -> OutputError:
    count = len(tally.lost)
    deal = min(REPLICATIONS, count)
    lost = torch.tensor(tally.lost, dtype=torch.float64)
    norm = torch.tensor(tally.norm, dtype=torch.float64)
    errors = [ratio(float(lost[r::deal].sum()), float(norm[r::deal].sum())) for r in range(deal)]
    estimate, half = student_t(errors)
    each = torch.tensor([ratio(a, b) for a, b in zip(tally.lost, tally.norm, strict=True)], dtype=torch.float64)
    cosine = sum(tally.cosines) / len(tally.cosines) if tally.cosines else None
    return OutputError(
        norm="relative_l2",
        output=name,
        estimate=estimate,
        half_width=half,
        confidence=CONFIDENCE,
        p99=float(each.quantile(0.99).nan_to_num(math.inf)),
        max=float(each.max()),
        cosine=cosine,
        law=samples.law,
        samples=count,
        bound=bound,
        replications=deal,
    )


def ratio(lost: float, norm: float) -> float:
    """sqrt(lost / norm): 0 for equal zeros, inf where something became of nothing or of NaN."""
    if lost == 0:
        return 0.0
    return math.sqrt(lost / norm) if norm > 0 and math.isfinite(lost) else math.inf


def student_t(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Mean and half width of the t interval; a single one has no interval (inf) unless it is exact; inf or NaN among them: inf."""
    from scipy import special

    n = len(values)
    mean = sum(values) / n
    if not math.isfinite(mean):
        return math.inf, math.inf
    if n == 1:
        return mean, 0.0 if mean == 0 else math.inf
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, float(special.stdtrit(n - 1, (1 + confidence) / 2)) * spread / math.sqrt(n)
