"""The command line: words become `Options`, the pipeline does the work, one boundary turns every failure into one line and an exit code.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rewriter import cli_options as o
from rewriter.cli_help import Command
from rewriter.errors import RewriteError
from rewriter.options import Options

if TYPE_CHECKING:
    from rewriter.pipeline import Result

app = typer.Typer(add_completion=False, rich_markup_mode=None)
DEFAULT = "rewrite"
USAGE_ERROR: Any = typer.BadParameter.__mro__[2]  # ClickException, from wherever this typer takes its click
FIELDS = {f.name for f in dataclasses.fields(Options)}


class Finished(Exception):
    """A command's exit code, where it is not 0."""

    def __init__(self, code: int) -> None:
        self.code = code


def transform(
    context: typer.Context, model: o.Model, passes: o.Passes = Options.passes, out: o.Out = None, target: o.Target = None,
    opset: o.Opset = Options.opset, inputs: o.Inputs = None, data: o.Data = None, samples: o.Samples = Options.samples,
    dims: o.Dims = None, arch: o.Arch = None, task: o.Task = None, adapters: o.Adapters = None, energy: o.Energy = None,
    trust_pickle: o.TrustPickle = False, include: o.Include = None, exclude: o.Exclude = None, budget: o.Budget = None,
    objective: o.Objective = None, max_error: o.MaxError = None, precision: o.Precision = None, metric: o.Metric = None,
    tokens: o.Tokens = Options.tokens,
    report: o.Report = None, seed: o.Seed = Options.seed, threads: o.Threads = Options.threads, cache: o.Cache = None,
    provider: o.Provider = Options.provider, kernels: o.Kernels = False, timing: o.Timing = True, flatten: o.Flatten = False,
    allow_noop: o.AllowNoop = False, force: o.Force = False, quiet: o.Quiet = False, debug: o.Debug = False,
) -> None:  # fmt: skip
    options = _options(context.params)
    planning = context.command.name == "plan"
    _check_model(model)
    _check_report(report, [model, out])
    if not planning:
        _check_out(out or model)
    from rewriter import pipeline

    _finish((pipeline.plan if planning else pipeline.rewrite)(model, options), report, quiet)


@app.command(cls=Command)
def verify(
    context: typer.Context, a: o.A, b: o.B, inputs: o.Inputs = None, data: o.Data = None, samples: o.Samples = Options.samples,
    dims: o.Dims = None, arch: o.Arch = None, task: o.Task = None, trust_pickle: o.TrustPickle = False,
    max_error: o.MaxError = None, precision: o.Precision = None, metric: o.Metric = None, seed: o.Seed = Options.seed,
    quiet: o.Quiet = False, debug: o.Debug = False,
) -> None:  # fmt: skip
    """How far B's outputs are from A's, with an interval; exit 3 where --max-error is exceeded."""
    options = _options(context.params)
    _check_model(a)
    _check_model(b)
    from rewriter import compare, render

    error, code = compare.verify(a, b, options)
    render.show_verification(error, code, quiet)
    _exit(code)


@app.command(cls=Command)
def bench(
    context: typer.Context, a: o.A, b: o.Bs, target: o.Target = None, inputs: o.Inputs = None, data: o.Data = None,
    samples: o.Samples = Options.samples, dims: o.Dims = None, arch: o.Arch = None, task: o.Task = None,
    trust_pickle: o.TrustPickle = False, tokens: o.Tokens = Options.tokens, opset: o.Opset = Options.opset,
    threads: o.Threads = Options.threads, provider: o.Provider = Options.provider, kernels: o.Kernels = False,
    seed: o.Seed = Options.seed, plot: o.Plot = None, quiet: o.Quiet = False, debug: o.Debug = False,
) -> None:  # fmt: skip
    """Latency of A, A in int8 and each B, interleaved in one process, beside what was predicted; --plot draws errors against times."""
    options = _options(context.params)
    for model in (a, *b):
        _check_model(model)
    from rewriter import compare, picture, render

    picture.check_plot(plot)
    found = compare.bench(a, b, options, errors=plot is not None)
    render.show_comparison(found, quiet)
    if plot is not None:
        picture.draw(found, Path(plot))


@app.command(cls=Command)
def diff(a: o.A, b: o.B, debug: o.Debug = False) -> None:
    """What differs between two .onnx or two .pt2: operations, nodes, parameters, inputs, outputs, provenance."""
    _check_model(a)
    _check_model(b)
    from rewriter.diff import diff_files
    from rewriter.render_diff import show_difference

    show_difference(a, b, diff_files(Path(a), Path(b)))


