"""V Lambda V^-1 is A; normal matrices have kappa 1, repeated eigenvalues or not; defective ones have no form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewriter.passes.solvers.eigenform import eigenform
from rewriter.passes.solvers.linear_system import System
from rewriter.tolerances import EQUAL, EXACT
from tests.solvers.recurrences import jordan, legs, normal, orthogonal, with_ports

EQUAL64 = EQUAL[torch.float64]


def agrees(system: System) -> float:
    """kappa, after a check that the modes are the system."""
    form = eigenform(system)
    assert form is not None
    assert form.modes.order == len(system.a)
    u = normal(30, system.b.shape[1], seed=8)
    assert torch.allclose(form.modes.real(torch.float64).system().simulate(u)[0], system.simulate(u)[0], *EQUAL64)
    return form.kappa


@given(st.integers(1, 20))
def test_generic_matrices(n: int) -> None:
    assert agrees(with_ports(normal(n, n, seed=n) / (2 * n**0.5))) >= 1 - EXACT[torch.float64]


def rotations(n: int) -> Tensor:
    """n / 2 equal rotations, in a basis that hides them."""
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    q = orthogonal(n)
    return q @ torch.block_diag(*[0.9 * turn] * (n // 2)) @ q.T


def spectrum(n: int, *values: float) -> Tensor:
    q = orthogonal(n)
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64).repeat(n // len(values))) @ q.T


NORMAL = {
    "orthogonal": orthogonal(17),
    "symmetric": spectrum(12, 0.9, -0.9),
    "skew": normal(9, 9).tril(-1) / 9 - normal(9, 9).tril(-1).T / 9,
    "equal rotations": rotations(12),
    "rotations and a repeated real": torch.block_diag(rotations(8), spectrum(6, 0.5, 0.5, -0.2)),
    "identity": torch.eye(5, dtype=torch.float64) / 2,
    "zero": torch.zeros(4, 4, dtype=torch.float64),
    "permutation": torch.eye(12, dtype=torch.float64)[[1, 2, 3, 4, 0, 6, 7, 8, 5, 10, 9, 11]],
}


@pytest.mark.parametrize("a", NORMAL.values(), ids=NORMAL.keys())
def test_normal_matrices_cost_nothing(a: Tensor) -> None:
    assert agrees(with_ports(a)) <= 1 + EXACT[torch.float32]


def test_defective_matrices_have_no_form() -> None:
    assert eigenform(with_ports(jordan(6, 0.5, 0.5))) is None
    assert eigenform(legs(64)) is None
    near = jordan(6, 0.5, 0.5) + torch.diag(1e-2 * torch.arange(6))
    form = eigenform(with_ports(near))
    assert form is not None
    assert form.kappa == pytest.approx(float(torch.linalg.cond(torch.linalg.eig(near).eigenvectors)), rel=EQUAL[torch.float32][0])
