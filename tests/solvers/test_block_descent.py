"""Block descent never rises, whatever the rank of H; its running loss is the true one; warm steps match exact ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rewriter.passes.solvers import block_descent
from rewriter.passes.solvers.block_descent import Blocks, descend, refit
from rewriter.passes.solvers.spectral import ridged
from rewriter.tolerances import EQUAL, EXACT


def problem(m: int, n: int, rows: int) -> tuple[Tensor, Tensor]:
    """A weight, and second moments of so many samples."""
    rng = torch.Generator().manual_seed(m + rows)
    x = torch.randn(rows, n, generator=rng, dtype=torch.float64) * torch.linspace(0.1, 3, n, dtype=torch.float64)
    return torch.randn(m, n, generator=rng, dtype=torch.float64), x.T @ x / rows


def loss(weight: Tensor, second: Tensor, blocks: Blocks) -> float:
    """Recomputed from the dense form, under the H that the solver sees."""
    gap = weight - blocks.dense()[: weight.shape[0], : weight.shape[1]]
    return float(((gap @ ridged(second)) * gap).sum())


GRIDS = [(30, 40, 4, 3, 2), (40, 30, 2, 2, 5), (31, 23, 5, 2, 2), (12, 60, 6, 1, 3), (24, 24, 1, 4, 2)]


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("rows", [4, 30, 400])
@pytest.mark.parametrize(("m", "n", "k", "g", "rank"), GRIDS)
def test_loss_falls_and_is_true(m: int, n: int, k: int, g: int, rank: int, rows: int, warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if warm:
        monkeypatch.setattr(block_descent, "EXACT_SIZE", 0)
    weight, second = problem(m, n, rows)
    blocks = refit(weight, second, descend(weight, second, k, g, rank))
    energy = float(((weight @ second) * weight).sum())
    slack = EXACT[torch.float64] * energy
    assert all(after <= before + slack for before, after in zip(blocks.losses, blocks.losses[1:], strict=False))
    rounding = EXACT[torch.float32]
    assert loss(weight, second, blocks) == pytest.approx(blocks.losses[-1], rel=rounding, abs=rounding**2 * energy)


def test_going_on_is_the_same_as_not_stopping() -> None:
    weight, second = problem(30, 40, 200)
    whole = descend(weight, second, 4, 2, 3, sweeps=5)
    parts = descend(weight, second, 4, 2, 3, sweeps=3, start=descend(weight, second, 4, 2, 3, sweeps=2))
    assert torch.allclose(whole.dense(), parts.dense(), *EQUAL[torch.float64])


def test_single_precision_products_cost_nothing_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, second = problem(60, 80, 300)
    exact = descend(weight, second, 4, 4, 4)
    monkeypatch.setattr(block_descent, "FP64_WORK", 0)
    single = descend(weight, second, 4, 4, 4)
    assert loss(weight, second, single) == pytest.approx(loss(weight, second, exact), rel=EQUAL[torch.float32][0])
