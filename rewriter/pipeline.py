"""The main job: read, detect, calibrate, rewrite, emit, reload, certify, measure, report. Nothing is written until everything held."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewriter import caches, registry, sampling
from rewriter.backend import EmitOptions, Target
from rewriter.cache import FitCache
from rewriter.calibrate import Calibration
from rewriter.errors import RewriteError
from rewriter.fit import site_cost
from rewriter.gate import not_smaller, refused, tolerance
from rewriter.graph import Graph, Site
from rewriter.inputs import parse_dims
from rewriter.job import Job
from rewriter.latency import Reference, batches, latencies
from rewriter.lengths import check_lengths
from rewriter.memory import return_freed_blocks
from rewriter.opened import as_file, open_model, target_of
from rewriter.operator import AbstractRecurrence
from rewriter.options import Options
from rewriter.places import cache_folder, check_suffix, out_path, publish, size
from rewriter.progress import Progress
from rewriter.quantised import Quantised
from rewriter.report import Latency, OutputError, Report, site_row
from rewriter.rule import AbstractPass, Context, Decision, given_up
from rewriter.select import select
from rewriter.verify import Run, beside, certify, load_metric
from rewriter.versions import versions, warn_untested

UNSEEN = "no pass looked at it"
ELSEWHERE = ("out", "cache", "force", "quiet")  # where a run's files lie and how it spoke: nothing of the model


@dataclass(frozen=True)
class Result:
    """What a run gives back. `emitted` is the model file in a scratch folder until `save` or `path` puts it somewhere."""

    report: Report
    exit_code: int  # 0 done; 1 nothing matched or worth it; 3 bound exceeded
    message: str
    path: Path | None = None
    graph: Graph | None = None
    scratch: tempfile.TemporaryDirectory[str] | None = None
    emitted: Path | None = None
    opset: int = EmitOptions.opset

    @functools.cached_property
    def module(self) -> Any:
        """The rewritten model as an nn.Module with trainable factors (torch graphs), or as an onnx_ir.Model."""
        if self.graph is None:
            raise RewriteError(f"there is no rewritten model: {self.message}")
        if self.graph.format == "torch":
            torch_target = importlib.import_module("rewriter.backends.fx.target")
            return torch_target.as_module(torch_target.lower(self.graph))
        graph = self.graph.clone()
        graph.prune()
        return importlib.import_module("rewriter.backends.onnx.emit").finish(graph.model, self.opset)  # type: ignore[attr-defined]

    def with_kernels(self, device: str = "cpu") -> Any:
        """The rewritten torch model as an nn.Module for inference on this machine, its structured layers in kernels.

        They are compiled for this CPU; with another device, such as "cuda", they are in Triton, and the module is moved there.

        RewriteError where nothing was rewritten, where no kernels can be had, and for an ONNX model, whose emitted file
        rewriter.inference_session opens.
        """
        if self.graph is None or self.graph.format != "torch":
            said = self.message if self.graph is None else "this is an ONNX model; save it and open it with rewriter.inference_session"
            raise RewriteError(f"there is no torch model to run with kernels: {said}")
        if device == "cpu":
            return importlib.import_module("rewriter.backends.kernels.torch_op").with_kernels(self.graph)
        return importlib.import_module("rewriter.backends.triton_kernels.torch_op").with_kernels(self.graph, device)

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Put the emitted, verified model at `path`; RewriteError where nothing was emitted or the file exists."""
        if self.emitted is None:
            raise RewriteError(f"there is nothing to save: {self.message}")
        check_suffix(Path(path), self.emitted.suffix)
        return publish(self.emitted, Path(path), force)


def rewrite(
    model: Any, options: Options, data: Any = None, publish_to_out: bool = True, passes: Sequence[AbstractPass] | None = None
) -> Result:
    """The whole job; with `publish_to_out` the emitted model ends at --out (default MODEL.rewritten.SUFFIX)."""
    out = out_path(model, options) if publish_to_out else None
    job = _prepare(model, options, data, passes)
    if out is not None:
        check_suffix(out, job.target.suffix)
    failure = _decide(job)
    if failure is None and not job.rewritten and not options.allow_noop:
        failure = (1, "nothing was rewritten: " + _why_nothing(job))
    if failure is not None:
        code, text = failure
        return Result(_report(job, None, [], {}, planned=False), code, text)
    return _emit(job, out)


def plan(model: Any, options: Options, data: Any = None, passes: Sequence[AbstractPass] | None = None) -> Result:
    """The same decisions and fits, kept in the cache; nothing is written."""
    job = _prepare(model, options, data, passes)
    failure = _decide(job)
    error = _with_surrogate(job, job.graph.run, _certificate(job, job.graph.run)) if job.lossy else None
    text = f"{job.rewritten} of {len(job.sites)} sites would be rewritten; `rewrite` with the same options reuses these fits"
    if failure is not None:
        text = failure[1]
    elif not job.rewritten:
        text = "nothing would be rewritten: " + _why_nothing(job)
    return Result(_report(job, error, [], {}, planned=True), 0, f"plan: {text}", graph=job.graph, opset=options.opset)


