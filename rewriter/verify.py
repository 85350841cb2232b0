"""The certificate: how far the rewritten model's outputs are from the dense ones, on which inputs, with an interval.

The error is E = sqrt(sum |y' - y|^2 / sum |y|^2) over all samples. They come in R replications, r of them independent of the others; E_-r
is the error without replication r, and the report says E +- t_{(1+c)/2, R-1} sd(R E - (R - 1) E_-r) / sqrt(R): the jackknife (Tukey 1958)
over replications, as replicated quasi-Monte Carlo has them (Hickernell, Jiang, Liu, Owen 2014). A mean of R ratios, each of few samples,
would be biased and its interval too narrow (tools/bench_certificate.py measures it). It holds for its input law and no other.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rewriter.caches import Change, fitting, follows
from rewriter.calibrate import Feeds, Samples, padding_mask
from rewriter.errors import RewriteError
from rewriter.report import Beside, OutputError
from rewriter.sampling import REPLICATIONS, Replicated

CONFIDENCE = 0.95
GIVEN = -1  # the replication of the user's samples, which are dealt at the end
ELEMENTS = 1 << 20  # of an output that are compared at a time: doubles of a whole batch of logits would be large
PRECISION = 0.05  # half width over estimate, at which invented samples are enough where no other was asked for
Run = Callable[[Feeds], Mapping[str, Tensor]]
_METRIC = "MODULE:FUNCTION(dense, rewritten, feeds) -> float"
Metric = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Feeds], float]


@dataclass
class _Tally:
    """Per sample of one output: squared error, squared norm and replication; cosines of rows."""

    lost: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    replication: list[int] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)

    def add(self, dense: Tensor, other: Tensor, mask: Tensor | None, replication: int) -> None:
        """Samples along axis 0; `mask` (batch, seq) leaves the hidden positions of (batch, seq, ...) out."""
        if not dense.dim():
            dense, other = dense[None], other[None]
        if mask is not None and (dense.dim() < 3 or dense.shape[1] != mask.shape[1]):
            mask = None
        step = max(1, ELEMENTS // max(1, dense[:1].numel()))
        for i in range(0, len(dense), step):
            self._add(dense[i : i + step].double(), other[i : i + step].double(), None if mask is None else mask[i : i + step], replication)

    def _add(self, a: Tensor, b: Tensor, mask: Tensor | None, replication: int) -> None:
        real = None if mask is None else mask.reshape(*mask.shape, *[1] * (a.dim() - 2))  # (batch, seq, 1, ...)
        if real is not None:
            a, b = a.where(real, 0), b.where(real, 0)
        self.lost += _by_sample((a - b).square())
        self.norm += _by_sample(a.square())
        self.replication += [replication] * len(a)
        if a.dim() > 1 and a.shape[-1] > 1:
            rows = torch.nn.functional.cosine_similarity(a, b, -1)
            seen = torch.ones_like(rows) if real is None else real[..., 0].expand_as(rows).double()
            self.cosines += [c / n for c, n in zip(_by_sample(rows * seen), _by_sample(seen), strict=True) if n]


def _by_sample(values: Tensor) -> list[float]:
    """Sums over everything but axis 0."""
    sums: list[float] = values.reshape(len(values), values[0].numel()).sum(1).tolist()
    return sums


@dataclass
class _Comparison:
    """Two models side by side on all batches so far."""

    reference: Run
    rewritten: Run
    metric: tuple[str, Metric] | None = None
    resized: Sequence[Change] = ()
    tallies: dict[str, _Tally] = field(default_factory=dict)
    scores: dict[int, list[float]] = field(default_factory=dict)  # of the metric, by replication

    def add(self, batches: Iterable[Feeds], replication: int) -> None:
        for batch in batches:
            mask, dense, other = padding_mask(batch), self.reference(batch), self.rewritten(batch)
            for name, value in dense.items():
                if other[name].shape != value.shape:
                    if follows(value, other[name], self.resized):
                        continue
                    raise RewriteError(
                        f"output '{name}' changed its shape: {list(value.shape)} became {list(other[name].shape)}; the rewrite is wrong"
                    )
                if value.is_floating_point():
                    tally = self.tallies.setdefault(name, _Tally())
                    tally.add(value, other[name], mask if value.dim() >= 3 else None, replication)
            if self.metric is not None:
                self.scores.setdefault(replication, []).append(_score(self.metric, dense, other, batch))
        if not self.tallies:
            raise RewriteError("the model has no float output to compare")

    def found(self, law: str, bound: float | None, output: str | None = None) -> OutputError:
        """The certificate of the worst output, or of the one that is named."""
        names = self.tallies if output is None else [output]
        found = [_certificate(name, self.tallies[name], law, bound) for name in names]
        worst = max(found, key=lambda c: c.upper if not math.isnan(c.upper) else math.inf)
        if self.metric is None:
            return worst
        scores = list(self.scores.values())
        estimate, half = student_t(scores[0] if len(scores) == 1 else [sum(s) / len(s) for s in scores])
        return replace(worst, metric={"name": self.metric[0], "estimate": estimate, "half_width": half})


def certify(
    reference: Run,
    rewritten: Run,
    samples: Samples | Replicated,
    bound: float | None = None,
    metric: tuple[str, Metric] | None = None,
    precision: float | None = None,
    output: str | None = None,
    resized: Sequence[Change] = (),
) -> OutputError:
    """The certificate of the worst float output (or of `output`); RewriteError where shapes differ or nothing can be compared. Outputs of
    caches that the rewritten model has in other sizes are left out.

    Given samples are all used. Replications are doubled until the half width is at most `precision` times the estimate and the bound lies
    outside the interval, or their cap is reached.
    """
    pair = _Comparison(reference, fitting(rewritten, resized), metric, resized)
    if isinstance(samples, Samples):
        pair.add(samples.batches, GIVEN)
        found = pair.found(samples.law, bound, output)
        return replace(found, precision=precision, reached=None if precision is None else _narrow(found, precision))
    asked = PRECISION if precision is None else precision
    start, count = 0, samples.first
    while True:
        for r in range(REPLICATIONS):
            pair.add(samples.draw(r, start, count - start), r)
        found = pair.found(samples.law, bound, output)
        settled = not math.isfinite(found.estimate) or (_narrow(found, asked) and not _undecided(found))
        if settled or 2 * count * REPLICATIONS > samples.cap:
            return replace(found, precision=asked, reached=_narrow(found, asked))
        start, count = count, 2 * count


def _narrow(found: OutputError, precision: float) -> bool:
    return math.isfinite(found.half_width) and found.half_width <= precision * found.estimate


def _undecided(found: OutputError) -> bool:
    """Whether the bound lies inside the interval, so that more samples may tell on which side the error is."""
    return found.bound is not None and found.estimate - found.half_width <= found.bound < found.upper


def beside(reference: Run, rewritten: Run, samples: Replicated, output: str, resized: Sequence[Change] = ()) -> Beside:
    """The same output's error on invented inputs, from the first round alone; nulls and a note where a model does not take them."""
    small = replace(samples, cap=0)
    try:
        found = certify(reference, rewritten, small, output=output, resized=resized)
    except Exception as error:  # made-up inputs that a model refuses say nothing against it
        said = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        return Beside(samples.law, None, None, None, None, 0, 0, f"the models were not compared on invented inputs ({said})")
    estimate, half, p99, most = (f if math.isfinite(f) else None for f in (found.estimate, found.half_width, found.p99, found.max))
    note = "" if estimate is not None else "unbounded there"
    return Beside(found.law, estimate, half, p99, most, found.samples, found.replications, note)


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


