"""Layers and recurrences on a CUDA device: Triton kernels over a dense layer under torch.compile (cuBLAS), in bfloat16, interleaved.

    python tools/bench_gpu.py [--widths 2048 4096 8192] [--tokens 1 16 256 4096] [--factor 4] [--seconds 0.5]

Of each family a member that stores 1/F of a square layer's numbers, with weights in bfloat16 and in int8; then products of Householder
factors over the chunked form in plain torch, which is launched from Python. All else is captured in CUDA graphs, so that no launch from
Python is in a figure; with few tokens each graph goes through so many copies of the weights that the second cache holds none of them.
"launched" is one token with every call launched from Python instead: what a program without CUDA graphs pays. Times are medians in
microseconds, behind them the median of paired ratios to the dense layer. What is timed is compared with its plain form in float32 first,
copy by copy; where one is off, no figure is printed.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rewriter.backends.eager import EagerOps
from rewriter.backends.kernels.plan import plan
from rewriter.backends.triton_kernels import chain, delta
from rewriter.backends.triton_kernels.device import ready
from rewriter.errors import RewriteError
from rewriter.operator import AbstractMatrix, flatten, unflatten
from rewriter.passes.structures.block_dense import BlockDense
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.passes.structures.low_rank import LowRank
from rewriter.passes.structures.monarch import Monarch
from rewriter.quantised import Quantised, quantised
from rewriter.timing import Timing
from rewriter.tolerances import EQUAL

FEW_TOKENS = 16  # up to which weights are cold
LEAST_CALLS, MOST_CALLS = 4, 64  # in one graph
LEAST_ROUNDS, MOST_ROUNDS = 7, 200
DENSE = "dense"
Call = Callable[[], Tensor]
Replay = tuple[Callable[[], object], int]  # and of how many calls


class Form(NamedTuple):
    """One way to compute, on several copies of its weights in turn, and what each is to give."""

    name: str
    calls: Sequence[Call]
    wanted: Sequence[Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape) / shape[-2] ** 0.5


def families(n: int, factor: int) -> dict[str, Callable[[], AbstractMatrix]]:
    """Makers of members at 1/factor of the numbers of an n x n layer: thin, column blocks, a grid, blocks of full middle width."""
    numbers, k, grid, both = n * n // factor, 4, 8, 2 * factor
    rank, wide, thin = (max(1, numbers // d) for d in (2 * n, k * (n // k + n), grid * 2 * n))
    return {
        "low-rank": lambda: LowRank(normal(n, rank), normal(rank, n)),
        "block-dense": lambda: BlockDense(normal(k, n // k, wide), normal(k * wide, n), n),
        "monarch": lambda: Monarch(normal(grid, n // grid, thin * grid), normal(grid, grid * thin, n // grid), n, n),
        "block-shuffle": lambda: Monarch(normal(both, n // both, n // both), normal(both, n // both, n // both), n, n),
    }


def integers(make: Callable[[], AbstractMatrix]) -> AbstractMatrix:
    made = quantised(make())
    assert made is not None
    return made


def moved(form: AbstractMatrix, device: torch.device, dtype: torch.dtype) -> AbstractMatrix:
    leaves, spec = flatten(form)
    made = unflatten(spec, [leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device) for leaf in leaves])
    assert isinstance(made, AbstractMatrix)
    return made


def structured(name: str, make: Callable[[], AbstractMatrix], x: Tensor, copies: int) -> Form:
    """A family in the kernels; it is to give what its plain form in float32 gives on the numbers that the kernel reads."""
    calls, wanted = [], []
    for _ in range(copies):
        form = make().to(x.dtype)
        tensors, spec = chain.flatten(plan(form))
        steps = chain.unflatten([tensor.to(x.device) for tensor in tensors], spec)
        calls.append(lambda steps=steps: chain.run(steps, x))
        wide = moved(form, x.device, torch.float32)
        wanted.append((wide.inside if isinstance(wide, Quantised) else wide).product(EagerOps(), x.float()))
    return Form(name, calls, wanted)


def dense(n: int, x: Tensor, copies: int, linear: Callable[[Tensor, Tensor], Tensor]) -> Form:
    weights = [(torch.randn(n, n, device=x.device) / n**0.5).to(x.dtype) for _ in range(copies)]
    return Form(DENSE, [lambda w=w: linear(x, w) for w in weights], [x.float() @ w.float().T for w in weights])


def copies_of(nbytes: float, tokens: int, device: torch.device) -> int:
    """Twice what the second cache holds, while there are few tokens."""
    if tokens > FEW_TOKENS or device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_CALLS, max(LEAST_CALLS, math.ceil(2 * cache / nbytes)))


def forms(n: int, tokens: int, factor: int, device: torch.device, linear: Callable[[Tensor, Tensor], Tensor]) -> list[Form]:
    """The dense layer, then every family with weights in bfloat16 and in int8."""
    x = torch.randn(tokens, n).to(device, torch.bfloat16)
    found = [dense(n, x, copies_of(2 * n * n, tokens, device), linear)]
    for name, make in families(n, factor).items():
        nbytes = 2 * n * n / factor
        found.append(structured(name, make, x, copies_of(nbytes, tokens, device)))
        found.append(structured(f"{name} int8", functools.partial(integers, make), x, copies_of(nbytes / 2, tokens, device)))
    return found


def check(form: Form, found: Sequence[Tensor]) -> None:
    """SystemExit unless every copy gives what it is to, in units of the largest: outputs of a recurrence are small."""
    rtol, atol = EQUAL[found[0].dtype]
    pairs = zip(found, form.wanted, strict=True)
    if not all(torch.allclose(y.float(), wanted, rtol, atol * float(wanted.abs().max())) for y, wanted in pairs):
        raise SystemExit(f"red: {form.name} differs from its plain form; no figure is printed")


def graphed(form: Form) -> Replay:
    """The calls in a CUDA graph, checked."""
    repeats = -(-LEAST_CALLS // len(form.calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and times the kernels' tiles, which a capture admits not
        for _ in range(3):
            warm = [call() for call in form.calls]
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    check(form, warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [call() for _ in range(repeats) for call in form.calls]
    graph.replay()
    torch.cuda.synchronize()
    check(form, found[: len(form.calls)])
    return graph.replay, len(found)


def launched(form: Form) -> Replay:
    """The calls from Python, one after the other."""
    check(form, [call() for call in form.calls])
    return lambda: [call() for call in form.calls], len(form.calls)


def elapsed(call: Callable[[], object]) -> float:
    """Seconds on the device from before the first kernel to behind the last."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(calls: Sequence[Replay], seconds: float) -> Timing:
    """As rewriter.timing.interleave, by the device's clock: in turn, seconds of one call."""
    for call, _ in calls:
        elapsed(call)
    samples: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    while len(samples[0]) < MOST_ROUNDS and (len(samples[0]) < LEAST_ROUNDS or time.perf_counter() - begin < seconds * len(calls)):
        for row, (call, count) in zip(samples, calls, strict=True):
            row.append(elapsed(call) / count)
    return Timing(tuple(map(tuple, samples)))