def _prepare(model: Any, options: Options, data: Any, passes: Sequence[AbstractPass] | None) -> Job:
    begin = time.perf_counter()
    return_freed_blocks()
    progress = Progress(options.quiet)
    passes = registry.parse_passes(options.passes) if passes is None else passes
    if not passes:
        raise RewriteError("--passes is empty; `rewrite passes` lists them")
    passes = [*_reduction(options), *passes]
    source = open_model(model, options)
    target = target_of(options, source, options.out)
    if any(step.whole for step in passes):
        source = dataclasses.replace(source, sizes=caches.whole(source.specs, source.sizes))
    graph = source.graph.clone()
    sites = registry.sites(graph)
    selected, out = select(sites, options.include, options.exclude)
    decisions = {s.id: Decision(s, reason, site_cost(s), site_cost(s)) for s, reason in out}
    given = data if data is not None else options.data
    samples = sampling.collect(source, given, options.samples, options.seed, options.precision is not None)
    for step in passes:
        step.requires(graph)
    context = _context(options, passes, target, Calibration(graph, samples.calibration, progress), selected, decisions)
    return Job(
        options, source, graph, target, samples, sites, context, begin, passes, [*warn_untested(), *source.notes, *_widened(target, sites)]
    )


def _reduction(options: Options) -> list[AbstractPass]:
    """--energy as a pass, ahead of all others."""
    if options.energy is None:
        return []
    if not options.adapters:
        raise RewriteError(f"--energy {options.energy} is a share of an adapter's change, and there is no --adapter; give both, or neither")
    return registry.parse_passes(f"block-lora:energy={options.energy}")


def _widened(target: Target, sites: Sequence[Site]) -> list[str]:
    """What the target stores in another type than the model does."""
    types = {s.dtype for s in sites if s.dtype is not None and target.stored(s.dtype) != s.dtype}
    return [
        f"{str(t).removeprefix('torch.')} weights are stored as {target.stored(t)} for {target.name}".replace("torch.", "") for t in types
    ]


def _context(
    options: Options,
    passes: Sequence[AbstractPass],
    target: Target,
    calibration: Calibration,
    selected: Sequence[Site],
    decisions: dict[str, Decision],
) -> Context:
    shares = [share for step in passes if (share := getattr(step, "params", None))]
    return Context(
        target=target,
        calibration=calibration,
        tokens=options.token_counts,
        threads=options.threads,
        objective=options.objective or (options.shared.unit if options.shared else "params" if shares else "ms"),
        budget=options.shared,
        consent=options.max_error is not None,
        selected=selected,
        fits=FitCache(cache_folder(options)),
        progress=calibration.progress,
        seed=options.seed,
        two_forms=any(step.two_forms for step in passes),
        decisions=decisions,
    )


def _decide(job: Job) -> tuple[int, str] | None:
    """Run the passes, then give lossy sites up until the bound holds. Returns (exit code, why) where the run ends here."""
    for step in job.passes:
        for decision in step.run(job.graph, job.context):
            job.decisions[decision.site.id] = decision
        step.ensures(job.graph)
    for site in job.sites:
        job.decisions.setdefault(site.id, Decision(site, site.reason or UNSEEN, site_cost(site), site_cost(site)))
    if job.options.max_error is None or not job.rewritten:
        return None
    return _bound(job, job.options.max_error)


def _bound(job: Job, bound: float) -> tuple[int, str] | None:
    """Give up as few lossy sites as the bound allows, worst first: bisection on how many."""
    lossy = job.lossy
    lost: list[Decision] = []

    def holds(count: int) -> bool:
        for decision in lost[count:]:
            decision.redo(job.graph)
        for decision in lossy[len(lost) : count]:
            decision.give_up(job.graph)
        lost[:] = lossy[:count]
        with _running(job) as run:
            return _certificate(job, run).upper <= bound

    low, high = 0, len(lossy)
    if not holds(0):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        ok = holds(high)
        for decision in lost:
            reason = f"given up for --max-error {bound}: {decision.structure} had weighted error {decision.error:.3g}, among the worst"
            job.decisions.update({d.site.id: d for d in given_up(job.decisions, decision, reason)})
        if not ok:
            return 3, f"the output error exceeds --max-error {bound} with nothing lossy left; nothing was written"
    return None


@contextmanager
def _running(job: Job) -> Iterator[Run]:
    """The rewritten model as it will run: a target may round inputs where the graph does not, so what holds integers is emitted."""
    if job.graph.format == "onnx" or not any(isinstance(d.operator, Quantised) for d in job.decisions.values()):
        yield job.graph.run
        return
    with tempfile.TemporaryDirectory(prefix="rewriter-") as folder:
        path = Path(folder) / f"model{job.target.suffix}"
        job.target.emit(job.graph, path, EmitOptions(job.options.opset, False, job.options.token_counts, job.options.threads))
        yield job.target.open(path, job.options.threads)


