"""The report: what changed where, what it cost and costs, how far the output moved on which inputs, what was measured, why each refusal.

One dataclass tree, one JSON form (schema: report.schema.json); the terminal shows the same content, and the emitted model stores it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rewriter.cache import write_atomically
from rewriter.cost import Cost
from rewriter.errors import RewriteError
from rewriter.rule import Decision

SCHEMA = 1


@dataclass(frozen=True)
class SiteRow:
    """One site. `error` is weighted and relative; null where nothing was approximated."""

    name: str
    kind: str
    shape: list[int] | None
    dtype: str | None
    status: str  # rewritten | planned | kept
    structure: str | None
    exact: bool
    reason: str
    error: float | None
    cost: dict[str, dict[str, int]]  # unit -> before, after; flops per token, 2 per multiply-add


@dataclass(frozen=True)
class Beside:
    """The same output's error under a second law of inputs; null with a note where a model does not take such inputs."""

    law: str
    estimate: float | None
    half_width: float | None
    p99: float | None
    max: float | None
    samples: int
    replications: int
    note: str = ""


@dataclass(frozen=True)
class OutputError:
    """The certificate of the worst output against the dense model; `half_width` at `confidence` over replications."""

    norm: str
    output: str
    estimate: float
    half_width: float
    confidence: float
    p99: float
    max: float
    cosine: float | None
    law: str
    samples: int
    bound: float | None
    replications: int = 0
    metric: dict[str, Any] | None = None  # --metric: its name, estimate and half_width
    precision: float | None = None  # half width over estimate that was asked for; invented samples are drawn until it is reached
    reached: bool | None = None  # whether it was
    beside: Beside | None = None  # on invented inputs, where the user gave data

    @property
    def upper(self) -> float:
        return self.estimate + self.half_width


@dataclass(frozen=True)
class Latency:
    """The whole model at one token count; seconds are medians, ratios medians of paired ratios, spread their 10th and 90th percentile."""

    tokens: int
    threads: int
    dense_seconds: float | None
    int8_seconds: float | None
    rewritten_seconds: float | None
    ratio: float | None
    int8_ratio: float | None
    note: str = ""
    ratio_spread: list[float] | None = None
    predicted_seconds: float | None = None  # of the rewritten model, from its layers alone


@dataclass(frozen=True)
class Report:
    """Everything a run found and did."""

    model: dict[str, Any]
    passes: list[str]
    target: str
    seed: int
    matched: dict[str, int]
    sites: list[SiteRow]
    output_error: OutputError | None
    latency: list[Latency]
    versions: dict[str, str]
    seconds: float
    recipe: dict[str, Any] = field(default_factory=dict)  # the options, for `rewrite replay`
    notes: list[str] = field(default_factory=list)
    nbytes: dict[str, int | None] = field(default_factory=dict)  # dense and rewritten file
    adapters: list[dict[str, Any]] = field(default_factory=list)  # --adapter: folder, scale, what its keys went to
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Stable JSON: schema first, keys in field order; what is no number (an interval that one sample does not have) is null."""
        content = _finite(dataclasses.asdict(self))
        return json.dumps({"schema": content.pop("schema"), **content}, indent=1, allow_nan=False)

    def save(self, path: Path) -> None:
        """Write the JSON atomically, checked against the schema."""
        text = self.to_json()
        validate(json.loads(text))

        def write(temporary: Path) -> None:
            temporary.write_text(text + "\n")

        write_atomically(path, write)


def _finite(value: Any) -> Any:
    """The same content with null for inf and NaN, which JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def schema() -> dict[str, Any]:
    """The JSON schema that every report satisfies."""
    loaded: dict[str, Any] = json.loads((Path(__file__).parent / "report.schema.json").read_text())
    return loaded


def validate(content: Mapping[str, Any]) -> None:
    """RewriteError where a report does not satisfy the schema."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema()).iter_errors(content))
    if error is not None:
        where = "/".join(map(str, error.absolute_path)) or "top level"
        raise RewriteError(f"not a report of schema {SCHEMA}: {error.message[:200]} at {where}")


def load(path: Path) -> Report:
    """A report from its JSON; RewriteError in one line where it is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RewriteError(f"{path} cannot be read as a report: {error}; give the file that --report wrote") from error
    validate(content)
    return Report(
        **{
            **content,
            "sites": [SiteRow(**row) for row in content["sites"]],
            "output_error": _output_error(content["output_error"]),
            "latency": [Latency(**row) for row in content["latency"]],
        }
    )


def _output_error(content: Mapping[str, Any] | None) -> OutputError | None:
    """A figure that is null was unbounded or unknown: inf, so that no bound is ever taken to hold."""
    if content is None:
        return None
    unknown = {name: math.inf for name in ("estimate", "half_width", "p99", "max") if content[name] is None}
    second = content.get("beside")
    return OutputError(**{**content, **unknown, "beside": second and Beside(**second)})


def site_row(decision: Decision, planned: bool, stored: Callable[[torch.dtype], torch.dtype] = lambda dtype: dtype) -> SiteRow:
    """A decision as the report says it; bytes are those of `stored`, the type that the target's file holds weights in."""
    site, status = decision.site, "kept"
    if decision.rewritten:
        status = "planned" if planned else "rewritten"
    units = {u: {"before": decision.before.of(u), "after": decision.after.of(u)} for u in ("params", "flops", "nbytes")}
    if site.dtype is not None and stored(site.dtype) != site.dtype:
        wider = stored(site.dtype).itemsize / site.dtype.itemsize
        units["nbytes"] = {when: round(nbytes * wider) for when, nbytes in units["nbytes"].items()}
    dtype = str(site.dtype).removeprefix("torch.") if site.dtype else None
    shape = list(site.shape) if site.shape else None
    structure = decision.structure or None
    return SiteRow(site.name, site.kind, shape, dtype, status, structure, decision.exact, decision.reason, decision.error, units)


def totals(rows: Sequence[SiteRow]) -> tuple[Cost, Cost]:
    """Summed costs before and after over all rows."""

    def total(which: str) -> Cost:
        return Cost(*(sum(r.cost[u][which] for r in rows) for u in ("params", "flops", "nbytes")))

    return total("before"), total("after")
