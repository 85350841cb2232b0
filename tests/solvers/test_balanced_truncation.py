"""Gramians are scipy's, Hankel singular values are those of their product, and the a-priori bound holds for every order."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from rewriter.passes.solvers.balanced_truncation import balance, gramian_factor
from rewriter.passes.solvers.linear_system import System
from rewriter.passes.solvers.peak_gain import peak_gain
from rewriter.tolerances import EQUAL, EXACT
from tests.solvers.recurrences import PLANTED, normal, orthogonal, with_ports

ROUNDING = 1 + EXACT[torch.float32]


@pytest.mark.parametrize("system", PLANTED.values(), ids=PLANTED.keys())
def test_gramians_and_hankel_values(system: System) -> None:
    a, b, c = (x.numpy() for x in (system.a, system.b, system.c))
    reach, see = (torch.from_numpy(scipy.linalg.solve_discrete_lyapunov(*x)) for x in ((a, b @ b.T), (a.T, c.T @ c)))
    factor = gramian_factor(system.a, system.b)
    assert torch.allclose(factor @ factor.T, reach, *EQUAL[torch.float64])
    squares = torch.linalg.eigvals(reach @ see).real.clamp_min(0).sort(descending=True).values
    assert torch.allclose(balance(system).hankel, squares.sqrt(), *EQUAL[torch.float32])


@pytest.mark.parametrize("system", PLANTED.values(), ids=PLANTED.keys())
def test_the_bound_holds(system: System) -> None:
    balanced = balance(system)
    for order in range(len(balanced.hankel) + 1):
        lower = peak_gain(system.minus(balanced.truncate(order))).lower
        assert lower <= balanced.bound(order) * ROUNDING + EXACT[torch.float64] * float(balanced.hankel[0])
        assert balanced.order_within(balanced.bound(order) * ROUNDING) <= order


def test_what_is_not_reached_or_not_seen_goes() -> None:
    system = with_ports(torch.block_diag(0.9 * orthogonal(4), 0.5 * orthogonal(3)))
    system.b[4:] = 0
    balanced = balance(system)
    order = balanced.order_within(EXACT[torch.float32] * float(balanced.hankel[0]))
    assert order == 4
    u = normal(40, 2, seed=8)
    assert torch.allclose(balanced.truncate(order).simulate(u)[0], system.simulate(u)[0], *EQUAL[torch.float64])


def test_no_gramian_on_the_circle() -> None:
    with pytest.raises(ValueError, match="unit circle"):
        gramian_factor(orthogonal(4), normal(4, 1))
    with pytest.raises(ValueError, match="unit circle"):
        gramian_factor(1.5 * orthogonal(4), normal(4, 1))
