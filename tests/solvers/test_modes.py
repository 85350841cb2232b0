"""One system in five spellings: modes, real state, block matrix, impulse response and chunks; any counts, any length, any channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewriter.passes.solvers.modal_error import unit_roundoff
from rewriter.passes.solvers.modes import Modes, powers
from rewriter.tolerances import EQUAL, EXACT
from tests.solvers.recurrences import normal, some_modes

EQUAL64 = EQUAL[torch.float64]
COUNTS = st.integers(0, 4)
PORTS = st.integers(1, 3)


def in_chunks(modes: Modes, u: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Whole chunks, and a shorter one for what is left: u (..., T, p)."""
    state, outputs = torch.zeros(*u.shape[:-2], modes.order, dtype=u.dtype), []
    for piece in u.split(length, -2):
        chunk = modes.chunked(piece.shape[-2], u.dtype)
        flat = piece.flatten(-2)[..., None]
        outputs.append((chunk.toeplitz @ flat + chunk.observe @ state[..., None])[..., 0].unflatten(-1, (piece.shape[-2], -1)))
        state = chunk.keep * state + chunk.cross * state[..., chunk.partner] + (chunk.control @ flat)[..., 0]
    return torch.cat(outputs, -2), state


@given(COUNTS, COUNTS, PORTS, PORTS, st.integers(1, 30), st.integers(1, 11))
def test_all_spellings_agree(reals: int, pairs: int, p: int, q: int, steps: int, length: int) -> None:
    modes = some_modes(reals, pairs, p, q)
    real, u = modes.real(torch.float64), normal(steps, p, seed=8)
    assert len(real.keep) == modes.order == reals + 2 * pairs
    expected, last = real.system().simulate(u)
    outputs, state = real.simulate(u)
    assert torch.allclose(outputs, expected, *EQUAL64) and torch.allclose(state, last, *EQUAL64)
    outputs, state = in_chunks(modes, u, length)
    assert torch.allclose(outputs, expected, *EQUAL64) and torch.allclose(state, last, *EQUAL64)
    response = modes.response(steps)
    convolved = torch.stack([torch.einsum("sqp,sp->q", response[: t + 1].flip(0), u[: t + 1]) for t in range(steps)])
    assert torch.allclose(convolved, expected, *EQUAL64)


@given(COUNTS, COUNTS, PORTS, PORTS)
def test_a_mode_stands_for_its_conjugate(reals: int, pairs: int, p: int, q: int) -> None:
    """The transfer function by all n complex modes."""
    modes = some_modes(reals, pairs, p, q)
    angles = torch.linspace(0, 6, 7, dtype=torch.float64)
    z = torch.exp(1j * angles)[:, None]
    lone, twin = slice(0, reals), slice(reals, None)
    x = torch.cat([modes.eigenvalues, modes.eigenvalues[twin].conj()])
    b, c = torch.cat([modes.b, modes.b[twin].conj()]), torch.cat([modes.c, modes.c[:, twin].conj()], 1)
    expected = torch.einsum("qm,km,mp->kqp", c, z / (z - x), b) + modes.d
    assert torch.allclose(modes.real(torch.float64).system().transfer(angles), expected, *EQUAL64)
    assert not bool(modes.b[lone].imag.any())


@pytest.mark.parametrize("length", [1, 4, 13])
def test_channels_are_systems_of_their_own(length: int) -> None:
    modes, u = some_modes(1, 2, 1, 2, 5), normal(5, 13, 1, seed=8)
    outputs, state = in_chunks(modes, u, length)
    stepped, last = modes.real(torch.float64).simulate(u)
    assert torch.allclose(outputs, stepped, *EQUAL64) and torch.allclose(state, last, *EQUAL64)
    for i in range(5):
        alone = Modes(modes.eigenvalues[i], modes.b[i], modes.c[i], modes.d[i], modes.reals)
        assert torch.allclose(alone.real(torch.float64).system().simulate(u[i])[0], outputs[i], *EQUAL64)


@given(COUNTS, COUNTS, st.integers(1, 40))
def test_the_tail_is_bounded(reals: int, pairs: int, length: int) -> None:
    modes = some_modes(reals, pairs, 2, 2)
    later = torch.linalg.matrix_norm(modes.response(length + 400)[length:], 2).sum()
    assert float(later) <= modes.tail(length) * (1 + EXACT[torch.float64])


def test_balancing_and_storing() -> None:
    modes = some_modes(2, 3, 2, 3)
    modes.b[0], modes.c[:, 1] = 0, 0  # one mode that nothing drives, one that nothing reads
    balanced = modes.balanced()
    assert torch.allclose(balanced.response(9), modes.response(9), *EQUAL64)
    assert torch.allclose(torch.linalg.vector_norm(balanced.b, dim=1)[2:], torch.linalg.vector_norm(balanced.c, dim=0)[2:], *EQUAL64)
    stored = balanced.stored(torch.float32)
    assert torch.equal(stored.real(torch.float32).system().a, stored.real(torch.float64).system().a)
    assert torch.equal(balanced.real(torch.float32).b, stored.real(torch.float32).b)


@pytest.mark.parametrize(("reals", "pairs"), [(3, 0), (0, 4), (2, 6)])
def test_noise_foretells_rounding(reals: int, pairs: int) -> None:
    """Half precision against the same numbers in double, for white input: within a factor of four."""
    modes, u = some_modes(reals, pairs, 2, 2).stored(torch.float16), normal(2000, 2, seed=8).half()
    exact, rough = (modes.real(dtype).simulate(u)[0].double() for dtype in (torch.float64, torch.float16))
    measured = float((rough - exact).square().sum(1).mean().sqrt())
    assert measured / 4 <= float(modes.noise()) * unit_roundoff(torch.float16) <= measured * 4


def test_powers_of_zero() -> None:
    assert torch.equal(powers(torch.zeros(2), 3), torch.tensor([[1.0, 0, 0], [1, 0, 0]]))
    assert powers(torch.ones(2), 0).shape == (2, 0)
