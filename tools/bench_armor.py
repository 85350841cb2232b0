"""Half of a weight's numbers kept, 2:4: what pruning rules lose, and what ARMOR's wrappers get back, by block descent and by Adam.

    python tools/bench_armor.py [--large]

Weights of all-MiniLM-L6-v2 under the moments of 256 sentences of Python's own text, and synthetic ones. "loss" is ARMOR's proxy relative to
NoWag-P's; "error" is the weighted error under all second moments; "low rank" stores as many numbers as ARMOR. Adam gets the seconds that
the block descent took. Where a solver exceeds NoWag-P, a loss is not that of its factors, or a pattern is broken, nothing is printed and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from minilm import LENGTH, folder
from pytext import gather
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rewriter import registry
from rewriter.backends.files.folder import load_folder
from rewriter.backends.files.load import open_source
from rewriter.calibrate import Calibration, Samples
from rewriter.graph import load_weight
from rewriter.moments import Moments
from rewriter.options import Options
from rewriter.passes.solvers import pruning
from rewriter.passes.solvers.armor import Pattern, Wrapped, armor
from rewriter.passes.solvers.armor_adam import armor_adam
from rewriter.passes.solvers.armor_refit import refitted, repruned
from rewriter.passes.solvers.spectral import spectrum
from rewriter.tolerances import EQUAL

PATTERN, TRIAL = Pattern(), 10
LAYERS = {"encoder.layer.0.attention.self.query": 12, "encoder.layer.3.intermediate.dense": 16}  # blocks: the pass's own choice


@dataclass(frozen=True)
class Case:
    name: str
    weight: Tensor  # (m, n) float32
    moments: Moments
    block: int

    @property
    def numbers(self) -> int:
        m, n = self.weight.shape
        return m * n // 2 + (m + n) * self.block

    def loss(self, approximation: Tensor) -> float:
        """The proxy: relative to rows and columns of norm 1."""
        scales = pruning.Normalised.of(self.weight.double())
        gap = pruning.Normalised(self.weight - approximation, 1 / scales.rows, 1 / scales.columns)
        return float(((gap.rows[:, None] * gap.core * gap.columns).square() * self.moments.second.diagonal()).sum())


def trained() -> Iterator[Case]:
    """Layers of MiniLM; biases take the mean up, so moments are central."""
    graph = open_source(str(folder()), Options()).graph
    sites = [s for s in registry.sites(graph) if s.name in LAYERS]
    lines, model = gather(256), load_folder(folder())
    batches = [dict(model.encode(lines[i : i + 32], LENGTH)) for i in range(0, len(lines), 32)]
    for group in Calibration(graph, Samples(batches, "sentences", "")).moments(sites):
        for site, moments in group:
            assert moments is not None
            yield Case(site.name.removeprefix("encoder."), load_weight(graph, site), moments.centered(), LAYERS[site.name])


def synthetic(size: int, block: int) -> Case:
    """A normal weight; inputs correlated between neighbours, of many scales."""
    rng = torch.Generator().manual_seed(size)
    x = torch.randn(4 * size, size, generator=rng, dtype=torch.float64) * torch.linspace(0.3, 3, size)
    x = x + 0.7 * x.roll(1, 1)
    moments = Moments(x.T @ x / len(x), torch.zeros(size, dtype=torch.float64), len(x), "synthetic")
    return Case(f"normal {size:,} x {size:,}", torch.randn(size, size, generator=rng), moments, block)


def timed(work: Callable[[], Wrapped]) -> tuple[Wrapped, float]:
    begun = time.process_time()
    return work(), time.process_time() - begun


def wrappers(case: Case) -> Iterator[tuple[str, Tensor, float]]:
    """The two solvers, checked."""
    given = case.weight, case.moments.second.diagonal(), case.block, PATTERN
    exact, seconds = timed(lambda: armor(*given, torch.Generator().manual_seed(0)))
    _, trial = timed(lambda: armor_adam(*given, torch.Generator().manual_seed(0), TRIAL))
    steps = max(TRIAL, math.floor(seconds / trial * TRIAL))
    adam, spent = timed(lambda: armor_adam(*given, torch.Generator().manual_seed(0), steps))
    names = f"ARMOR, block descent, {len(exact.losses) - 1} sweeps", f"ARMOR, Adam, {steps} steps"
    for name, found, took in zip(names, (exact, adam), (seconds, spent), strict=True):
        check(case, name, found)
        yield name, found.dense(), took
        again, more = timed(lambda found=found: refitted(found, case.weight, case.moments.second))  # type: ignore[misc]
        yield f"{name}, values refitted", again.dense(), took + more


def check(case: Case, name: str, found: Wrapped) -> None:
    """The exit where a law is broken."""
    start = case.loss(pruning.nowag(case.weight, case.moments.second.diagonal(), 2, 4))
    true, rounding = case.loss(found.dense()), 10 * EQUAL[torch.float32][0] * start  # hundreds of moves are counted in single precision
    if not abs(true - found.losses[-1]) < rounding or true > start + rounding:
        sys.exit(f"{name} on {case.name}: a loss of {true}, {found.losses[-1]} is said, NoWag-P has {start}")
    if int((found.core.unflatten(1, (-1, PATTERN.m)) != 0).sum(2).max()) > PATTERN.n:
        sys.exit(f"{name} on {case.name}: more than {PATTERN.n} of {PATTERN.m} are kept")


def rows(case: Case) -> Iterator[tuple[str, Tensor, float]]:
    """Every way to approximate the weight, and its CPU seconds."""
    diagonal, second = case.moments.second.diagonal(), case.moments.second
    rules = {
        "magnitude": lambda: pruning.magnitude(case.weight, 2, 4),
        "Wanda": lambda: pruning.wanda(case.weight, diagonal, 2, 4),
        "NoWag-P": lambda: pruning.nowag(case.weight, diagonal, 2, 4),
        "SparseGPT": lambda: pruning.sparsegpt(case.weight, second, 2, 4),
        "SparseGPT, values refitted": lambda: repruned(pruning.sparsegpt(case.weight, second, 2, 4), case.weight, second),
    }
    for name, rule in rules.items():
        begun = time.process_time()
        yield name, rule(), time.process_time() - begun
    yield from wrappers(case)
    begun = time.process_time()
    down, up = spectrum(case.weight, second).truncate(max(1, case.numbers // sum(case.weight.shape)))
    yield "low rank", (down @ up).T, time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="a weight of 1,024 x 1,024 too")
    large = parser.parse_args().large
    torch.set_num_threads(1)
    tables = []
    for case in [*trained(), synthetic(512, 64), *([synthetic(1024, 32)] if large else [])]:
        m, n = case.weight.shape
        table = Table(title=f"{case.name}, {m:,} x {n:,}, blocks of {case.block}: {case.numbers / (m * n):.1%} of the numbers")
        for head in ("", "loss", "error", "CPU seconds"):
            table.add_column(head, justify="left" if not head else "right")
        start = case.loss(pruning.nowag(case.weight, case.moments.second.diagonal(), 2, 4))
        for name, found, seconds in rows(case):
            error = case.moments.error(case.weight, found)
            table.add_row(name, f"{case.loss(found) / start:.3f}", f"{error:.4f}", f"{seconds:.2f}")
        tables.append(table)
    for table in tables:
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