@app.command(cls=Command)
def passes(name: o.PassName = None, debug: o.Debug = False) -> None:
    """All passes and structures, or NAME in detail: options, what it finds, does, costs and refuses."""
    from rewriter import catalogue

    print(catalogue.listing() if name is None else catalogue.detail(name))


@app.command(cls=Command)
def kernels(action: o.KernelAction = "status", model: o.KernelModel = None, debug: o.Debug = False) -> None:
    """Whether compiled kernels are there and right on this machine, and what they would take of MODEL; `build` compiles them now."""
    if model is not None:
        _check_model(model)
    found = importlib.import_module("rewriter.backends.kernels.status")
    if action not in found.ACTIONS:
        raise RewriteError(f"rewrite kernels {action}: there are {' and '.join(found.ACTIONS)}")
    print(found.said(action, model))


@app.command(cls=Command)
def adapters(
    context: typer.Context, model: o.Model, out: o.Out = None, adapters: o.Adapters = None, inputs: o.Inputs = None, data: o.Data = None,
    energy: o.Energy = None, samples: o.Samples = Options.samples, dims: o.Dims = None, arch: o.Arch = None, task: o.Task = None,
    trust_pickle: o.TrustPickle = False, opset: o.Opset = Options.opset, seed: o.Seed = Options.seed,
    threads: o.Threads = Options.threads, force: o.Force = False, quiet: o.Quiet = False, debug: o.Debug = False,
) -> None:  # fmt: skip
    """MODEL as OUT.onnx with room for adapters, and each --adapter as a file that ONNX Runtime swaps in between runs."""
    _check_model(model)
    _check_out(out or model)
    from rewriter import render

    render.show_adapters(importlib.import_module("rewriter.backends.onnx.dynamic").write(model, _options(context.params)), quiet)


@app.command(cls=Command)
def replay(
    report_file: o.ReportFile, out: o.Out = None, report: o.Report = None, cache: o.Cache = None,
    arch: o.Arch = None, metric: o.Metric = None, trust_pickle: o.TrustPickle = False, force: o.Force = False, quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:  # fmt: skip
    """Run a report's recipe again on the same model; --force goes on where the model's content changed."""
    from rewriter import pipeline
    from rewriter import report as reports

    before = reports.load(Path(report_file))
    options = Options.from_recipe(before.recipe)
    _check_consent(report_file, options, arch, metric, trust_pickle)
    model, sha256 = before.model["path"], before.model["sha256"]
    if model is None:
        raise RewriteError(f"{report_file}: that run took a model from memory, not from a file; call rewriter.rewrite with it again")
    _check_model(model)
    found = importlib.import_module("rewriter.backends.files.load").file_hash(Path(model))
    if found != sha256 and not force:
        said = f"its sha256 is {found[:12]}, not {str(sha256)[:12]}"
        raise RewriteError(f"{model} changed since {report_file} was written: {said}; give --force to go on")
    # --force, --quiet and where things go are consent and taste of one call, not part of what is replayed
    options = dataclasses.replace(options, out=out or options.out, cache=cache or options.cache, force=force, quiet=quiet)
    _check_out(options.out or model)
    _check_report(report, [model, options.out])
    _finish(pipeline.rewrite(model, options), report, quiet)


def _check_consent(report_file: str, options: Options, arch: str | None, metric: str | None, trust_pickle: bool) -> None:
    """A report is a file from somewhere: what runs code in its recipe is said again by whoever replays it."""
    if options.trust_pickle and not trust_pickle:
        raise RewriteError(f"{report_file}: that run trusted a pickle to run its code; give --trust-pickle to do so again")
    for option, recorded, given in (("--arch", options.arch, arch), ("--metric", options.metric, metric)):
        if given is not None and recorded is None:
            raise RewriteError(f"{report_file}: that run was without {option}; leave it out")
        if recorded != given:
            raise RewriteError(f"{report_file}: that run imported {recorded}; give {option} {recorded} to import it again")


SUMMARY = "Replace dense weights of a trained model by structured ones, and say with numbers what that changed, cost and gained."
app.command(DEFAULT, cls=Command, help=SUMMARY)(transform)
app.command("plan", cls=Command, help="The same options, decisions and fits, kept for `rewrite`; writes no model.")(transform)


def _options(given: Mapping[str, Any]) -> Options:
    """The options that a command has, by name; lists as tuples, what was left out at its default."""
    chosen: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if name in FIELDS}
    return Options(**{name: v for name, v in chosen.items() if v is not None})


