"""Block coordinate descent: which selection, which update, which blocks get furthest in the same number of iterations.

    python tools/bench_descent.py

Problems in the manner of Nutini, Laradji and Schmidt (JMLR 23(131), 2022, section 7): sparse least squares and logistic regression with
columns of many scales, and label propagation on a graph with two labelled nodes. A figure is f - f* after the iterations, relative to the
start; the claims below the tables are the paper's, each held against these figures. Where a descent rises, disagrees with its own f, or a
forest's messages differ from a dense solve, nothing is printed and the exit code is 1.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence

import networkx
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from rewriter.passes.solvers.bcd.engine import AbstractSelection, AbstractUpdate, Stage, Stop, minimise
from rewriter.passes.solvers.bcd.forest import graph_of, solve_forest
from rewriter.passes.solvers.bcd.partition import averaged, by_lipschitz, forests, in_order
from rewriter.passes.solvers.bcd.selection import Cyclic, Greedy, Permuted, Random, Top, TopForest
from rewriter.passes.solvers.bcd.smooth import AbstractSmooth, LeastSquares, Logistic, Quadratic
from rewriter.passes.solvers.bcd.update import Forest, Gradient, Newton
from rewriter.tolerances import EQUAL

ROWS, COLUMNS, SIZES, ITERATIONS, SIDE, SEEDS = 300, 1500, (5, 50), 300, 24, (0, 1, 2)
Select = AbstractSelection[Tensor]
Update = AbstractUpdate[Tensor, Tensor]
Lowest = Sequence[float]  # f*, a seed each
Gaps = Mapping[tuple[str, str, str, int], float]  # by update, rule, problem and block size
Rules = Mapping[str, tuple[Callable[[AbstractSmooth, int], Select], Update]]


def columns(seed: int) -> Tensor:
    """Entries 1 + N(0, 1), columns scaled by 10 N(0, 1), each kept with probability 10 log n / n: the paper's data set A."""
    rng = torch.Generator().manual_seed(seed)
    a = (1 + torch.randn(ROWS, COLUMNS, generator=rng, dtype=torch.float64)) * 10 * torch.randn(COLUMNS, generator=rng, dtype=torch.float64)
    return a * (torch.rand(ROWS, COLUMNS, generator=rng) < 10 * math.log(COLUMNS) / COLUMNS)


def targets(a: Tensor, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed + 100)
    planted = torch.randn(COLUMNS, generator=rng, dtype=torch.float64) * (torch.rand(COLUMNS, generator=rng) < 0.1)
    return a @ planted + torch.randn(ROWS, generator=rng, dtype=torch.float64)


def least_squares(seed: int) -> AbstractSmooth:
    a = columns(seed)
    return LeastSquares(a, targets(a, seed))


def logistic(seed: int) -> AbstractSmooth:
    a = columns(seed)
    return Logistic(a, targets(a, seed).sign(), ridge=1.0)


def labels(seed: int) -> Quadratic:
    """Label propagation on a grid with random weights: sum w_ij (x_i - x_j)^2 / 2, two nodes held at -1 and 1."""
    rng = torch.Generator().manual_seed(seed)
    grid = networkx.convert_node_labels_to_integers(networkx.grid_2d_graph(SIDE, SIDE))
    weights = torch.zeros(len(grid), len(grid), dtype=torch.float64)
    for i, j in grid.edges:
        weights[i, j] = weights[j, i] = torch.rand((), generator=rng, dtype=torch.float64)
    laplacian = torch.diag(weights.sum(1)) - weights
    held, free = torch.tensor([0, len(grid) - 1]), torch.arange(1, len(grid) - 1)
    return Quadratic(laplacian[free][:, free], -laplacian[free][:, held] @ torch.tensor([-1.0, 1.0], dtype=torch.float64))


def best(make: Callable[[int], AbstractSmooth], seed: int) -> float:
    """f*, by Newton's method on all coordinates at once."""
    whole = make(seed)
    if isinstance(whole, LeastSquares):
        return float((whole.a @ torch.linalg.lstsq(whole.a, whole.b, driver="gelsd").solution - whole.b).square().sum()) / 2
    return minimise(whole, [Stage("all", Cyclic([torch.arange(len(whole.x))]), Newton())], Stop(40), torch.Generator()).value


