"""The sequential oracle against scipy's, the transfer function and the impulse response against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch

from rewriter.passes.solvers import linear_system
from rewriter.passes.solvers.linear_system import System
from rewriter.tolerances import EQUAL
from tests.solvers.recurrences import PLANTED, legs, normal

ANGLES = torch.linspace(0.0, 6.0, 13, dtype=torch.float64)
EQUAL64 = EQUAL[torch.float64]


@pytest.mark.parametrize("system", PLANTED.values(), ids=PLANTED.keys())
def test_simulation_is_scipys(system: System) -> None:
    """scipy reads the state before its update, so that its C and D are C A and D + C B."""
    u = normal(50, system.b.shape[1], seed=9)
    before = [system.a, system.b, system.c @ system.a, system.d + system.c @ system.b, 1.0]
    expected = scipy.signal.dlsim([x.numpy() if isinstance(x, torch.Tensor) else x for x in before], u.numpy())[1]
    assert np.allclose(system.simulate(u)[0], expected, *EQUAL64)


@pytest.mark.parametrize("system", PLANTED.values(), ids=PLANTED.keys())
def test_responses_agree(system: System) -> None:
    """Doubled, simulated and summed: the same impulse response; and a batch in two pieces is one run."""
    p = system.b.shape[1]
    impulses = torch.zeros(p, 64, p, dtype=torch.float64)
    impulses[range(p), 0, range(p)] = 1
    simulated, _ = system.simulate(impulses)  # (p, 64, q)
    states = next(s for s, _ in system.doublings() if s.shape[1] == 64 * p)
    assert torch.allclose(system.impulse(states), simulated.permute(2, 1, 0), *EQUAL64)
    first, state = system.simulate(impulses[:, :20])
    second, _ = system.simulate(impulses[:, 20:], state)
    assert torch.allclose(torch.cat([first, second], 1), simulated, *EQUAL64)


def test_transfer_is_the_sum_of_the_response(monkeypatch: pytest.MonkeyPatch) -> None:
    system = PLANTED["random"]
    response = system.impulse(next(s for s, _ in system.doublings() if s.shape[1] == 1024 * system.b.shape[1]))
    z = torch.exp(-1j * ANGLES[:, None] * torch.arange(1024))
    expected = torch.einsum("qlp,kl->kqp", response + 0j, z)
    assert torch.allclose(system.transfer(ANGLES), expected, *EQUAL64)
    monkeypatch.setattr(linear_system, "BATCH", 1)
    assert torch.allclose(system.transfer(ANGLES), expected, *EQUAL64)


def test_the_error_system_is_the_difference() -> None:
    one, other = PLANTED["random"], PLANTED["jordan"]
    assert torch.allclose(one.minus(other).transfer(ANGLES), one.transfer(ANGLES) - other.transfer(ANGLES), *EQUAL64)
    assert one.minus(one).radius() == pytest.approx(one.radius())


def test_a_system_is_checked() -> None:
    eye, column = torch.eye(3), torch.ones(3, 1)
    assert System.of(eye, column, column.T).d.shape == (1, 1)
    assert System.of(eye.half(), column, column.T).a.dtype == torch.float64
    with pytest.raises(ValueError, match="of shapes"):
        System.of(eye, column.T, column.T)
    with pytest.raises(ValueError, match="finite"):
        System.of(eye * torch.inf, column, column.T)
    with pytest.raises(ValueError, match="real"):
        System.of(eye + 0j, column, column.T)
    assert legs(4).radius() < 1