def _check_model(path: str) -> None:
    if not Path(path).exists():
        allowed = "a .pt2, .onnx, .safetensors or torch.save file, or a Hugging Face folder"
        raise RewriteError(f"{path}: there is no such file or folder; give {allowed}")


def _check_out(path: str) -> None:
    """Whether the folder of OUT takes files, before the work begins."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise RewriteError(f"the folder {folder} does not exist; make it, or give another -o OUT")
    if not _takes_files(folder):
        raise RewriteError(f"the folder {folder} cannot be written; give -o OUT elsewhere")


def _takes_files(folder: Path) -> bool:
    """Tried, not asked: permissions do not tell of full disks and odd file systems."""
    import tempfile

    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _check_report(path: str | None, models: Sequence[str | None]) -> None:
    """Whether --report can be written, before the work begins."""
    if path is None:
        return
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir() or not _takes_files(file.parent):
        raise RewriteError(f"--report {path} cannot be written; give a file in a folder that exists and can be written")
    if any(model is not None and file.resolve() == Path(model).resolve() for model in models):
        raise RewriteError(f"--report {path} would overwrite the model; give another file")


def _finish(result: Result, report: str | None, quiet: bool) -> None:
    """Report on the terminal and in its file, whatever the exit code is; the outcome is the last line."""
    from rewriter import render

    if report is not None:
        try:
            result.report.save(Path(report))
        except OSError as error:
            raise RewriteError(f"--report {report} cannot be written ({error.strerror}); the run itself ended: {result.message}") from error
    try:
        render.show_result(result, quiet)
        sys.stdout.flush()
    except BrokenPipeError:
        _nobody_reads()  # the run ended as it ended
    except OSError as error:
        raise RewriteError(f"standard output cannot be written ({error.strerror}); the run itself ended: {result.message}") from error
    _exit(result.exit_code)


def _nobody_reads() -> None:
    """The reader of our output left: what follows goes nowhere, and no flush at exit fails."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _exit(code: int) -> None:
    if code:
        raise Finished(code)


def _commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    order = [DEFAULT, "plan", "verify", "bench", "diff", "adapters", "passes", "kernels", "replay"]
    Command.siblings = {name: group.commands[name] for name in order}
    return Command.siblings


def run(args: Sequence[str]) -> int:
    """Run a command line; returns its exit code. Every failure ends here."""
    try:
        return _dispatch(list(args))
    except Finished as finished:
        return finished.code
    except typer.Exit as left:
        return left.exit_code
    except RewriteError as error:
        return _fail(str(error), 2, args)
    except USAGE_ERROR as error:
        return _fail(f"{error.format_message().rstrip('.')}; see `rewrite --help`", 2, args)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, args)
    except BrokenPipeError:  # nobody to tell
        _nobody_reads()
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 2, args)
    except Exception as error:
        return _fail(f"a bug, not your input: {type(error).__name__}: {error}; --debug shows where; please report it", 2, args)


def _dispatch(args: list[str]) -> int:
    commands = _commands()
    if "--debug" not in args and not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")  # libraries warn their callers; what users have to know is said in the report
    if args[:1] == ["--version"]:
        from rewriter.versions import versions

        print(", ".join(f"{name} {text}" for name, text in versions().items()))
        return 0
    name = args.pop(0) if args and args[0] in commands and args[0] != DEFAULT else DEFAULT
    if not args and name == DEFAULT:
        args = ["--help"]
    full = name if name == DEFAULT else f"{DEFAULT} {name}"
    with commands[name].make_context(full, args, help_option_names=["-h", "--help"]) as context:
        commands[name].invoke(context)
    return 0


def _fail(text: str, code: int, args: Sequence[str]) -> int:
    """One line on stderr; the traceback before it where --debug asks for it."""
    if "--debug" in args:
        import traceback

        traceback.print_exc()
    line = "".join(c if c.isprintable() else " " for c in text)
    print(f"rewrite: {' '.join(line.split())}", file=sys.stderr)
    return code


def main() -> None:
    """The console script `rewrite`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, _terminated)
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # said before, or nobody to tell
        _nobody_reads()
    sys.exit(code)


def _terminated(*_: object) -> None:
    """SIGTERM unwinds like an interrupt, so that scratch folders go."""
    raise SystemExit(143)