def gap(
    make: Callable[[int], AbstractSmooth], select: Callable[[AbstractSmooth], Select], update: Update, lowest: Sequence[float]
) -> float:
    """The geometric mean over the seeds of (f - f*) / (f_0 - f*); the exit where a descent rises or loses count."""
    logs = []
    for seed, least in zip(SEEDS, lowest, strict=True):
        problem = make(seed)
        found = minimise(problem, [Stage("", select(problem), update)], Stop(ITERATIONS), torch.Generator().manual_seed(seed))
        start = found.values[0]
        rises = any(b > a for a, b in itertools.pairwise(found.values))
        if rises or not math.isclose(problem.value(), found.value, rel_tol=1e-6, abs_tol=1e-9 * abs(start)):
            sys.exit(f"{select(problem)} with {update}: f rose, or is {problem.value()} where the descent counted {found.value}")
        logs.append(math.log10(max((problem.value() - least) / (start - least), 1e-16)))
    return 10 ** (sum(logs) / len(logs))


def rules(update: Update, matrix: bool) -> Rules:
    found: dict[str, Callable[[AbstractSmooth, int], Select]] = {
        "cyclic": lambda f, n: Cyclic(in_order(len(f.x), n)),
        "permuted": lambda f, n: Permuted(in_order(len(f.x), n)),
        "random": lambda f, n: Random(in_order(len(f.x), n)),
        "GS, fixed": lambda f, n: Greedy(by_lipschitz(f.diagonal, n), "gs"),
        "GSL, fixed": lambda f, n: Greedy(by_lipschitz(f.diagonal, n), "gsl"),
        "GSD, fixed": lambda f, n: Greedy(by_lipschitz(f.diagonal, n), "gsd"),
        "GS, variable": lambda f, n: Top(n, "gs"),
        "GSL, variable": lambda f, n: Top(n, "gsl"),
        "GSD, variable": lambda f, n: Top(n, "gsd"),
    }
    if matrix:
        found["GSQ, variable"] = lambda f, n: Top(n, "gsq")
    return {name: (select, update) for name, select in found.items()}


def measured(console: Console) -> Gaps:
    """By update, rule, problem and block size."""
    problems = {"least squares": least_squares, "logistic": logistic}
    lowest = {name: [best(make, seed) for seed in SEEDS] for name, make in problems.items()}
    kinds = {"gradient": rules(Gradient(), False), "matrix": rules(Newton(bound=True), True)}
    every = [(u, r, p, n) for u in kinds for r in kinds[u] for p in problems for n in SIZES]
    found = {}
    for u, r, p, n in track(every, "descending", console=console, transient=True):
        select, update = kinds[u][r]
        found[u, r, p, n] = gap(problems[p], lambda f, select=select, n=n: select(f, n), update, lowest[p])  # type: ignore[misc]
    return found


def partitions() -> dict[str, float]:
    """Fixed blocks of 5 under GSL and Newton, by how they are dealt."""
    lowest = [best(least_squares, seed) for seed in SEEDS]
    deals = {"order": lambda d, n: in_order(len(d), n), "average": averaged, "sort": by_lipschitz}
    return {
        name: gap(least_squares, lambda f, deal=deal: Greedy(deal(f.diagonal, 5), "gsl"), Newton(), lowest)  # type: ignore[misc]
        for name, deal in deals.items()
    }


