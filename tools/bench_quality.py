"""What a model is worth after compression: our forms and those of other tools on the same data in the same time, before and after healing.

    python tools/bench_quality.py [encoder] [language] [--budgets 0.5] [--minutes 15] [--rows "plain SVD" ours] [--heal blockwise=0.3]

encoder: all-MiniLM-L6-v2 on sentences of Python's documentation. language: a byte model, trained here once, on Python's sources; also with
two of every four numbers kept. All of it takes eleven hours; `--minutes 0` leaves healing out.

Every row is one `rewriter.plan`: its form, then `heal` for what is left of the minutes, calibration and fit included, so that rows take the
same time. All calibrate on the same samples and heal on the same text; the judges come from other files. A row of another form that leaves
a site out, or one that stores more than its budget, is red: it is not in the table and the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from bytelm import trained, windows
from minilm import LENGTH, embeddings, folder
from peers import AbstractPeer, check
from pytext import gather
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import cross_entropy

import rewriter
from rewriter.backends.files.folder import load_folder
from rewriter.backends.files.load import open_source
from rewriter.graph import Graph
from rewriter.options import Options
from rewriter.passes.heal import Heal
from rewriter.registry import parse_passes
from rewriter.rule import AbstractPass, Context, Decision

Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
CALIBRATION, HEALING, JUDGES = 2048, 8192, 600
PEERS = {
    "plain SVD": "svd", "SVD-LLM": "whitened", "Swift-SVD": "output", "COALA": "triangular", "magnitude 2:4": "magnitude",
    "Wanda 2:4": "wanda", "SparseGPT 2:4": "sparsegpt",
}  # fmt: skip
OURS = {"uniform Monarch": "monarch:blocks=4:params={0}", "ARMOR 2:4": "armor:n=2:m=4", "ours": "auto", "ours corrected": "auto,correct"}
PRUNED = ("magnitude 2:4", "Wanda 2:4", "SparseGPT 2:4", "ARMOR 2:4")
HALF = 0.5
FORMS = ("plain SVD", "SVD-LLM", "Swift-SVD", "COALA", "uniform Monarch", "ours", "ours corrected")


@dataclass
class Subject:
    """A model, the data of every row, and its judge."""

    model: Any
    include: tuple[str, ...]
    calibration: Any
    healing: Sequence[Mapping[str, Tensor]]
    heads: tuple[str, ...]
    judge: Callable[[Run], tuple[float, ...]]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AbstractJudged(AbstractPass):
    """Changes nothing: notes how good the model is now, and when."""

    name: ClassVar[str] = "judged"
    summary: ClassVar[str] = "a judge"
    judge: Callable[[Run], tuple[float, ...]]
    found: list[tuple[float, tuple[float, ...]]]

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        self.found.append((time.monotonic(), self.judge(graph.run)))
        yield from (context.decisions[site.id] for site in context.selected)


@dataclass(frozen=True)
class AbstractRest(AbstractPass):
    """`heal` until the deadline."""

    name: ClassVar[str] = "rest"
    summary: ClassVar[str] = "heal until then"
    heal: Heal
    end: float
    data: Any

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        yield from replace(self.heal, minutes=max(self.end - time.monotonic(), 1) / 60, data=self.data).run(graph, context)


def row(subject: Subject, form: str, budget: float, minutes: float, heal: Heal) -> tuple[list[str], str]:
    """The cells of one row; the second part says what is red, where something is."""
    options, given, found = dict(subject.options), list[AbstractPass | str](), list[tuple[float, tuple[float, ...]]]()
    begin = time.monotonic()
    if form in PEERS:
        given.append(AbstractPeer(PEERS[form], budget))
    else:
        given += OURS[form].format(budget).split(",")
        options |= {"budget": f"params={budget}"} if form.startswith("ours") else {"objective": "params"}
    given.append(AbstractJudged(subject.judge, found))
    if minutes:
        given += [AbstractRest(heal, begin + 60 * minutes, subject.healing), AbstractJudged(subject.judge, found)]
    with tempfile.TemporaryDirectory() as cache:  # no row finds what another one fitted
        options |= {"include": subject.include, "target": "torch", "cache": cache}
        report = rewriter.plan(subject.model, given, data=subject.calibration, **options).report
    rows = [s for s in report.sites if s.kind == "linear" and any(s.name.startswith(i.rstrip("*")) for i in subject.include)]
    before, after = (sum(s.cost["params"][end] for s in rows) for end in ("before", "after"))
    red = ""
    if not form.startswith("ours") and any(s.status == "kept" for s in rows):
        red = f"{form}: a site was not rewritten"
    if not form.endswith("2:4") and after > 1.001 * budget * before:
        red = f"{form}: {after / before:.3f} of the numbers exceeds {budget}"
    seconds = [t - begin for t, _ in found]
    cells = [form, f"{after / before:.3f}", f"{seconds[0]:.0f}", *(f"{x:.4f}" for x in found[0][1])]
    return cells + ([f"{seconds[1]:.0f}", *(f"{x:.4f}" for x in found[1][1])] if minutes else []), red


def _dense(model: Any, options: Mapping[str, Any]) -> Run:
    """The model as it is."""
    return open_source(model, Options(**options)).graph.run


def encoder() -> Subject:
    """all-MiniLM-L6-v2: sentences of Python's own documentation."""
    model, lines = load_folder(folder()), gather(JUDGES, held_out=True)
    dense = embeddings(_dense(str(folder()), {}), model, lines)
    upper = torch.triu_indices(len(lines), len(lines), 1)

    def nearest(e: Tensor) -> Tensor:
        return (e @ e.T).fill_diagonal_(-1).topk(10).indices

    def judge(run: Run) -> tuple[float, ...]:
        e = embeddings(run, model, lines)
        rho = spearmanr(*((x @ x.T)[upper[0], upper[1]].numpy() for x in (e, dense))).statistic
        recall = torch.stack([torch.isin(a, b).float().mean() for a, b in zip(nearest(e), nearest(dense), strict=True)]).mean()
        return float((e * dense).sum(1).mean()), float(rho), float(recall)

    healing = [dict(model.encode(part, LENGTH)) for part in _alike(gather(HEALING))]
    return Subject(str(folder()), ("encoder.*",), gather(CALIBRATION), healing, ("cosine", "Spearman", "recall@10"), judge)


