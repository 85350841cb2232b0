"""Dense linear recurrences made diagonal: what plain eigenvectors give, what the ladder takes, and whether its certificate holds.

    python tools/bench_diagonalize.py

Errors are relative. "on the grid" is the largest on 4,000 angles, each by a dense solve in float64, and must be at most "certified"; the
stored numbers simulated in float64 must obey the certificate too. Where one does not, nothing is printed and the exit code is 1. "fp32 run"
is the float32 recurrence over 1024 steps of white input against the dense one in float64, and "expected" what the ladder foretold for it.
A second row is the perturbed rung alone, where an earlier one was taken: the floor of float32 for that matrix.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rewriter.passes.solvers.diagonalize import Diagonalised, Form, diagonalize
from rewriter.passes.solvers.eigenform import condition, eigenform
from rewriter.passes.solvers.linear_system import System
from rewriter.passes.solvers.modal_error import Reference
from rewriter.passes.solvers.modes import Modes
from rewriter.passes.solvers.s4d import discretize, hippo_legs

STEPS, ANGLES, TOLERANCE = 1024, 4_000, 1e-3
LADDER: tuple[Form, ...] = ("eig", "truncated", "perturbed")
HEADS = ("recurrence", "n", "eig: kappa", "certified fp64", "fp32 run", "taken", "order", "|E|/|A|", "kappa")
ERRORS = ("on the grid", "certified", "expected", "fp32 run", "CPU s")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recurrences() -> Iterator[tuple[str, System]]:
    for method in ("bilinear", "zoh"):
        for n in (16, 32, 64, 128):
            yield f"HiPPO-LegS {method}", System.of(*discretize(*hippo_legs(n), 0.01, method), normal(1, n, seed=1))
    shift = torch.eye(128, dtype=torch.float64).roll(1, 1).triu(1)
    eye, dense = torch.eye(128, dtype=torch.float64), normal(128, 128, seed=2)
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    triangular = normal(64, 64, seed=3).triu(1) / 8 + torch.diag(0.95 * (2 * uniform - 1))
    for name, a, ports in (
        ("random dense, rho .95", 0.95 * dense / torch.linalg.eigvals(dense).abs().max(), 16),
        (".99 orthogonal", 0.99 * torch.linalg.qr(dense).Q, 16),
        ("Jordan .5, .5", (0.5 * eye + 0.5 * shift)[:32, :32], 1),
        ("Jordan .5, .5, 4 ports", (0.5 * eye + 0.5 * shift)[:32, :32], 4),
        ("Jordan .9, .1", (0.9 * eye + 0.1 * shift)[:32, :32], 1),
        ("random triangular", triangular, 1),
        ("random triangular, 8 ports", triangular, 8),
    ):
        yield name, System.of(a, normal(len(a), ports, seed=5), normal(ports, len(a), seed=6))


def run_error(system: System, modes: Modes, dtype: torch.dtype) -> tuple[float, float]:
    """Of a simulation in that dtype, against the output and against the input."""
    u = normal(STEPS, system.b.shape[1], seed=7)
    expected = system.simulate(u)[0]
    gap = float(torch.linalg.norm(modes.real(dtype).simulate(u)[0].double() - expected))
    return gap / float(torch.linalg.norm(expected)), gap / float(torch.linalg.norm(u))


def plain(system: System) -> list[str]:
    """kappa, certified error in float64 and float32 run of A's own eigenvectors."""
    kappa, form, reference = condition(torch.linalg.eig(system.a).eigenvectors), eigenform(system), Reference.of(system)
    if form is None or reference is None:
        return [f"{kappa:.0e}", "no basis", "fails"]
    run = run_error(system, form.modes, torch.float32)[0]
    return [f"{form.kappa:.0e}", f"{reference.error(form.modes, torch.float64).relative:.0e}", f"{run:.1e}"]


def on_the_grid(system: System, modes: Modes) -> tuple[float, float]:
    """The largest |G - G'| over the circle, and the largest |G|."""
    angles = torch.linspace(0, math.pi, ANGLES, dtype=torch.float64)
    exact, near = system.transfer(angles), modes.real(torch.float64).system().transfer(angles)
    return float(torch.linalg.matrix_norm(near - exact, 2).max()), float(torch.linalg.matrix_norm(exact, 2).max())


def row(system: System, result: Diagonalised, seconds: float) -> tuple[list[str], bool]:
    """The ladder's half of a row, and whether its certificate held."""
    if result.modes is None:
        return ["dense", str(len(system.a)), *["-"] * 6, f"{seconds:.1f}"], True
    stored, error = result.modes.stored(torch.float32), result.error
    gap, size = on_the_grid(system, stored)
    held = gap <= error.transfer and run_error(system, stored, torch.float64)[1] <= error.transfer
    expected, run = error.white + error.rounding, run_error(system, result.modes, torch.float32)[0]
    share = result.perturbation / float(torch.linalg.matrix_norm(system.a, 2))
    cells = [result.form, str(result.modes.order), f"{share:.0e}" if share else "-", f"{result.kappa:.0e}"]
    return [*cells, f"{gap / size:.1e}", f"{error.relative:.1e}", f"{expected:.1e}", f"{run:.1e}", f"{seconds:.1f}"], held


def main() -> int:
    torch.set_num_threads(1)
    console, red, floors = Console(width=190), [], []
    table = Table(title=f"relative errors; the ladder at tolerance {TOLERANCE:g} in float32, and its last rung alone")
    for head in HEADS + ERRORS:
        table.add_column(head)
    for name, system in recurrences():
        lead: list[str] = [name, str(len(system.a)), *plain(system)]
        for rungs in (LADDER, LADDER[-1:]):
            start = time.process_time()
            result = diagonalize(system, TOLERANCE, rungs=rungs)
            cells, held = row(system, result, time.process_time() - start)
            red += [] if held else [f"{name}, n = {len(system.a)}, {result.form}: above its certificate {result.error.transfer:.2e}"]
            floors += [float(cells[-2])] if result.form == "perturbed" else []
            table.add_row(*lead, *cells)
            lead = [""] * len(lead)
            if result.form in ("eig", "perturbed"):  # the last rung alone has nothing to add
                break
    if red:
        console.print("\n".join(red))
        return 1
    console.print(table)
    console.print(f"floor of the perturbed rung in float32, over the rows above: {min(floors):.1e} to {max(floors):.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