def column(found: Sequence[Form], replays: Sequence[Replay], seconds: float) -> dict[str, str]:
    """Of each form its time, and how many times as fast as the first it is."""
    timing = interleaved(replays, seconds)
    cells = {}
    for i, form in enumerate(found):
        low, middle, high = timing.ratio(0, i)
        cells[form.name] = f"{timing.seconds(i) * 1e6:.1f}" + (f"  {middle:.2f} [{low:.2f}, {high:.2f}]" if i else "")
    return cells


def show(console: Console, title: str, columns: dict[str, dict[str, str]]) -> None:
    table = Table("form", *columns, title=title)
    for name in next(iter(columns.values())):
        table.add_row(name, *(cells[name] for cells in columns.values()))
    console.print(table)


def recurrences(tokens: int, factors: int, device: torch.device, heads: int, width: int) -> list[Form]:
    """Gated products of Householder factors, keys of length 1 and strengths up to 2: in plain torch, and in the kernels."""
    operator = LinearAttention(heads, width, width, heads, heads, factors=factors, decay="head", scale=width**-0.5)
    sizes = {"batch": 1, "time": tokens}
    xs = {name: torch.randn([n if isinstance(n, int) else sizes[n] for n in dims]) for name, dims in operator.inputs().items()}
    xs["key"] = torch.nn.functional.normalize(xs["key"].unflatten(2, (-1, width)), dim=-1).flatten(2)
    xs |= {"decay": -xs["decay"].abs() / 8, "beta": 2 * xs["beta"].sigmoid(), "state": xs["state"] / width}
    given, of = [x.to(device, torch.bfloat16) for x in xs.values()], delta.covered(operator)
    wanted = operator.spelled("chunked", EagerOps(), *[x.float() for x in given])[0]

    def plain() -> Tensor:
        made: Tensor = operator.spelled("chunked", EagerOps(), *[x.float() for x in given])[0].to(torch.bfloat16)
        return made

    def kernel() -> Tensor:
        return delta.run(of, given)[0]

    return [Form("plain torch", [plain], [wanted]), Form("kernel", [kernel], [wanted]), Form("kernel in a graph", [kernel], [wanted])]


def linear(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, w)


def main(device: torch.device, given: argparse.Namespace) -> None:
    console = Console(width=190)
    torch._dynamo.config.recompile_limit = 64  # a dense product for each shape
    compiled = torch.compile(linear, dynamic=False)
    if device.type == "cuda":
        console.print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for n in given.widths:
        columns = {}
        for tokens in given.tokens:
            found = forms(n, tokens, given.factor, device, compiled)
            columns[f"T={tokens}"] = column(found, [graphed(form) for form in found], given.seconds)
            if tokens == 1:
                columns["T=1, launched"] = column(found, [launched(form) for form in found], given.seconds)
        show(console, f"{n} x {n} at 1/{given.factor} in bfloat16: microseconds, times as fast as dense [10th, 90th percentile]", columns)
    for factors in (1, 2):
        columns = {}
        for tokens in given.tokens:
            found = recurrences(tokens, factors, device, given.heads, given.head_width)
            columns[f"T={tokens}"] = column(found, [launched(found[0]), launched(found[1]), graphed(found[2])], given.seconds)
        size = f"{factors} Householder factor{'s' * (factors > 1)} a token, {given.heads} heads of {given.head_width}"
        show(console, f"{size}, in bfloat16: microseconds, times as fast as plain torch [10th, 90th percentile]", columns)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=(2048, 4096, 8192), metavar="N")
    parser.add_argument("--tokens", nargs="+", type=int, default=(1, 16, 256, 4096), metavar="T")
    parser.add_argument("--factor", type=int, default=4, metavar="F")
    parser.add_argument("--heads", type=int, default=16, metavar="H")
    parser.add_argument("--head-width", type=int, default=128, metavar="N")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="S", help="of each form in each cell")
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments(sys.argv[1:])
    torch.manual_seed(0)
    try:
        main(ready("cuda"), options)
    except RewriteError as error:
        print(f"this benchmark needs a CUDA device: {error}", file=sys.stderr)
        sys.exit(2)
