"""The bracket of the peak gain holds what closed forms, fine grids and scipy say, and is tight; it cannot be had from a coarse grid."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rewriter.passes.solvers import peak_gain as module
from rewriter.passes.solvers.eigenform import eigenform
from rewriter.passes.solvers.linear_system import System
from rewriter.passes.solvers.peak_gain import BETWEEN, TAIL, UNBOUNDED, Gain, peak_gain
from rewriter.tolerances import EQUAL, EXACT
from tests.solvers.recurrences import PLANTED, jordan, normal, orthogonal, resonance, with_ports

TIGHT = BETWEEN + 2 * TAIL


def on_a_grid(system: System, points: int, shift: float = 0.0) -> float:
    angles = (torch.arange(points, dtype=torch.float64) + shift) * 2 * math.pi / points
    return float(torch.linalg.matrix_norm(system.transfer(angles), 2).max())


def holds(gain: Gain, exact: float, rounding: float = 0.0) -> bool:
    """`rounding`: of terms that cancel."""
    slack = 1 + EXACT[torch.float32]
    return (
        gain.lower <= exact * slack + rounding and exact <= gain.upper * slack + rounding and gain.upper <= TIGHT * exact * slack + rounding
    )


@given(st.floats(-0.999, 0.999), st.floats(-3, 3))
@example(0.0, -1.0)
def test_one_state_in_closed_form(a: float, d: float) -> None:
    """1 / (1 - a / z) + d runs around a circle that meets the axis in 1 / (1 - a) + d and 1 / (1 + a) + d."""
    one = torch.ones(1, 1, dtype=torch.float64)
    exact = max(abs(1 / (1 - a) + d), abs(1 / (1 + a) + d))
    assert holds(peak_gain(System.of(a * one, one, one, d * one)), exact, EXACT[torch.float64] * (1 / (1 - abs(a)) + abs(d)))


@pytest.mark.parametrize("system", PLANTED.values(), ids=PLANTED.keys())
def test_bracket_on_a_fine_grid(system: System) -> None:
    gain, fine = peak_gain(system), max(on_a_grid(system, 4096), on_a_grid(system, 1000, 0.37))
    assert fine <= gain.upper <= TIGHT * fine


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4, 1e-5])
def test_a_resonance_between_grid_points(gap: float) -> None:
    """Half way between two of 512 points: the grid sees a fraction of a peak that the bracket knows."""
    angle = 100.5 * 2 * math.pi / 512
    system = resonance(angle, gap)
    near = angle + gap * torch.linspace(-1, 1, 1001, dtype=torch.float64)
    exact = float(torch.linalg.matrix_norm(system.transfer(near), 2).max())
    assert on_a_grid(system, 512) < exact / 1.1
    assert holds(peak_gain(system), exact)


@given(st.integers(2, 40), st.sampled_from([-1.0, 1.0]))
def test_a_response_at_the_limit_of_the_grid(n: int, sign: float) -> None:
    """|1 + z^-n| and |1 - z^-n| turn as fast as a response of that length can, and reach 2 wherever the grid lies."""
    a = torch.eye(n, dtype=torch.float64).roll(1, 0).tril(-1)  # a shift register
    b = torch.eye(n, dtype=torch.float64)[:, :1]
    c = torch.zeros(1, n, dtype=torch.float64)
    c[0, 0], c[0, -1] = 1, sign
    assert holds(peak_gain(System.of(a, b, c)), 2.0)


@pytest.mark.parametrize("name", ["orthogonal", "normal, repeated", "random", "triangular"])
def test_difference_from_modes_is_the_error_systems(name: str) -> None:
    system, form = PLANTED[name], eigenform(PLANTED[name])
    assert form is not None
    rough = form.modes.stored(torch.float16)
    direct, realised = peak_gain(system, rough), peak_gain(system.minus(rough.real(torch.float64).system()))
    assert max(direct.lower, realised.lower) <= min(direct.upper, realised.upper)
    assert on_a_grid(system.minus(rough.real(torch.float64).system()), 4096) <= direct.upper
    assert peak_gain(system, form.modes).upper <= EQUAL[torch.float64][0] * peak_gain(system).lower


@pytest.mark.parametrize(("p", "q"), [(40, 3), (2, 40), (40, 50), (40, 1)])
@pytest.mark.parametrize("direct", [False, True])
def test_many_ports(p: int, q: int, direct: bool) -> None:
    system = with_ports(0.9 * orthogonal(4), p, q)
    system = system if direct else System.of(system.a, system.b, system.c)
    fine = on_a_grid(system, 4096)
    assert fine <= peak_gain(system).upper <= TIGHT * fine
    form = eigenform(system)
    assert form is not None
    assert peak_gain(system, form.modes).upper <= EQUAL[torch.float64][0] * fine


def test_what_is_not_decomposed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    system = PLANTED["orthogonal"]
    tight = peak_gain(system)
    monkeypatch.setattr(module, "DECOMPOSED", 1)
    loose = peak_gain(system)
    assert loose.lower <= tight.lower <= tight.upper <= loose.upper <= tight.upper * min(system.d.shape) ** 0.5


def test_no_bound_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_gain(with_ports(orthogonal(5))) == UNBOUNDED
    assert peak_gain(with_ports(1.5 * orthogonal(5))) == UNBOUNDED
    assert peak_gain(with_ports((1 - 1e-12) * orthogonal(5))) == UNBOUNDED
    monkeypatch.setattr(module, "WORK", 16**2 * 2 * 64)
    assert peak_gain(PLANTED["orthogonal"]) == UNBOUNDED


@pytest.mark.parametrize("n", [8, 16, 24, 32])
def test_growth_that_rounding_cannot_follow_is_allowed_for(n: int) -> None:
    """A Jordan block whose powers grow as 1.4^n before they fall: G(1) = coupling^(n-1) / (1 - value)^n."""
    eye = torch.eye(n, dtype=torch.float64)
    gain = peak_gain(System.of(jordan(n, 0.9, 0.5), eye[:, -1:], eye[:1]))
    exact = 0.5 ** (n - 1) / 0.1**n
    assert gain.lower <= exact * (1 + EXACT[torch.float32])
    assert exact <= gain.upper


@pytest.mark.parametrize("system", PLANTED.values(), ids=PLANTED.keys())
def test_energy_is_lyapunovs(system: System) -> None:
    gramian = torch.from_numpy(scipy.linalg.solve_discrete_lyapunov(system.a.numpy(), (system.b @ system.b.T).numpy()))
    later = system.c @ system.a
    energy = (system.d + system.c @ system.b).square().sum() + (later @ gramian @ later.T).trace()
    assert peak_gain(system).energy == pytest.approx(float(energy) ** 0.5, rel=TAIL)


def test_nothing_has_no_gain() -> None:
    assert peak_gain(System.of(torch.zeros(0, 0), torch.zeros(0, 2), torch.zeros(3, 0))).upper == 0
    assert peak_gain(System.of(0.5 * torch.eye(3), torch.zeros(3, 1), normal(1, 3))).upper == 0
