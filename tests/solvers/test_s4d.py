"""HiPPO and the S4D starts by their definitions, both discretisations against scipy, the kernel against simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewriter.passes.solvers.linear_system import System
from rewriter.passes.solvers.s4d import Method, Start, discretize, discretize_diagonal, hippo_legs, s4d, s4d_start
from rewriter.tolerances import EQUAL
from tests.solvers.recurrences import normal

EQUAL64 = EQUAL[torch.float64]
METHODS: tuple[Method, ...] = ("zoh", "bilinear")
STARTS: tuple[Start, ...] = ("legs", "inv", "lin", "real")


def test_hippo_by_hand() -> None:
    a, b = hippo_legs(3)
    expected = -torch.tensor([[1, 0, 0], [3**0.5, 2, 0], [5**0.5, 15**0.5, 3]], dtype=torch.float64)
    assert torch.allclose(a, expected) and torch.allclose(b[:, 0], torch.tensor([1, 3, 5], dtype=torch.float64).sqrt())


@given(st.integers(1, 20).map(lambda k: 2 * k))
def test_legs_keeps_the_normal_part(n: int) -> None:
    """A + P P^T is normal, and S4D-LegS has its eigenvalues, each with the part of B in its eigenvector."""
    a, b = hippo_legs(n)
    part = a + torch.outer(b[:, 0], b[:, 0]) / 2
    assert torch.allclose(part + part.T, -torch.eye(n, dtype=torch.float64), *EQUAL64)
    values, driven, reals = s4d_start("legs", n)
    assert reals == 0 and bool((values.imag > 0).all())
    expected = torch.linalg.eigvals(part).imag.sort().values[n // 2 :]
    assert torch.allclose(values.imag, expected, *EQUAL64)
    assert float(2 * driven.abs().square().sum()) == pytest.approx(float(b.square().sum()))
    x = torch.linalg.solve(1j * torch.eye(n) - part, b + 0j)  # (iI - A)^-1 B, seen by B again: the phases of eigenvectors drop out
    seen = (driven.abs().square() * (1 / (1j - values) + 1 / (1j - values.conj()))).sum()
    assert torch.allclose((b.T + 0j) @ x, seen, *EQUAL64)


def test_the_other_starts() -> None:
    assert torch.allclose(s4d_start("lin", 6)[0], torch.tensor([-0.5, -0.5 + 1j * np.pi, -0.5 + 2j * np.pi], dtype=torch.complex128))
    inverse = torch.tensor([-0.5 + 1j * 4 / np.pi * (4 / k - 1) for k in (1, 3)], dtype=torch.complex128)
    assert torch.allclose(s4d_start("inv", 4)[0], inverse)
    assert s4d_start("real", 4)[0].tolist() == [-1, -2, -3, -4] and s4d_start("real", 4)[2] == 4
    for n in (0, 3):
        with pytest.raises(ValueError, match="even"):
            s4d_start("lin", n)


@pytest.mark.parametrize("method", METHODS)
@given(st.integers(1, 8), st.integers(1, 3), st.floats(1e-3, 1e-1))
def test_dense_discretisation_is_scipys(method: Method, n: int, p: int, step: float) -> None:
    a, b = hippo_legs(n)[0], normal(n, p)
    expected = scipy.signal.cont2discrete((a.numpy(), b.numpy(), np.eye(n), np.zeros((n, p))), step, method)
    found = discretize(a, b, step, method)
    assert all(np.allclose(x, y, *EQUAL64) for x, y in zip(found, expected[:2], strict=True))
    if method == "zoh":
        assert np.allclose(found[0], scipy.linalg.expm(step * a.numpy()), *EQUAL64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", STARTS)
def test_diagonal_discretisation_is_the_dense_one(start: Start, method: Method) -> None:
    a, b, _ = s4d_start(start, 8)
    steps = torch.tensor([[1e-3], [1e-1]], dtype=torch.float64)
    values, driven = discretize_diagonal(a, b, steps, method)
    for i, step in enumerate(steps[:, 0].tolist()):
        dense_a, dense_b = discretize(torch.diag(a), b[:, None], step, method)
        assert torch.allclose(torch.diag(values[i]), dense_a, *EQUAL64)
        assert torch.allclose(driven[i], dense_b[:, 0], *EQUAL64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", STARTS)
def test_the_kernel_is_what_the_recurrence_does(start: Start, method: Method) -> None:
    """Every channel: K_l = weight Re(C A^l B) by the definition, by `response`, and by a simulated convolution."""
    n, channels, length = 8, 3, 40
    m = n if start == "real" else n // 2
    c = torch.complex(normal(channels, m, seed=1), normal(channels, m, seed=2) * (start != "real"))
    steps = torch.tensor([1e-3, 1e-2, 1e-1])
    modes = s4d(start, n, steps, c, normal(channels, seed=3), method)
    a, b, _ = s4d_start(start, n)
    values, driven = discretize_diagonal(a, b, steps[:, None].double(), method)
    weight = 1 if start == "real" else 2
    vandermonde = values[..., None] ** torch.arange(length)
    kernel = weight * torch.einsum("hm,hml->hl", c * driven, vandermonde).real
    response = modes.response(length)[..., 0, 0]
    response[:, 0] -= modes.d[:, 0, 0]
    assert torch.allclose(response, kernel, *EQUAL64)
    u = normal(channels, length, seed=5)
    convolved = torch.fft.irfft(torch.fft.rfft(kernel, 2 * length) * torch.fft.rfft(u, 2 * length), 2 * length)[:, :length]
    outputs, _ = modes.real(torch.float64).simulate(u[..., None])
    assert torch.allclose(outputs[..., 0], convolved + modes.d[:, 0] * u, *EQUAL64)


def test_s4d_is_close_to_s4() -> None:
    """Gu et al. 2022, theorem 3: seen through B, S4D-LegS tends to HiPPO-LegS as the state grows; here the responses to a step."""
    errors = []
    for n in (8, 32, 128):
        a, b = hippo_legs(n)
        kept = a + torch.outer(b[:, 0], b[:, 0]) / 2
        full, diagonal = (System.of(*discretize(x, y, 0.01, "bilinear"), torch.eye(n)[:1]) for x, y in ((a, b), (kept, b / 2)))
        u = torch.ones(300, 1, dtype=torch.float64)
        errors.append(float((full.simulate(u)[0] - diagonal.simulate(u)[0]).abs().max()))
    assert errors[0] > errors[1] > errors[2]