def _why_nothing(job: Job) -> str:
    if not job.sites:
        return "the model has no linear, attention, recurrence or adapter site"
    seen = [d.reason for d in job.decisions.values() if d.reason != UNSEEN]
    reasons = seen or [UNSEEN]
    most = max(reasons, key=reasons.count)
    return f"{len(job.sites)} sites were kept, {reasons.count(most)} of them because: {most}"


def _certificate(job: Job, run: Run) -> OutputError:
    options = job.options
    metric, bound = load_metric(options.metric), options.max_error
    return certify(job.reference, run, job.samples.held_out, bound, metric, options.precision, resized=job.resized)


def _with_surrogate(job: Job, run: Run, error: OutputError) -> OutputError:
    """Beside the figure on the user's data, the one on invented inputs: how much hangs on the law."""
    if job.samples.calibration.invented:
        return error
    made_up = sampling.surrogate(job.source, job.options.seed)
    return dataclasses.replace(error, beside=beside(job.reference, run, made_up, error.output, job.resized))


def _emit(job: Job, out: Path | None) -> Result:
    """Write to a scratch folder beside OUT, which is gone again whatever happens."""
    scratch = tempfile.TemporaryDirectory(prefix=".rewrite-", dir=out.parent if out else None)
    try:
        return _emitted(job, out, scratch)
    except BaseException:
        scratch.cleanup()
        raise


def _emitted(job: Job, out: Path | None, scratch: tempfile.TemporaryDirectory[str]) -> Result:
    """Write, reload, certify the reloaded file, measure; publish only when all of it holds."""
    options = job.options
    folder = Path(scratch.name)
    name = out.name if out else f"model{job.target.suffix}"
    explicit = parse_dims(options.dims) if options.dims else {}
    draft = _report(job, None, [], {}, planned=False)
    recipe = {k: v for k, v in draft.recipe.items() if k not in ELSEWHERE}
    provenance = {"report": dataclasses.replace(draft, seconds=0.0, recipe=recipe).to_json()}  # same seed, same bytes
    emission = EmitOptions(options.opset, options.flatten, options.token_counts, options.threads, provenance)
    emitted = folder / name
    job.notes += job.target.emit(job.graph, emitted, emission)
    error, failure = _judged(job, emitted, explicit)
    gc.collect()  # a loaded program holds itself
    rows: list[Latency] = []
    nbytes: dict[str, int | None] = {"dense": None, "rewritten": size(emitted)}
    if failure is None:
        (folder / "dense").mkdir()
        try:  # what was rewritten may be just what kept the model from this target
            dense = as_file(job.source, job.target, folder / "dense" / name, dataclasses.replace(options, flatten=False))
        except RewriteError as problem:
            job.notes.append(f"the model as it was given has no size and no times here: {str(problem).partition('; ')[0]}")
        else:
            nbytes["dense"] = size(dense)
            if options.timing:
                reference, after = Reference.of(job.target, dense, options.threads), job.target.open(emitted, options.threads)
                feeds = batches(job.graph, job.source.specs, explicit, options.token_counts)
                rows = latencies(reference, after, feeds, options.token_counts, job.resized)
        failure = not_smaller(rows, nbytes, job, len(provenance["report"].encode()))
        shutil.rmtree(folder / "dense")
    report = _report(job, error, rows, nbytes, planned=False)
    if failure is not None:
        scratch.cleanup()
        return Result(report, failure[0], failure[1])
    path = publish(emitted, out, options.force) if out else None
    text = f"{path or 'in memory'}: {job.rewritten} of {len(job.sites)} sites rewritten, reloaded and checked"
    if path is not None:
        scratch.cleanup()
    return Result(report, 0, text, path, job.graph, scratch, emitted, options.opset)


def _judged(job: Job, emitted: Path, explicit: dict[str, int]) -> tuple[OutputError, tuple[int, str] | None]:
    """The reloaded file's certificate, and why it cannot be published; what was loaded is gone again afterwards."""
    runner = job.target.open(emitted, job.options.threads)
    error = _with_surrogate(job, runner, _certificate(job, runner))
    failure = refused(job, error)
    if failure is None and any(isinstance(d.operator, AbstractRecurrence) for d in job.decisions.values()):
        allowed = None if job.lossy else tolerance(job)
        job.notes.append(check_lengths(job.reference, runner, job.graph, job.source.specs, explicit, allowed))
    return error, failure


def _report(job: Job, error: OutputError | None, rows: list[Latency], nbytes: dict[str, int | None], planned: bool) -> Report:
    sites = [site_row(job.decisions[s.id], planned, job.target.stored) for s in job.sites]
    source = job.source
    return Report(
        model={"path": source.path, "sha256": source.sha256, "format": source.format},
        passes=[step.spelling() for step in job.passes],
        target=job.target.name,
        seed=job.options.seed,
        matched={"sites": len(job.sites), "rewritten": job.rewritten},
        sites=sites,
        output_error=error,
        latency=rows,
        versions=versions(),
        seconds=round(time.perf_counter() - job.begin, 3),
        recipe=job.options.to_recipe(),
        notes=[*job.notes, *([caches.said(job.resized)] if job.resized else [])],
        adapters=list(source.placed),
        nbytes=nbytes,
    )
