"""The options as users type them, each spelled once: flags, metavar, help, group. A parameter is called like its field in `Options`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

INPUTS, CHOICE, RUNNING = "Inputs", "Choice", "Running"


def _argument(metavar: str, text: str) -> Any:
    return typer.Argument(metavar=metavar, help=text, show_default=False)


def _option(group: str | None, flags: str, metavar: str | None, text: str, default: bool = False) -> Any:
    """`default`: whether the help shows it; elsewhere the text says what happens without the option."""
    return typer.Option(*flags.split(), metavar=metavar, help=text, rich_help_panel=group, show_default=default)


Model = Annotated[str, _argument("MODEL", "a .pt2, .onnx, .safetensors or torch.save file, or a Hugging Face folder")]
A = Annotated[str, _argument("A", "the model to compare with: the dense one")]
B = Annotated[str, _argument("B", "the model to judge: the rewritten one")]
Bs = Annotated[list[str], _argument("B...", "the models to judge: rewritten ones")]
ReportFile = Annotated[str, _argument("REPORT.json", "what --report wrote")]
KernelAction = Annotated[str, _argument("[status|build]", "what to do; status by default")]
KernelModel = Annotated[str | None, _argument("[MODEL]", "a rewritten .onnx whose layers are listed")]
PassName = Annotated[str | None, _argument("[NAME]", "one pass or structure in detail")]

Passes = Annotated[str, _option(None, "--passes", "PASS,...", "what to apply, in order; see Passes below", default=True)]
Out = Annotated[str | None, _option(None, "-o --out", "OUT", "where the model goes  [default: MODEL.rewritten.SUFFIX]")]
Target = Annotated[
    str | None,
    _option(None, "--target", "NAME", "onnxruntime, onnx (standard operators) or torch  [default: by OUT, else the input's format]"),
]
Opset = Annotated[int, _option(None, "--opset", "N", "ONNX opset, 18 to 25", default=True)]

Inputs = Annotated[
    list[str] | None,
    _option(INPUTS, "--input", "NAME:DTYPE[DIM,...]", "an input of a module or state dict; a named dimension is dynamic; repeatable"),
]
Data = Annotated[
    str | None, _option(INPUTS, "--data", "FILE", ".npz of samples by input name, or .txt for a folder's tokenizer  [default: invented]")
]
Samples = Annotated[int, _option(INPUTS, "--samples", "N", "how many samples are invented without --data", default=True)]
Dims = Annotated[str | None, _option(INPUTS, "--dim", "NAME=N,...", "sizes of dynamic dimensions: batch=4,seq=64")]
Arch = Annotated[str | None, _option(INPUTS, "--arch", "MODULE:FACTORY", "builds the module that a state dict belongs to")]
Task = Annotated[str | None, _option(INPUTS, "--task", "TASK", "which head of a Hugging Face folder")]
Adapters = Annotated[
    list[str] | None, _option(INPUTS, "--adapter", "DIR[=SCALE]", "a LoRA adapter of the model, as peft saves it; repeatable")
]
Energy = Annotated[
    float | None,
    _option(
        INPUTS, "--energy", "X", "share of each adapter's change that is kept, by the least rank that does, linear by linear; above 0 to 1"
    ),
]
TrustPickle = Annotated[
    bool,
    _option(INPUTS, "--trust-pickle", None, "let a pickle run its code, for files that you would run as programs; recorded"),
]

Include = Annotated[list[str] | None, _option(CHOICE, "--include", "GLOB", "only sites with such names; repeatable")]
Exclude = Annotated[list[str] | None, _option(CHOICE, "--exclude", "GLOB", "no sites with such names; repeatable")]
Budget = Annotated[
    str | None,
    _option(CHOICE, "--budget", "UNIT=S", "a share of what all linears cost dense, in params, flops, nbytes or ms"),
]
Objective = Annotated[
    str | None,
    _option(CHOICE, "--objective", "UNIT", "what has to pay: params, flops, nbytes, ms  [default: the budget's unit, else ms]"),
]
MaxError = Annotated[
    float | None,
    _option(
        CHOICE, "--max-error", "X", "relative L2 error of the worst output, upper end of its interval; sites are given up until it holds"
    ),
]
Precision = Annotated[
    float | None,
    _option(CHOICE, "--precision", "P", "invent samples until the interval's half-width is this share of the error  [default: 0.05]"),
]
Metric = Annotated[str | None, _option(CHOICE, "--metric", "MODULE:FUNCTION", "a further figure: f(dense, rewritten, feeds) -> float")]
Tokens = Annotated[str, _option(CHOICE, "--tokens", "N,...", "token counts that a call brings; speed is judged at these", default=True)]

Report = Annotated[str | None, _option(RUNNING, "--report", "FILE.json", "write the report there too, also with exit code 1 and 3")]
Seed = Annotated[int, _option(RUNNING, "--seed", "N", "same seed, same bytes", default=True)]
Threads = Annotated[int, _option(RUNNING, "--threads", "N", "threads of every timed run", default=True)]
Cache = Annotated[str | None, _option(RUNNING, "--cache", "DIR", "where fits are kept  [default: $REWRITER_CACHE, else the user's cache]")]
Provider = Annotated[str, _option(RUNNING, "--provider", "EP", "ONNX Runtime execution provider", default=True)]
Plot = Annotated[str | None, _option(RUNNING, "--plot", "FILE", "a picture of error against time, .png or .svg; needs matplotlib")]
Kernels = Annotated[
    bool, _option(RUNNING, "--kernels", None, "time and choose as layers run in compiled kernels, under rewriter.inference_session")
]
Timing = Annotated[bool, _option(RUNNING, "--timing/--no-timing", None, "measure the whole model's latency  [default: timing]")]
Flatten = Annotated[bool, _option(RUNNING, "--flatten", None, "inline ONNX functions, for runtimes without them")]
AllowNoop = Annotated[bool, _option(RUNNING, "--allow-noop", None, "write the model even where nothing was rewritten")]
Force = Annotated[bool, _option(RUNNING, "--force", None, "replace an existing OUT; write it even where it is larger or slower")]
Quiet = Annotated[bool, _option(RUNNING, "--quiet", None, "print the last line only")]
Debug = Annotated[bool, _option(RUNNING, "--debug", None, "show the traceback of an error")]
