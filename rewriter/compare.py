"""Two models or more, as files: how far their outputs are apart, and how long each takes beside what the cost model predicted."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter import sampling
from rewriter.backend import Runner, Target
from rewriter.caches import Change, changes, whole
from rewriter.cost_model import Base
from rewriter.errors import RewriteError
from rewriter.graph import Graph
from rewriter.inputs import parse_dims
from rewriter.latency import Reference, batches, latencies
from rewriter.opened import as_file, open_model, target_of
from rewriter.options import Options
from rewriter.report import Latency, OutputError
from rewriter.verify import beside, certify, load_metric


def verify(a: str, b: str, options: Options) -> tuple[OutputError, int]:
    """How far B's outputs are from A's, on --data or invented inputs."""
    first, second = open_model(a, options), open_model(b, options)
    _same_interface(first.graph, second.graph)
    resized = changes(first.graph.specs(), second.graph.specs())
    if resized:
        first = dataclasses.replace(first, sizes=whole(first.specs, first.sizes))
    samples = _samples(first, options)
    metric = load_metric(options.metric)
    found = certify(first.graph.run, second.graph.run, samples, options.max_error, metric, options.precision, resized=resized)
    if options.data is not None:
        surrogate = sampling.surrogate(first, options.seed)
        found = dataclasses.replace(found, beside=beside(first.graph.run, second.graph.run, surrogate, found.output, resized))
    return found, 3 if options.max_error is not None and found.upper > options.max_error else 0


@dataclass(frozen=True)
class Contender:
    """A rewritten model beside the dense one: a row for each token count, and its error where that was asked for."""

    name: str
    rows: list[Latency]
    error: OutputError | None = None


@dataclass(frozen=True)
class Comparison:
    """The rewritten models, and the error of the dense model in int8 where errors were asked for and it can be had."""

    contenders: list[Contender]
    int8_error: OutputError | None = None


def bench(a: str, others: Sequence[str], options: Options, errors: bool = False) -> Comparison:
    """Latency of each other model against A, interleaved, and what the cost model predicts; the interfaces are compared first."""
    first, rest = open_model(a, options), [open_model(b, options) for b in others]
    for other in rest:
        _same_interface(first.graph, other.graph)
    target = target_of(options, first, None)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        path, dense = _emitted(first, target, place / f"a{target.suffix}", options)
        reference = Reference.of(target, path, options.threads)
        resized = [changes(first.graph.specs(), other.graph.specs()) for other in rest]
        sizes = whole(first.specs, first.sizes) if any(resized) else first.sizes
        samples = _samples(dataclasses.replace(first, sizes=sizes), options) if errors else None

        def error(runner: Runner | None, changed: Sequence[Change] = ()) -> OutputError | None:
            return None if samples is None or runner is None else certify(first.graph.run, runner, samples, resized=changed)

        explicit = parse_dims(options.dims) if options.dims else {}
        feeds = batches(first.graph, first.specs, explicit, options.token_counts)
        base = Base(dense, reference.dense, feeds, target)
        found = []
        for i, (name, source) in enumerate(zip(others, rest, strict=True)):
            path, rewritten = _emitted(source, target, place / f"b{i}{target.suffix}", options)
            runner = target.open(path, options.threads)
            rows = latencies(reference, runner, feeds, options.token_counts, resized[i])
            found.append(Contender(name, base.predicted(rows, rewritten), error(runner, resized[i])))
        return Comparison(found, error(reference.int8))


def _emitted(source: Any, target: Target, path: Path, options: Options) -> tuple[Path, Graph]:
    """The model as a file that the target opens, and as a graph of what that file holds."""
    path = as_file(source, target, path, options)
    same = source.graph.format == "onnx" or target.suffix != ".onnx"
    return path, source.graph if same else open_model(str(path), options).graph


def _samples(source: Any, options: Options) -> Any:
    return sampling.everything(source, options.data, options.samples, options.seed, options.precision is not None)


def _same_interface(a: Graph, b: Graph) -> None:
    for what, first, second in (
        ("inputs", [s.name for s in a.specs()], [s.name for s in b.specs()]),
        ("outputs", a.output_names(), b.output_names()),
    ):
        if first != second:
            raise RewriteError(
                f"the models' {what} differ: {', '.join(first)} against {', '.join(second)}; compare models of one interface"
            )