def _certificate(name: str, tally: _Tally, law: str, bound: float | None) -> OutputError:
    count = len(tally.lost)
    dealt = _deal(count) if GIVEN in tally.replication else tally.replication
    lost, norm = [0.0] * (max(dealt) + 1), [0.0] * (max(dealt) + 1)
    for r, a, b in zip(dealt, tally.lost, tally.norm, strict=True):
        lost[r], norm[r] = lost[r] + a, norm[r] + b
    estimate, half = interval(lost, norm)
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
        law=law,
        samples=count,
        bound=bound,
        replications=len(lost),
    )


def _deal(count: int) -> list[int]:
    """The replication of each given sample, by chance: they lie in an order (by length, by source) that replications must not share."""
    return (torch.randperm(count, generator=torch.Generator().manual_seed(0)) % min(REPLICATIONS, count)).tolist()


def interval(lost: Sequence[float], norm: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """sqrt(sum lost / sum norm) over replications, and the jackknife's half width; a single one has none (inf) unless it is exact."""
    n, whole = len(lost), ratio(sum(lost), sum(norm))
    if n == 1:
        return whole, student_t([whole])[1]
    without = [ratio(sum(lost[:r]) + sum(lost[r + 1 :]), sum(norm[:r]) + sum(norm[r + 1 :])) for r in range(n)]
    half = student_t([n * whole - (n - 1) * w for w in without], confidence)[1] if math.isfinite(whole) else math.inf
    return whole, half


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
