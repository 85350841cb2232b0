"""Householder products: LAPACK's own as oracles, reflections counted by rank, planted factors found again, and a fit that never loses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.passes.solvers.householder import Reflectors, factors, nearest_factors, reflections, wy
from rewriter.passes.solvers.householder_fit import identity_minus, nearest_product
from rewriter.passes.solvers.spectral import ridged
from rewriter.structure import NoMatch
from rewriter.tolerances import EQUAL, EXACT

FP64, FP32 = EXACT[torch.float64], EXACT[torch.float32]
many = settings(max_examples=80, derandomize=True)
seeds = st.integers(0, 10**6)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def units(n: int, k: int, seed: int = 0, common: float = 0.0) -> Tensor:
    """Unit columns, correlated by a common part."""
    return torch.nn.functional.normalize(normal(n, k, seed=seed) + common * normal(n, 1, seed=seed + 1), dim=0)


def product(vectors: Tensor, betas: Tensor) -> Tensor:
    """The definition: one factor after the other."""
    a = torch.eye(len(vectors), dtype=torch.float64)
    for v, beta in zip(vectors.T, betas, strict=True):
        a = a @ (torch.eye(len(v), dtype=torch.float64) - beta * torch.outer(v, v))
    return a


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.as_tensor(torch.linalg.qr(normal(n, n, seed=seed)).Q)


def turned(n: int, angle: float, seed: int = 0) -> Tensor:
    """A rotation by this angle in one plane of R^n; I - cos is written so that small angles keep their digits."""
    plane, half = orthogonal(n, seed)[:, :2], torch.tensor(angle / 2, dtype=torch.float64)
    cosine, sine = 2 * half.sin().square(), 2 * half.sin() * half.cos()
    return torch.eye(n, dtype=torch.float64) - plane @ torch.stack([cosine, sine, -sine, cosine]).reshape(2, 2) @ plane.T


def same(found: Reflectors | NoMatch, a: Tensor, level: float = FP64) -> Reflectors:
    """What was found is A, factor by factor and in compact form, with unit vectors and β in [0, 2]."""
    assert isinstance(found, Reflectors), found
    size = max(float(torch.linalg.matrix_norm(a)), 1.0)
    assert torch.linalg.matrix_norm(product(found.vectors, found.betas) - a) <= level * size
    assert torch.linalg.matrix_norm(found.dense() - a) <= level * size
    assert torch.allclose(found.vectors.norm(dim=0), torch.ones(len(found.betas), dtype=torch.float64), *EQUAL[torch.float64])
    assert ((found.betas >= 0) & (found.betas <= 2)).all()
    return found


def rank(a: Tensor) -> int:
    return int((torch.linalg.svdvals(a - torch.eye(len(a), dtype=a.dtype)) > FP64).sum())


@many
@given(n=st.integers(1, 30), k=st.integers(0, 40), common=st.sampled_from([0.0, 1.0, 10.0]), seed=seeds)
def test_compact_form_is_the_product(n: int, k: int, common: float, seed: int) -> None:
    """Also with correlated vectors, more factors than rows, and β = 0 or 2 among them; T stays at most 4."""
    vectors, betas = units(n, k, seed, common), (3 * uniform(k, seed=seed) - 0.5).clamp(0, 2)
    y, t = wy(vectors, betas)
    assert torch.allclose(torch.eye(n, dtype=torch.float64) - y @ t @ y.T, product(vectors, betas), *EQUAL[torch.float64])
    assert torch.equal(t, t.triu())
    assert k == 0 or t.abs().max() <= 4 + FP32


def test_lapack_agrees() -> None:
    """torch.linalg.householder_product and torch.ormqr, on the reflectors of geqrf: v with v_i = 1 and τ = β / |v|^2."""
    lower, tau = torch.geqrf(normal(9, 5))
    v = lower.tril(-1) + torch.eye(9, 5, dtype=torch.float64)
    ours = Reflectors(v / v.norm(dim=0), tau * v.square().sum(0)).dense()
    x = normal(9, 4, seed=1)
    assert torch.allclose(ours[:, :5], torch.linalg.householder_product(lower, tau), *EQUAL[torch.float64])
    assert torch.allclose(ours @ x, torch.ormqr(lower, tau, x), *EQUAL[torch.float64])
    assert len(same(reflections(ours), ours).betas) == 5


ORTHOGONAL = {
    "identity": (torch.eye(6, dtype=torch.float64), 0),
    "minus identity": (-torch.eye(5, dtype=torch.float64), 5),
    "cycle": (torch.eye(8, dtype=torch.float64).roll(1, 0), 7),
    "two cycles": (torch.block_diag(torch.eye(3).roll(1, 0), torch.eye(2).roll(1, 0), torch.eye(4)).double(), 3),
    "one": (-torch.ones(1, 1, dtype=torch.float64), 1),
    "half a turn": (turned(7, torch.pi), 2),
    "turn": (turned(7, 1.0), 2),
    "equal turns": (turned(8, 0.3) @ turned(8, 0.3, seed=1), 4),
    "tiny turn": (turned(7, 1e-8), 2),
    "tiny turns": (turned(7, 1e-5) @ turned(7, 1e-7, seed=1), 4),
    "mirrored": (product(units(6, 1), torch.full((1,), 2.0)), 1),
}


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_reflections_are_as_many_as_the_rank(name: str) -> None:
    q, count = ORTHOGONAL[name]
    for found in (same(reflections(q), q), same(factors(q), q)):
        assert len(found.betas) == count == rank(q)
        assert (found.betas == 2).all()


@many
@given(n=st.integers(1, 24), k=st.integers(0, 24), mirror=st.booleans(), seed=seeds)
def test_reflections_of_any_orthogonal_matrix(n: int, k: int, mirror: bool, seed: int) -> None:
    """Products of k reflections, and matrices drawn at random with either determinant."""
    q = product(units(n, k, seed), torch.full((k,), 2.0, dtype=torch.float64)) if mirror else orthogonal(n, seed)
    found = same(reflections(q), q)
    assert len(found.betas) == rank(q)
    assert (-1) ** len(found.betas) == round(float(torch.linalg.det(q)))


def test_what_is_not_orthogonal_is_refused() -> None:
    refused = reflections(1.5 * torch.eye(3))
    assert isinstance(refused, NoMatch)
    assert "not orthogonal" in refused.reason


@many
@given(n=st.integers(2, 30), k=st.integers(1, 30), common=st.sampled_from([0.0, 0.5]), twos=st.booleans(), seed=seeds)
def test_a_product_of_k_is_found_as_k(n: int, k: int, common: float, twos: bool, seed: int) -> None:
    """Independent vectors: the same β again, in another order, and no more factors; reflections among them or not."""
    k = min(k, n, 12)
    betas = 0.05 + 1.9 * uniform(k, seed=seed)
    betas = torch.where(uniform(k, seed=seed + 1) < 0.4, 2.0, betas) if twos else betas
    a = product(units(n, k, seed, common), betas)
    found = same(factors(a), a, 10 * FP64)
    assert len(found.betas) == k
    assert torch.allclose(found.betas.sort().values, betas.sort().values, *EQUAL[torch.float32])


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_coinciding_betas_are_a_jordan_block_and_are_found(k: int, beta: float) -> None:
    """β = 1 is a product of projections, which is singular."""
    betas = torch.full((k,), beta, dtype=torch.float64)
    a = product(units(20, k, seed=k), betas)
    found = same(factors(a), a)
    assert torch.allclose(found.betas, betas, *EQUAL[torch.float32])


def test_symmetric_contractions_are_their_eigenvectors() -> None:
    frame, kept = orthogonal(9)[:, :4], 2 * uniform(4) - 1
    a = torch.eye(9, dtype=torch.float64) - (frame * (1 - kept)) @ frame.T
    found = same(factors(a), a)
    assert torch.allclose(found.betas.sort().values, (1 - kept).sort().values, *EQUAL[torch.float64])
    assert torch.allclose((frame.T @ found.vectors).abs().sum(0), torch.ones(4, dtype=torch.float64), *EQUAL[torch.float64])


@many
@given(n=st.integers(1, 24), k=st.integers(1, 24), seed=seeds)
def test_every_contraction_is_a_product(n: int, k: int, seed: int) -> None:
    """At least the rank, at most half as many again: one more for each complex pair."""
    k = min(k, n)
    block, basis = normal(k, k, seed=seed), orthogonal(n, seed)[:, :k]
    block = block / torch.linalg.matrix_norm(block, 2)
    a = torch.eye(n, dtype=torch.float64) - basis @ (torch.eye(k, dtype=torch.float64) - block) @ basis.T
    found = same(factors(a), a, 10 * FP64)
    assert rank(a) <= len(found.betas) <= rank(a) + rank(a) // 2


def test_a_shortened_rotation_needs_three() -> None:
    """No two factors give it: their β would have to be complex."""
    a = 0.9 * turned(2, 0.7)
    assert len(same(factors(a), a).betas) == 3
    assert torch.linalg.matrix_norm(nearest_factors(torch.eye(2, dtype=torch.float64), a).dense() - a) > FP32


def test_tiny_turns_among_contractions_keep_their_digits() -> None:
    a = product(units(12, 2), uniform(2)) @ turned(12, 1e-6) @ turned(12, 0.3, seed=1)
    assert len(same(factors(a), a).betas) == 6


@pytest.mark.parametrize("a", [2 * torch.eye(4), torch.eye(6) + torch.outer(torch.eye(6)[0], torch.eye(6)[1])], ids=["long", "shear"])
def test_no_product_lengthens(a: Tensor) -> None:
    refused = factors(a)
    assert isinstance(refused, NoMatch)
    assert f"its norm is {float(torch.linalg.matrix_norm(a.double(), 2)):.8g}" in refused.reason


def test_single_precision_has_its_own_zero() -> None:
    a = product(units(40, 6), 0.1 + 1.8 * uniform(6))
    for exact in (a, orthogonal(6)):
        found = same(factors(exact.float()), exact, FP32)
        assert len(found.betas) == rank(exact)


@pytest.mark.parametrize(("n", "k"), [(12, 1), (30, 7), (31, 14)])
def test_identity_minus_low_rank_is_found_at_its_rank(n: int, k: int) -> None:
    weight = torch.eye(n, dtype=torch.float64) - normal(n, k) @ normal(k, n, seed=1)
    found = identity_minus(weight, (n - 1) // 2)
    assert found is not None
    u, v = found
    assert u.shape == (n, k)
    assert torch.linalg.matrix_norm(torch.eye(n, dtype=torch.float64) - u @ v - weight) <= FP64 * torch.linalg.matrix_norm(weight)
    assert k == 1 or identity_minus(weight, k - 1) is None


def test_a_small_step_from_the_identity_is_measured_against_the_weight() -> None:
    """Rounding of the diagonal is that of numbers near one, however small I - W is; a smooth tail is no structure."""
    step = 1e-2 * torch.outer(units(200, 1)[:, 0], units(200, 1, seed=1)[:, 0])
    found = identity_minus((torch.eye(200, dtype=torch.float64) - step).float(), 99)
    assert found is not None
    assert len(found[1]) == 1
    frame = orthogonal(60)
    assert identity_minus((torch.eye(60) - ((frame * torch.logspace(0, -12, 60)) @ frame.T)).float(), 29) is None


def problem(n: int, k: int, noise: float) -> tuple[Tensor, Tensor]:
    rows = normal(3 * n, n, seed=2) * torch.linspace(0.1, 3, n, dtype=torch.float64)
    return product(units(n, k), 2 * uniform(k)) + noise * normal(n, n, seed=3), rows.T @ rows / len(rows)


def loss(weight: Tensor, second: Tensor, found: Reflectors) -> float:
    gap = weight - product(found.vectors, found.betas)
    return float(((gap @ ridged(second)) * gap).sum())


@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("n", "k"), [(10, 2), (24, 5), (25, 25)])
def test_a_fit_is_a_product_and_never_worse_than_its_start(n: int, k: int, noise: float) -> None:
    weight, second = problem(n, k, noise)
    found = nearest_product(weight, second, k)
    assert len(same(found, found.dense()).betas) == k
    gap = torch.eye(n, dtype=torch.float64) - weight
    frame = torch.linalg.eigh(gap @ ridged(second) @ gap.T).eigenvectors.flip(1)[:, :k]
    start = loss(weight, second, nearest_factors(frame, frame.T @ weight @ frame))
    assert loss(weight, second, found) <= start * (1 + FP32)
    assert loss(weight, second, found) < loss(weight, second, Reflectors(frame, torch.zeros(k, dtype=torch.float64)))


def test_a_fit_of_a_product_is_that_product() -> None:
    for betas in (2 * uniform(5), torch.full((5,), 2.0, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)):
        weight, second = product(units(20, 5), betas), problem(20, 5, 0.0)[1]
        for count in (5, 8):
            found = nearest_product(weight, second, count)
            assert len(found.betas) == count
            assert torch.linalg.matrix_norm(found.dense() - weight) <= FP32 * torch.linalg.matrix_norm(weight)


def test_symmetric_weights_have_a_known_optimum() -> None:
    """H = I and a symmetric contraction: the k eigenvalues farthest from one, as orthogonal factors."""
    frame, kept = orthogonal(12), torch.linspace(0.1, 0.95, 12, dtype=torch.float64)
    weight = (frame * kept) @ frame.T
    found = nearest_product(weight, torch.eye(12, dtype=torch.float64), 4)
    best = float((1 - kept).square().sort().values[:8].sum())
    assert loss(weight, torch.eye(12, dtype=torch.float64), found) <= best * (1 + FP32)
