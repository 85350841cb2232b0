"""Bilevel choice of ridges for a chain of linear layers under one budget: by the end-to-end loss, against each layer by its own error.

    python tools/bench_bilevel.py

Each layer W_i of y = W_3 W_2 W_1 x is replaced by Y_i = argmin E|(W_i - Y) u_i|^2 / 2 + exp(x_i) |Y|^2 / 2, u_i its input in the dense
chain; its numbers are counted as degrees of freedom, sum_k c_k / (c_k + exp(x_i)) a row, c_k the eigenvalues of E[u u^T]. The budget is
half of all. Uncoupled: the x of least sum of the layers' own relative errors, found by a multiplier on a grid, as the sum is separable.
Coupled: BSVRB from there, on the end-to-end error with a penalty for leaving the budget. Every x is then shifted onto the budget and
judged by the exact Y on other inputs. Two chains: one whose layers magnify and shrink at random, and one whose layers are alike. Where
the better coupled choice does not gain 1 % the verdict is that coupling did not help.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rewriter.passes.solvers.bilevel import AbstractBilevel, Settings, solve

WIDE, LAYERS, ROWS, SEEDS = 6, 3, 256, (0, 1, 2)
BUDGET = LAYERS * WIDE * WIDE / 2
PENALTY, MARGIN = 30.0, 0.01
SETTINGS = {
    1: Settings(1, blocks=LAYERS, batch=128, steps=100, alpha=0.5, beta=0.3, tau=0.5, eta=0.4),
    2: Settings(2, blocks=LAYERS, batch=128, steps=100, alpha=0.5, beta=0.3, tau=0.5, tau_v=0.5, eta=0.4),
}


class Chain(AbstractBilevel):
    """The layers' inputs for calibration, and inputs to judge by; every layer's output has unit energy a coordinate on average."""

    def __init__(self, seed: int, alike: bool) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.blocks, self.samples, self.weights, self.seen = LAYERS, ROWS, list[Tensor](), list[Tensor]()
        x, self.inputs, self.judges = (torch.randn(ROWS, WIDE, generator=rng, dtype=torch.float64) for _ in range(3))
        for _ in range(LAYERS):
            left, right = (torch.linalg.qr(torch.randn(WIDE, WIDE, generator=rng, dtype=torch.float64)).Q for _ in range(2))
            spread = torch.ones(WIDE).double() if alike else (2 * torch.randn(WIDE, generator=rng, dtype=torch.float64)).exp()
            weight = (left * spread) @ right
            weight = weight / (x @ weight.T).square().mean().sqrt()
            self.weights.append(weight)
            self.seen.append(x)
            x = x @ weight.T
        self.spectra = [torch.linalg.eigvalsh(u.T @ u / ROWS) for u in self.seen]

    def lower(self, x: Tensor, y: Tensor, i: int, rows: Tensor) -> Tensor:
        own = (self.seen[i][rows] @ (self.weights[i] - y).T).square().sum(1).mean() / 2 + x[i].exp() * y.square().sum() / 2
        return own / self.spectra[i][-1]  # so that one step size fits all

    def upper(self, x: Tensor, y: Sequence[Tensor], i: int, rows: Tensor) -> Tensor:
        return self.end_to_end(y, self.inputs[rows]) + PENALTY * (self.freedom(x) / BUDGET - 1).square()

    def end_to_end(self, y: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Relative squared error of the chain's output."""
        dense, ours = inputs, inputs
        for weight, part in zip(self.weights, y, strict=True):
            dense, ours = dense @ weight.T, ours @ part.T
        return (dense - ours).square().sum() / dense.square().sum()

    def freedom(self, x: Tensor) -> Tensor:
        """Degrees of freedom of all layers."""
        return torch.stack([WIDE * (c / (c + row.exp())).sum() for c, row in zip(self.spectra, x, strict=True)]).sum()

    def solution(self, x: Tensor) -> list[Tensor]:
        grams = [u.T @ u / ROWS for u in self.seen]
        eye = torch.eye(WIDE, dtype=torch.float64)
        return [torch.linalg.solve(g + row.exp() * eye, g @ w.T).T for g, row, w in zip(grams, x, self.weights, strict=True)]

    def on_budget(self, x: Tensor) -> Tensor:
        """x shifted by one number to the budget."""
        low, high = -40.0, 40.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if float(self.freedom(x + middle)) > BUDGET else (low, middle)
        return x + low

    def uncoupled(self) -> Tensor:
        """For each multiplier every layer takes its own best ridge; the multiplier whose choice lies nearest to the budget."""
        grid = torch.linspace(-12, 6, 361, dtype=torch.float64)
        tables = [self.solution(torch.full((LAYERS,), float(value), dtype=torch.float64)) for value in grid]
        own = torch.tensor(
            [
                [
                    float((u @ (w - y).T).square().sum() / (u @ w.T).square().sum())
                    for u, w, y in zip(self.seen, self.weights, ys, strict=True)
                ]
                for ys in tables
            ]
        )
        spent = torch.stack([WIDE * (c / (c + grid[:, None].exp())).sum(1) for c in self.spectra], 1)
        chosen = [(own + 10 ** (-float(k) / 20) * spent).argmin(0) for k in range(100)]
        best = min(chosen, key=lambda index: abs(float(spent.gather(0, index[None]).sum()) - BUDGET))
        return self.on_budget(grid[best])

    def error(self, x: Tensor) -> float:
        return float(self.end_to_end(self.solution(self.on_budget(x)), self.judges).sqrt())


def main() -> None:
    torch.set_num_threads(1)
    console, begun = Console(width=120), time.perf_counter()
    table = Table(
        title=f"{LAYERS} layers of {WIDE} x {WIDE} at half of their degrees of freedom: relative error of the output on other inputs"
    )
    for head in ("chain", "seed", "uncoupled", "BSVRB v1", "BSVRB v2", "won"):
        table.add_column(head)
    for alike in (False, True):
        for seed in SEEDS:
            chain = Chain(seed, alike)
            start = chain.uncoupled()
            errors = [chain.error(start)]
            for settings in SETTINGS.values():
                found = solve(chain, start, chain.solution(start), settings, torch.Generator().manual_seed(seed))
                errors.append(chain.error(found.x))
            gained = 1 - min(errors[1:]) / errors[0]
            won = f"coupled, by {gained:.1%}" if gained > MARGIN else f"coupling did not help ({gained:+.1%})"
            table.add_row("alike" if alike else "spread", str(seed), *(f"{error:.4f}" for error in errors), won)
    console.print(table)
    console.print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