def trees() -> dict[str, float]:
    """Label propagation: forests by messages against dense blocks that cost as much, n^(1/3) coordinates."""
    lowest = [best(labels, seed) for seed in SEEDS]
    small = round((SIDE * SIDE) ** (1 / 3))

    def random(f: AbstractSmooth) -> Tensor:
        return torch.rand(len(f.x), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def graph(f: AbstractSmooth) -> networkx.Graph:
        assert isinstance(f, Quadratic)
        return graph_of(f.h)

    return {
        "greedy forest": gap(labels, lambda f: TopForest(graph(f)), Forest(), lowest),
        "forests by Lipschitz constant, cyclic": gap(labels, lambda f: Cyclic(forests(graph(f), f.diagonal)), Forest(), lowest),
        "random forests, cyclic": gap(labels, lambda f: Cyclic(forests(graph(f), random(f))), Forest(), lowest),
        f"dense blocks of {small}, GSD, variable": gap(labels, lambda f: Top(small), Newton(), lowest),
        f"dense blocks of {small}, cyclic": gap(labels, lambda f: Cyclic(in_order(len(f.x), small)), Newton(), lowest),
    }


def forest_error() -> float:
    """The largest relative difference of a forest's messages from a dense solve; the exit where it is no rounding."""
    worst = 0.0
    for seed in SEEDS:
        f = labels(seed)
        block = next(iter(TopForest(graph_of(f.h)).blocks(f, torch.Generator())))
        h, c = f.hessian(block), f.slope(block)
        dense = torch.linalg.solve(h, c)
        worst = max(worst, float((solve_forest(h, c) - dense).norm() / dense.norm()))
    if worst > 100 * EQUAL[torch.float64][0]:
        sys.exit(f"messages on a forest are off by {worst:.1e}")
    return worst


def claims(found: Gaps, dealt: Mapping[str, float], tree: Mapping[str, float]) -> list[tuple[str, str]]:
    """What the paper says, and where it holds here."""
    cases = [(p, n) for p in ("least squares", "logistic") for n in SIZES]
    turns, greedy, variable = ("cyclic", "permuted", "random"), ("GSL, fixed", "GSD, fixed"), ("GSD, variable", "GSQ, variable")

    def before(update: str, first: Sequence[str], *others: str, factor: float = 1.0) -> str:
        """Whether the best of `first` is no further from f* than `factor` times the best of the others."""

        def least(names: Sequence[str], p: str, n: int) -> float:
            return min(found[update, name, p, n] for name in names if (update, name, p, n) in found)

        where = [f"{p}, {n}" for p, n in cases if least(first, p, n) > factor * least(others, p, n)]
        return f"not for {'; '.join(where)}" if where else "in all 4"

    fixed, any_size = (*turns, "GS, fixed", *greedy), (*variable, "GS, variable", "GSL, variable")
    return [
        ("matrix update: variable blocks first, by whatever score", before("matrix", any_size, *fixed)),
        ("matrix update: variable blocks by GSD or GSQ first", before("matrix", variable, *fixed, "GS, variable", "GSL, variable")),
        ("matrix update: GSD is enough, within 10 times GSQ's gap", before("matrix", variable[:1], variable[1], factor=10)),
        ("gradient update: variable blocks by GSL first", before("gradient", ("GSL, variable",), *fixed, "GS, variable", "GSD, variable")),
        ("matrix update, fixed blocks: greedy before cyclic and random", before("matrix", greedy, *turns)),
        ("matrix update, fixed blocks: cyclic or permuted before random", before("matrix", turns[:2], "random")),
        ("sorted blocks before ordered and averaged ones", "yes" if dealt["sort"] <= min(dealt.values()) else "no"),
        ("the greedy forest first", "yes" if tree["greedy forest"] <= min(tree.values()) else "no"),
    ]


def main() -> None:
    console = Console(width=130)
    worst, found, dealt, tree = forest_error(), measured(console), partitions(), trees()
    table = Table(title=f"(f - f*) / (f_0 - f*) after {ITERATIONS} iterations; {ROWS} x {COLUMNS}, {len(SEEDS)} seeds, geometric mean")
    for head in ("update", "blocks", *(f"{p}, {n} a block" for p in ("least squares", "logistic") for n in SIZES)):
        table.add_column(head)
    for update, rule in dict.fromkeys((u, r) for u, r, _, _ in found):
        figures = (f"{found[update, rule, p, n]:.1e}" for p in ("least squares", "logistic") for n in SIZES)
        table.add_row(update, rule, *figures)
    other = Table(title=f"GSL, Newton, least squares, blocks of 5; label propagation on {SIDE} x {SIDE} nodes")
    for head in ("blocks", "(f - f*) / (f_0 - f*)"):
        other.add_column(head)
    for name, value in (*dealt.items(), *tree.items()):
        other.add_row(name, f"{value:.1e}")
    said = Table(title=f"the paper's ranking; messages on a forest against a dense solve: {worst:.1e}")
    for head in ("claim", "holds here"):
        said.add_column(head)
    for claim in claims(found, dealt, tree):
        said.add_row(*claim)
    for part in (table, other, said):
        console.print(part)


if __name__ == "__main__":
    main()