def _alike(lines: Sequence[str], size: int = 16) -> Iterator[list[str]]:
    """Batches of sentences of like length, so that little is padding."""
    ordered = sorted(lines, key=len)
    return (ordered[i : i + size] for i in range(0, len(ordered), size))


def language() -> Subject:
    """The byte model: windows of Python's sources."""
    model, judges = trained(), windows(128, held_out=True)

    def judge(run: Run) -> tuple[float, ...]:
        losses = [cross_entropy(run({"tokens": t})["logits"][:, :-1].flatten(0, 1), t[:, 1:].flatten()) for t in judges.split(16)]
        return (math.exp(sum(map(float, losses)) / len(losses)),)

    healing = [{"tokens": t} for t in windows(HEALING // 4, seed=7).split(8)]
    data = {"tokens": windows(CALIBRATION // 8, seed=5).numpy()}
    return Subject(model, ("blocks.*",), data, healing, ("perplexity",), judge, {"inputs": ("tokens:int64[batch,256]",)})


def table(console: Console, title: str, subject: Subject, forms: Sequence[str], budget: float, minutes: float, heal: Heal) -> str:
    """Prints each row as soon as it is there (on standard error), and the table; what was red."""
    shown = Table(title=title)
    healed = ("s", *(f"{h}, healed" for h in subject.heads)) if minutes else ()
    for head in ("form", "params", "s", *subject.heads, *healed):
        shown.add_column(head, justify="left" if head == "form" else "right")
    problems = []
    for form in forms:
        cells, red = row(subject, form, budget, minutes, heal)
        Console(stderr=True, width=160).print(" ".join(cells), red, style="dim")
        problems += [red] if red else []
        if not red:
            shown.add_row(*cells)
    console.print(shown)
    return "; ".join(problems)


SUBJECTS = {"encoder": encoder, "language": language}


def judged(console: Console, name: str, given: argparse.Namespace) -> Iterator[str]:
    """All tables of one subject; yields what was red in each."""
    subject = SUBJECTS[name]()
    dense = subject.judge(_dense(subject.model, subject.options))
    console.print(f"{name}, dense: " + ", ".join(f"{head} {x:.4f}" for head, x in zip(subject.heads, dense, strict=True)))
    for budget in given.budgets:
        yield table(console, f"{name} at {budget} of its linears' numbers", subject, given.rows, budget, given.minutes, given.heal)
    if name == "language":
        yield table(console, "two of every four numbers kept", subject, PRUNED, HALF, 0.0, given.heal)


def healing(options: str) -> Heal:
    """`heal` with these options, as the command line spells them."""
    (found,) = parse_passes(f"heal:{options}")
    assert isinstance(found, Heal)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", choices=SUBJECTS, default=[*SUBJECTS], help="all by default")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.33], metavar="SHARE", help="of the dense numbers")
    parser.add_argument("--minutes", type=float, default=15.0, help="of every row, all in all; 0: no healing")
    parser.add_argument("--rows", nargs="+", choices=[*FORMS], default=FORMS, metavar="FORM", help=", ".join(FORMS))
    parser.add_argument("--heal", type=healing, default=Heal(), metavar="OPTIONS", help="of every row's healing, such as blockwise=0.3")
    given, console = parser.parse_args(), Console(width=150)
    check()
    problems = [problem for name in given.subjects for problem in judged(console, name, given) if problem]
    if problems:
        raise SystemExit("red: " + "; ".join(problems))


if __name__ == "__main__":
    main()
