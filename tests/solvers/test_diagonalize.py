"""Each rung is taken where it should be, and what it promises holds: on a fine grid, and in simulations of what is stored."""

from __future__ import annotations

import math

import pytest
import torch

from rewriter.passes.solvers.diagonalize import Diagonalised, Form, diagonalize
from rewriter.passes.solvers.linear_system import System
from rewriter.tolerances import EQUAL, EXACT
from tests.solvers.recurrences import PLANTED, jordan, legs, normal, orthogonal, with_ports

TAKEN: dict[str, Form] = {
    "orthogonal": "eig",
    "normal, repeated": "eig",
    "random": "eig",
    "jordan": "truncated",
    "slow jordan": "truncated",
    "triangular": "eig",
    "legs": "truncated",
}
ANGLES = torch.linspace(0, math.pi, 3001, dtype=torch.float64)


def check(system: System, result: Diagonalised, dtype: torch.dtype, tolerance: float) -> None:
    """The certificate against a grid, and |y - y'| <= sup |G - G'| |u| in exact arithmetic on the stored numbers, rounding aside."""
    assert result.modes is not None
    stored, error = result.modes.real(dtype), result.error
    gap = torch.linalg.matrix_norm(stored.system().transfer(ANGLES) - system.transfer(ANGLES), 2)
    size = float(torch.linalg.matrix_norm(system.transfer(ANGLES), 2).max())
    solving = EXACT[torch.float64] * size
    assert float(gap.max()) <= error.transfer + solving
    assert float(gap.max()) <= error.relative * size + solving
    assert error.total <= tolerance
    u = normal(600, system.b.shape[1], seed=8)
    expected = system.simulate(u)[0]
    exact = torch.linalg.norm(stored.system().simulate(u)[0] - expected)
    assert float(exact) <= (error.transfer + solving) * float(torch.linalg.norm(u))
    run = torch.linalg.norm(stored.simulate(u)[0] - stored.system().simulate(u)[0]) / torch.linalg.norm(expected)
    assert float(run) <= 4 * error.rounding


@pytest.mark.parametrize("name", PLANTED)
def test_the_first_rung_that_is_good_enough(name: str) -> None:
    result = diagonalize(PLANTED[name], 1e-3)
    assert result.form == TAKEN[name], result.tried
    assert len(result.tried) == 1 + ["eig", "truncated"].index(result.form)
    check(PLANTED[name], result, torch.float32, 1e-3)


@pytest.mark.parametrize("name", ["orthogonal", "normal, repeated", "random", "triangular"])
def test_eig_is_exact(name: str) -> None:
    result = diagonalize(PLANTED[name], EQUAL[torch.float64][0], torch.float64)
    assert result.form == "eig"
    check(PLANTED[name], result, torch.float64, EQUAL[torch.float64][0])


@pytest.mark.parametrize("name", ["jordan", "slow jordan", "legs"])
def test_perturbation_where_nothing_else_is_asked(name: str) -> None:
    result = diagonalize(PLANTED[name], 1e-3, rungs=("perturbed",))
    assert result.form == "perturbed"
    assert 0 < result.perturbation < EQUAL[torch.float32][0] * 10
    check(PLANTED[name], result, torch.float32, 1e-3)


def test_dense_where_nothing_will_do() -> None:
    result = diagonalize(with_ports(jordan(12, 0.5, 0.5)), EXACT[torch.float64])
    assert (result.form, result.modes, result.kappa) == ("dense", None, math.inf)
    assert [line.split(":")[0] for line in result.tried] == ["eig", "truncated", "perturbed"]
    assert "no basis of eigenvectors" in result.tried[0] and "above" in result.tried[2]


def test_kappa_of_a_matrix_that_stays() -> None:
    result = diagonalize(PLANTED["triangular"], EXACT[torch.float64], rungs=("eig",))
    assert result.form == "dense" and 1 < result.kappa < math.inf
    assert "above 1.0e-12" in result.tried[0]


@pytest.mark.parametrize("radius", [1.0, 1.01, 1 - 1e-12])
def test_unstable_recurrences_are_exact_over_finitely_many_steps(radius: float) -> None:
    system = with_ports(radius * orthogonal(9))
    result = diagonalize(system)
    assert result.form == "eig" and result.error.transfer == math.inf
    assert "no bound" in result.tried[0] and "finitely many steps" in result.tried[0]
    assert result.modes is not None
    u = normal(200, 2, seed=8)
    assert torch.allclose(result.modes.real(torch.float64).simulate(u)[0], system.simulate(u)[0], *EQUAL[torch.float64])
    rungs = diagonalize(system, rungs=("truncated", "perturbed"))
    assert rungs.form == "dense" and all("needs a transfer bound" in line for line in rungs.tried)


def test_unstable_and_defective_stays_dense() -> None:
    result = diagonalize(with_ports(jordan(5, 1.0, 0.5)))
    assert result.form == "dense" and len(result.tried) == 3


def test_order_falls_with_the_tolerance() -> None:
    orders = [diagonalize(legs(32), t, rungs=("truncated",)).modes for t in (1e-1, 1e-2, 1e-3)]
    assert all(modes is not None for modes in orders)
    assert sorted({modes.order for modes in orders if modes}) == [modes.order for modes in orders if modes]


@pytest.mark.parametrize("system", [System.of(0.5 * torch.eye(3), torch.zeros(3, 1), normal(1, 3)), System.of(*(torch.zeros(0, 0),) * 3)])
def test_systems_that_do_nothing(system: System) -> None:
    result = diagonalize(system)
    assert result.form == "eig" and result.error.total == 0
    assert diagonalize(system, rungs=("perturbed",)).form == "dense"
