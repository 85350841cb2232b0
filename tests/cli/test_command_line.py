"""Words become options, commands are told from files, and every failure is one line with its exit code."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rewriter import cli, report
from rewriter.errors import RewriteError
from rewriter.options import Options
from tests.cli.conftest import Asked, Said

Rewrite = Callable[..., Said]

GIVEN = {
    "passes": (["--passes", "monarch:blocks=4,pre-merge"], "monarch:blocks=4,pre-merge"),
    "out": (["-o", "small.onnx"], "small.onnx"),
    "target": (["--target", "onnx"], "onnx"),
    "opset": (["--opset", "23"], 23),
    "inputs": (["--input", "ids:int64[batch,seq]", "--input", "mask:bool[batch,seq]"], ("ids:int64[batch,seq]", "mask:bool[batch,seq]")),
    "data": (["--data", "cal.npz"], "cal.npz"),
    "dims": (["--dim", "batch=4,seq=64"], "batch=4,seq=64"),
    "arch": (["--arch", "nets:build"], "nets:build"),
    "task": (["--task", "fill-mask"], "fill-mask"),
    "adapters": (["--adapter", "one", "--adapter", "two=0.5"], ("one", "two=0.5")),
    "energy": (["--energy", "0.95"], 0.95),
    "include": (["--include", "a.*", "--include", "b.*"], ("a.*", "b.*")),
    "exclude": (["--exclude", "c.*"], ("c.*",)),
    "budget": (["--budget", "params=0.5"], "params=0.5"),
    "objective": (["--objective", "nbytes"], "nbytes"),
    "max_error": (["--max-error", "0.1"], 0.1),
    "precision": (["--precision", "0.01"], 0.01),
    "metric": (["--metric", "tasks:accuracy"], "tasks:accuracy"),
    "tokens": (["--tokens", "1,64"], "1,64"),
    "seed": (["--seed", "7"], 7),
    "threads": (["--threads", "2"], 2),
    "cache": (["--cache", "fits"], "fits"),
    "kernels": (["--kernels"], True),
    "provider": (["--provider", "CUDAExecutionProvider"], "CUDAExecutionProvider"),
    "flatten": (["--flatten"], True),
    "allow_noop": (["--allow-noop"], True),
    "trust_pickle": (["--trust-pickle"], True),
    "force": (["--force"], True),
    "quiet": (["--quiet"], True),
    "samples": (["--samples", "16"], 16),
    "timing": (["--no-timing"], False),
}


def test_every_field_of_options_is_an_option() -> None:
    assert set(GIVEN) == {f.name for f in dataclasses.fields(Options)}


@pytest.mark.parametrize("command", [[], ["plan"]])
@pytest.mark.parametrize("name", GIVEN)
def test_option_reaches_options(rewrite: Rewrite, asked: Asked, name: str, command: list[str]) -> None:
    words, value = GIVEN[name]
    assert rewrite(*command, "m.pt2", *words).code == 0
    assert asked.options == dataclasses.replace(Options(), **{name: value})


def test_defaults_are_those_of_options(rewrite: Rewrite, asked: Asked) -> None:
    rewrite("m.pt2")
    assert asked.options == Options()


def test_long_form_of_out(rewrite: Rewrite, asked: Asked) -> None:
    rewrite("m.pt2", "--out", "x.pt2")
    assert asked.options.out == "x.pt2"


def test_a_file_called_like_a_command(rewrite: Rewrite, asked: Asked, folder: Path) -> None:
    (folder / "plan").write_bytes(b"a model")
    rewrite("plan", "m.pt2")
    rewrite("./plan", "--seed", "3")
    rewrite("--seed", "3", "m.pt2")
    assert [(name, model) for name, model, _ in asked.calls] == [("plan", "m.pt2"), ("rewrite", "./plan"), ("rewrite", "m.pt2")]


@pytest.mark.parametrize("code", [0, 1, 3])
@pytest.mark.parametrize("command", [[], ["plan"]])
def test_exit_code_and_report(rewrite: Rewrite, asked: Asked, folder: Path, code: int, command: list[str]) -> None:
    asked.exit_code = code
    said = rewrite(*command, "m.pt2", "--report", "r.json")
    assert said.code == code
    assert said.out.splitlines()[-1] == f"{'plan' if command else 'rewrite'}: code {code}"
    assert said.err == ""
    assert report.load(folder / "r.json").matched["rewritten"] == 3


def test_quiet_prints_the_last_line_only(rewrite: Rewrite, asked: Asked) -> None:
    assert rewrite("m.pt2", "--quiet").out == "rewrite: code 0\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RewriteError("--target x is unknown;\n give another"), 2, "rewrite: --target x is unknown; give another"),
        (KeyboardInterrupt(), 130, "rewrite: interrupted"),
        (PermissionError(13, "Permission denied", "x.pt2"), 2, "rewrite: x.pt2: Permission denied"),
        (KeyError("k"), 2, "rewrite: a bug, not your input: KeyError: 'k'; --debug shows where; please report it"),
        (RewriteError("\x1b[31mred"), 2, "rewrite: [31mred"),
    ],
)
def test_one_line_for_each_failure(rewrite: Rewrite, asked: Asked, error: BaseException, code: int, words: str) -> None:
    asked.error = error
    said = rewrite("m.pt2")
    assert (said.code, said.err, said.out) == (code, words + "\n", "")


def test_debug_shows_the_traceback(rewrite: Rewrite, asked: Asked) -> None:
    asked.error = KeyError("k")
    said = rewrite("m.pt2", "--debug")
    assert said.code == 2
    assert said.err.startswith("Traceback")
    assert said.err.splitlines()[-1].startswith("rewrite: a bug")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent.pt2"], "absent.pt2: there is no such file or folder"),
        (["m.pt2", "--opset", "ten"], "--opset"),
        (["m.pt2", "--opset", "17"], "--opset 17 is out of range"),
        (["m.pt2", "--objective", "joules"], "--objective joules is unknown"),
        (["m.pt2", "--budget", "params=2"], "--budget params=2"),
        (["m.pt2", "--tokens", "many"], "--tokens many"),
        (["m.pt2", "--fast"], "No such option: --fast"),
        (["m.pt2", "n.pt2"], "n.pt2"),
        (["plan"], "MODEL"),
        (["verify", "m.pt2"], "'B'"),
        (["m.pt2", "-o", "absent/x.pt2"], "the folder absent does not exist"),
        (["m.pt2", "--report", "absent/r.json"], "--report absent/r.json cannot be written"),
        (["m.pt2", "-o", "/proc/x.pt2"], "the folder /proc cannot be written"),
        (["m.pt2", "--report", "/proc/r.json"], "--report /proc/r.json cannot be written"),
        (["m.pt2", "--report", "."], "--report . cannot be written"),
        (["m.pt2", "--report", "m.pt2"], "would overwrite the model"),
        (["m.pt2", "-o", "x.pt2", "--report", "./x.pt2"], "would overwrite the model"),
        (["passes", "nonsense"], "unknown pass 'nonsense'; there are: absorb, auto"),
        (["replay", "m.pt2"], "m.pt2 cannot be read as a report"),
    ],
)
def test_bad_usage_is_exit_2_before_any_work(rewrite: Rewrite, asked: Asked, words: list[str], said: str) -> None:
    found = rewrite(*words)
    assert found.code == 2
    assert said in found.err
    assert found.err.startswith("rewrite: ")
    assert found.err.count("\n") == 1
    assert not asked.calls


def test_help_names_options_commands_and_passes(rewrite: Rewrite) -> None:
    text = rewrite("--help").out
    for words, _ in GIVEN.values():
        assert words[0] in text
    for word in ("Inputs:", "Choice:", "Running:", "Commands:", "monarch:blocks=4:rank=2", "./plan", *cli._commands()):
        assert word in text
    assert rewrite().out == rewrite("rewrite", "-h").out == text


@pytest.mark.parametrize("command", ["plan", "verify", "bench", "diff", "passes", "replay"])
def test_every_command_has_help(rewrite: Rewrite, command: str) -> None:
    assert rewrite(command, "--help").out.startswith(f"Usage: rewrite {command}")


def test_version(rewrite: Rewrite) -> None:
    assert "rewriter 0.1.0" in rewrite("--version").out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rewriter import cli; cli.run(['--help']); cli.run(['absent']);"
        "sys.exit(str([m for m in ('torch', 'numpy', 'onnx', 'onnx_ir', 'onnxruntime', 'scipy', 'transformers') if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stderr.splitlines()[-1] == "[]"
    assert found.stdout.startswith("Usage: rewrite MODEL")


def test_a_reader_that_leaves_is_no_failure() -> None:
    command = f"{sys.executable} -c 'from rewriter.cli import main; main()' --help | head -1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert found.stderr == ""


@pytest.mark.parametrize("code", [0, 3])
def test_verify(rewrite: Rewrite, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    from rewriter import compare
    from tests.cli.samples import full_report

    calls: list[Options] = []

    def verify(a: str, b: str, options: Options) -> tuple[report.OutputError, int]:
        calls.append(options)
        found = full_report().output_error
        assert found is not None
        return found, code

    monkeypatch.setattr(compare, "verify", verify)
    words = "verify m.pt2 ./m.pt2 --max-error 0.25 --data d.npz --metric a:b --samples 3 --seed 2 --precision 0.01"
    said = rewrite(*words.split())
    assert said.code == code
    assert calls == [Options(max_error=0.25, data="d.npz", metric="a:b", samples=3, seed=2, precision=0.01)]
    verdict = "within" if code == 0 else "above"
    assert said.out.splitlines()[-1] == f"relative error at most 0.22 at 95% confidence, {verdict} --max-error 0.25"


def test_bench(rewrite: Rewrite, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter import compare
    from tests.cli.samples import comparison

    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(compare, "bench", lambda a, b, options, errors: (asked.append((a, b, errors)), comparison(*b))[1])
    said = rewrite("bench", "m.pt2", "m.pt2", "--tokens", "1,256", "--threads", "1")
    assert said.code == 0
    assert said.out.splitlines()[-1] == "B against A: 1.43x as fast at 1 token, 1.80x as fast at 256 tokens"
    said = rewrite("bench", "m.pt2", "m.pt2", "./m.pt2", "--plot", "p.svg")
    assert said.code == 0 and said.out.splitlines()[-1].startswith("./m.pt2 against A: 0.71x") and Path("p.svg").exists()
    assert asked == [("m.pt2", ["m.pt2"], False), ("m.pt2", ["m.pt2", "./m.pt2"], True)]


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(rewrite: Rewrite, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewriter import compare

    monkeypatch.setattr(compare, "bench", lambda *given, **named: pytest.fail("worked"))
    for plot, words in (("p.pdf", "give a file that ends in .png or .svg"), ("none/p.png", "give a file in a folder that exists")):
        said = rewrite("bench", "m.pt2", "m.pt2", "--plot", plot)
        assert said.code == 2 and words in said.err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = rewrite("bench", "m.pt2", "m.pt2", "--plot", "p.png")
    assert said.code == 2 and "pip install 'rewriter[plot]'" in said.err


def test_report_is_json_that_satisfies_its_schema(rewrite: Rewrite, asked: Asked, folder: Path) -> None:
    rewrite("m.pt2", "--report", "r.json")
    report.validate(json.loads((folder / "r.json").read_text()))
