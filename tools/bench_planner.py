"""The planner's pick against every form of a product or sum, measured under ONNX Runtime.

    python tools/bench_planner.py [--tokens 1 8 64 256] [--threads 1] [--kernels]

A cell is the picked form's seconds over those of the fastest form, both measured again after the pick, interleaved in one process, the
median over repeats with the least and the largest in brackets. "Each" asks the planner for that token count alone, "all" for all of them at
once, where it may keep two forms behind one dispatch. Before anything is printed, every form is compared with the first, and every picked
one under ONNX Runtime too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rewriter.algebra import ByTokens, Compose, Dense, Sparse, Sum
from rewriter.backends.eager import EagerOps
from rewriter.backends.kernels.covering import covers
from rewriter.backends.kernels.session import trusted
from rewriter.backends.onnx.emit import attach, default_lowering
from rewriter.backends.onnx.lowering import chooser
from rewriter.backends.onnx.measure import KERNEL, body_call, copies_of, covered, measure, stacked
from rewriter.backends.onnx.run import CPU, Session
from rewriter.operator import AbstractMatrix, flatten
from rewriter.passes.planning.choice import chosen
from rewriter.passes.planning.forms import dense, products, sums
from rewriter.passes.structures.low_rank import LowRank
from rewriter.passes.structures.monarch import Monarch
from rewriter.timing import interleave
from rewriter.tolerances import EQUAL

import onnx_ir as ir  # isort: skip

TARGET = 1.1
REPEATS, SECONDS = 3, 0.15


def normal(*shape: int) -> Tensor:
    """Weights that keep values of order one."""
    return torch.randn(*shape) / shape[-2] ** 0.5


def low_rank(n: int, r: int, m: int) -> LowRank:
    return LowRank(normal(n, r), normal(r, m))


def with_dense(operator: AbstractMatrix) -> list[AbstractMatrix]:
    """What is weighed at a factored site."""
    return [dense(operator), *products(operator)]


CASES: dict[str, list[AbstractMatrix]] = {
    "768 -> 64 -> 3072, a low rank": with_dense(low_rank(768, 64, 3072)),
    "768 -> 384 -> 768, a low rank that saves nothing": with_dense(low_rank(768, 384, 768)),
    "two low ranks in a row, 96 and 160": products(Compose((low_rank(768, 96, 3072), low_rank(3072, 160, 768)))),
    "three dense in a row, 768 -> 32 -> 2048 -> 768": products(Compose((*low_rank(768, 32, 2048).as_product(), Dense(normal(2048, 768))))),
    "monarch 4 x 4, half of the numbers": with_dense(Monarch(normal(4, 192, 192), normal(4, 192, 192), 768, 768)),
    "monarch 32 x 32, 1024": with_dense(Monarch(normal(32, 32, 128), normal(32, 128, 32), 1024, 1024)),
    "2 of 4 kept, 2048": with_dense(Sparse.of(normal(2048, 2048), 2, 4, 16)),
    "dense and an adapter of rank 16": sums([Dense(normal(768, 768)), low_rank(768, 16, 768)]),
    "low rank and an adapter of rank 16": sums([low_rank(768, 192, 768), low_rank(768, 16, 768)]),
}  # fmt: skip


def checked(name: str, forms: Sequence[AbstractMatrix]) -> None:
    """All of them are one matrix; exits where one is not."""
    x = normal(5, forms[0].shape[1])
    expected = forms[0].product(EagerOps(), x)
    rtol, atol = EQUAL[torch.float32]
    for form in forms:
        if not torch.allclose(form.product(EagerOps(), x), expected, rtol=rtol, atol=atol * float(expected.abs().max())):
            sys.exit(f"{name}: {type(form).__name__} is another matrix; no figures")


def runs_right(name: str, form: AbstractMatrix, threads: int, kernels: bool) -> None:
    """The picked one under ONNX Runtime, at few and many tokens; exits where it is off."""
    model = stacked([form], 2)
    library = covered(model, threads) if kernels else ""
    attach(model, default_lowering)
    session = Session(ir.to_proto(model).SerializeToString(), threads, library=library)
    rtol, atol = EQUAL[torch.float32]
    for tokens in (1, 300):
        x = normal(tokens, form.shape[1])
        expected = form.product(EagerOps(), x)
        if not torch.allclose(session({"x": x})["y0"], expected, rtol=rtol, atol=atol * float(expected.abs().max())):
            sys.exit(f"{name}: {type(form).__name__} gives other numbers at {tokens} tokens; no figures")


def picked(forms: Sequence[AbstractMatrix], tokens: Sequence[int], threads: int, kernels: bool) -> AbstractMatrix:
    def seconds(among: Sequence[AbstractMatrix]) -> list[list[float]]:
        return [measure(among, count, threads, contrib=True, kernels=kernels) for count in tokens]

    return chosen(tokens, seconds, forms, seconds(forms), two=True).form


def over_best(pick: AbstractMatrix, forms: Sequence[AbstractMatrix], tokens: int, threads: int, kernels: bool) -> list[float]:
    """By repeat, the pick's seconds over the fastest one's."""
    choose = chooser((tokens,), threads, True)
    calls = []
    for form in (pick, *forms):
        spec = flatten(form)[1]
        lowering = KERNEL if kernels and covers(form, trusted()) else choose(spec, 2)
        calls.append((body_call(spec, lowering, 2, tokens, threads, copies_of(spec, tokens), CPU, 20), copies_of(spec, tokens)))
    found = []
    for _ in range(REPEATS):
        timing = interleave([call for call, _ in calls], seconds=SECONDS)
        first, *others = (timing.seconds(i) / copies for i, (_, copies) in enumerate(calls))
        found.append(first / min(first, *others))
    return found


def cell(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"


def said(form: AbstractMatrix, forms: Sequence[AbstractMatrix]) -> str:
    """By the place among the forms."""
    if isinstance(form, ByTokens):
        return f"{said(form.few, forms)} up to {form.most}, then {said(form.many, forms)}"
    factors = form.factors if isinstance(form, Compose) else form.terms if isinstance(form, Sum) else (form,)
    return (" + " if isinstance(form, Sum) else " . ").join(f"{type(f).__name__} {f.shape[0]}x{f.shape[1]}" for f in factors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernels", action="store_true", help="what kernels cover runs in them")
    options = parser.parse_args()
    torch.manual_seed(0)
    for name, forms in CASES.items():
        checked(name, forms)
    table = Table(
        title=f"seconds of the pick / of the fastest form, {options.threads} threads{', kernels' * options.kernels}; target {TARGET}"
    )
    for column in ("forms", "asked for", *(f"T = {count}" for count in options.tokens), "picked for all"):
        table.add_column(column)
    within = cells = 0
    ask = partial(picked, threads=options.threads, kernels=options.kernels)
    for name, forms in CASES.items():
        whole = ask(forms, options.tokens)
        each = [ask(forms, [count]) for count in options.tokens]
        for form in (whole, *each):
            runs_right(name, form, options.threads, options.kernels)
        for label, picks in (("each", each), ("all", [whole] * len(each))):
            found = [
                over_best(pick, forms, count, options.threads, options.kernels) for pick, count in zip(picks, options.tokens, strict=True)
            ]
            within, cells = within + sum(statistics.median(r) <= TARGET for r in found), cells + len(found)
            shown = (f"{name} ({len(forms)} forms)", said(whole, forms)) if label == "each" else ("", "")
            table.add_row(shown[0], label, *map(cell, found), shown[1])
    console = Console(width=200)
    console.print(table)
    console.print(f"{within} of {cells} within {TARGET}")


if __name__ == "__main__":
    main()
