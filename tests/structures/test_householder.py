"""The laws of structures on square weights, planted reflections and low-rank steps from the identity, products proper, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.fit import fit_families
from rewriter.moments import Moments, isotropic
from rewriter.operator import flatten, tensors, unflatten
from rewriter.passes.solvers.householder import Reflectors
from rewriter.passes.structures.householder import HouseholderProduct, HouseholderStructure, folded
from rewriter.registry import eager_ops, parse_passes, structures
from rewriter.structure import Fitted, NoMatch
from rewriter.tolerances import EQUAL, EXACT

from .inputs import anisotropic, decaying, generator

FP32 = EXACT[torch.float32]
many = settings(max_examples=60, derandomize=True)
sides = st.integers(1, 70)
contractions = pytest.mark.parametrize("contraction", [False, True])


def near_identity(n: int, seed: int = 0, size: float = 0.3) -> Tensor:
    """What a trained square weight with a residual part looks like: the identity, and a spectrum that falls slowly."""
    return torch.eye(n) + size * decaying(n, n, seed)


def reflectors(n: int, k: int, beta: float | None = None, seed: int = 0) -> Reflectors:
    rng = generator(seed)
    vectors = torch.nn.functional.normalize(torch.randn(n, k, generator=rng, dtype=torch.float64), dim=0)
    return Reflectors(
        vectors, 0.1 + 1.9 * torch.rand(k, generator=rng, dtype=torch.float64) if beta is None else torch.full((k,), beta).double()
    )


def fit(structure: HouseholderStructure, weight: Tensor, moments: Moments, limit: int) -> Fitted:
    answer = structure.fit(weight, moments, limit, generator(0))
    assert isinstance(answer, Fitted), answer
    return answer


def found(weight: Tensor, structure: HouseholderStructure | None = None) -> Fitted:
    answer = (structure or HouseholderStructure()).discover(weight)
    assert isinstance(answer, Fitted), answer
    assert torch.linalg.matrix_norm(answer.operator.dense() - weight) <= EXACT[weight.dtype] * torch.linalg.matrix_norm(weight)
    assert answer.operator.cost().params < weight.numel()
    return answer


def test_it_is_found_in_the_folder_and_on_the_command_line() -> None:
    assert structures()["householder"] is HouseholderStructure
    (step,) = parse_passes("householder:factors=8:contraction=true:params=0.4")
    assert step.structure == HouseholderStructure(8, True)
    assert parse_passes(step.spelling())[0] == step


def test_the_operator_is_two_thin_products() -> None:
    operator = HouseholderProduct.random(generator(0))
    x = torch.randn(2, 3, 7, generator=generator(1))
    assert torch.allclose(operator.product(eager_ops(), x), x + (x @ operator.u) @ operator.v, *EQUAL[torch.float32])
    assert torch.allclose(operator.product(eager_ops(), x), x @ operator.dense().T, *EQUAL[torch.float32])
    assert operator.cost().params == 2 * 3 * 7
    assert operator.cost(tokens=5).flops == 5 * (2 * operator.cost().params + 7)
    leaves, spec = flatten(operator)
    assert torch.equal(unflatten(spec, leaves).dense(), operator.dense())  # type: ignore[attr-defined]


@many
@given(n=sides, k=st.integers(1, 12), seed=st.integers(0, 9))
def test_folding_keeps_the_product(n: int, k: int, seed: int) -> None:
    product = reflectors(n, k, seed=seed)
    assert torch.allclose(folded(product).dense(), product.dense(), *EQUAL[torch.float64])


@contractions
@pytest.mark.parametrize("n", [16, 37, 53])
def test_fit_keeps_shape_limit_and_says_its_error(n: int, contraction: bool) -> None:
    weight, moments = near_identity(n), anisotropic(n)
    errors = []
    for limit in (n * n * part // 10 for part in (2, 4, 6, 8)):
        got = fit(HouseholderStructure(contraction=contraction), weight, moments, limit)
        assert got.operator.shape == (n, n)
        assert got.operator.cost().params == limit // (2 * n) * 2 * n
        assert all(t.dtype == torch.float32 for t in tensors(got.operator))
        assert got.weighted_error == pytest.approx(moments.error(weight, got.operator.dense()), rel=FP32)
        errors.append(got.weighted_error)
    assert errors[-1] > 0 and errors[0] < 1
    assert errors == sorted(errors, reverse=True)


def test_fit_is_the_weighted_optimum() -> None:
    """Against the textbook route: SVD of (I - W) H^1/2, truncated, times H^-1/2."""
    weight, moments = near_identity(40), anisotropic(40)
    values, vectors = torch.linalg.eigh(moments.second)
    root, inverse = ((vectors * values**p) @ vectors.T for p in (0.5, -0.5))
    u, s, v = torch.linalg.svd((torch.eye(40) - weight).double() @ root)
    best = torch.eye(40) - (u[:, :9] * s[:9]) @ v[:9] @ inverse
    got = fit(HouseholderStructure(9), weight, moments, weight.numel())
    assert got.weighted_error == pytest.approx(moments.error(weight, best), rel=EQUAL[torch.float32][0])


@many
@given(n=sides, k=st.integers(1, 70), seed=st.integers(0, 9))
def test_members_are_fitted_and_discovered_at_their_rank(n: int, k: int, seed: int) -> None:
    rng, k = generator(seed), min(k, max(1, (n - 1) // 2))
    operator = HouseholderProduct(torch.randn(n, k, generator=rng), torch.randn(k, n, generator=rng))
    weight = operator.dense()
    again = HouseholderStructure(k).fit(weight, anisotropic(n, seed), 2 * n * n, rng)
    assert isinstance(again, Fitted)
    assert again.spelling == f"householder:factors={k}"
    assert again.weighted_error <= FP32
    if n > 2:
        assert found(weight).spelling == again.spelling


@contractions
@pytest.mark.parametrize("beta", [None, 2.0])
@pytest.mark.parametrize(("n", "k"), [(12, 1), (25, 4), (64, 12)])
def test_planted_products_are_found(n: int, k: int, beta: float | None, contraction: bool) -> None:
    structure, planted = HouseholderStructure(contraction=contraction), reflectors(n, k, beta)
    weight = planted.dense().float()
    assert found(weight, structure).spelling == HouseholderStructure(k, contraction).spelling()
    assert fit(HouseholderStructure(k, contraction), weight, anisotropic(n), 2 * k * n).weighted_error <= FP32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_discovery_in_other_dtypes(dtype: torch.dtype) -> None:
    assert found(reflectors(48, 3, 2.0).dense().to(dtype)).spelling == "householder:factors=3"


def test_a_product_proper_never_lengthens() -> None:
    """A weight that lengthens is not among them; where it does not, the product costs little beside the freer form."""
    longer, moments = near_identity(30, size=3.0), isotropic(30)
    proper = fit(HouseholderStructure(8, True), longer, moments, longer.numel())
    assert torch.linalg.matrix_norm(proper.operator.dense(), 2) <= 1 + EQUAL[torch.float32][0]
    assert proper.weighted_error > fit(HouseholderStructure(8), longer, moments, longer.numel()).weighted_error
    shear = torch.eye(12) + 3 * torch.outer(torch.eye(12)[0], torch.eye(12)[1])
    assert found(shear).spelling == "householder:factors=1"
    refused = HouseholderStructure(contraction=True).discover(shear)
    assert isinstance(refused, NoMatch) and "its norm is" in refused.reason


@many
@given(n=sides, seed=st.integers(0, 9))
def test_discovery_is_exact_or_nothing(n: int, seed: int) -> None:
    """Noise, noise near the identity, and orthogonal matrices that need all n reflections."""
    noise = torch.randn(n, n, generator=generator(seed))
    for weight in (noise, torch.eye(n) + 0.1 * noise, torch.linalg.qr(noise).Q if n > 2 else noise):
        refused = HouseholderStructure().discover(weight)
        assert isinstance(refused, NoMatch)
        assert refused.reason


def test_generic_weights_are_rejected_also_with_zeros_and_decay() -> None:
    noise = torch.randn(60, 60, generator=generator(3))
    sparse = noise * (torch.rand(60, 60, generator=generator(4)) < 0.5)
    for weight in (noise, sparse, decaying(60, 60, power=2.0), noise + 10, noise.bfloat16(), noise.double(), torch.zeros(60, 60)):
        assert isinstance(HouseholderStructure().discover(weight), NoMatch)


@contractions
def test_refusals_have_their_reasons(contraction: bool) -> None:
    free = HouseholderStructure(contraction=contraction)
    for weight, reason in (
        (torch.ones(8, 12), "a 8 x 12 weight is not square"),
        (torch.full((12, 12), float("nan")), "NaN"),
        (-torch.eye(12), "far from the identity"),
    ):
        answer = free.fit(weight, isotropic(12), 48, generator(0))
        assert isinstance(answer, NoMatch) and reason in answer.reason
        assert isinstance(free.discover(weight), NoMatch)
    weight = near_identity(12)
    for factors, limit, reason in ((3, 71, "stores 72 numbers, the limit is 71"), (13, 999, "12 factors are all of it")):
        answer = HouseholderStructure(factors, contraction).fit(weight, isotropic(12), limit, generator(0))
        assert isinstance(answer, NoMatch) and reason in answer.reason
    with pytest.raises(ValueError, match="moments of 12 features"):
        free.fit(torch.eye(11), isotropic(12), 48, generator(0))


@contractions
def test_same_input_same_bytes_few_rows_and_dead_inputs(contraction: bool) -> None:
    weight, structure = near_identity(33), HouseholderStructure(5, contraction)
    rows = torch.randn(6, 33, generator=generator(0), dtype=torch.float64)
    rows[:, 5:9] = 0
    for second in (rows.T @ rows / 6, torch.zeros(33, 33, dtype=torch.float64)):
        moments = isotropic(33)
        moments.second[:] = second
        first, again = (fit(structure, weight, moments, weight.numel()) for _ in range(2))
        assert torch.isfinite(first.operator.dense()).all()
        assert all(torch.equal(a, b) for a, b in zip(tensors(first.operator), tensors(again.operator), strict=True))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_weights(n: int) -> None:
    for weight in (torch.zeros(n, n), torch.ones(n, n), torch.eye(n), -torch.eye(n)):
        answer = HouseholderStructure().fit(weight, isotropic(n), n * n - 1, generator(0))
        assert isinstance(answer, NoMatch) or answer.operator.cost().params < n * n
        discovered = HouseholderStructure().discover(weight)
        assert isinstance(discovered, NoMatch) or torch.equal(discovered.operator.dense(), weight)


def test_auto_takes_it_near_the_identity_only() -> None:
    """At equal numbers, beside all families: a residual part is told apart from a weight without one."""
    moments = anisotropic(48)
    families = [kind() for kind in structures().values() if not kind.named_only]
    names = []
    for weight in (near_identity(48), decaying(48, 48), torch.randn(48, 48, generator=generator(0)) / 7):
        fits, _ = fit_families(families, weight, moments, 48 * 48 // 2, generator(0), shifted=False)
        names.append(fits[0].spelling.partition(":")[0])
    assert names[0] == "householder"
    assert "householder" not in names[1:]


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("householder:contraction=maybe", "cannot be read; give true or false"),
        ("monarch-attention:error=inf", "out of range; give a finite number"),
        ("diagonalize:error=1e400", "out of range; give a finite number"),
    ],
)
def test_values_that_no_option_has_are_refused(spelled: str, said: str) -> None:
    with pytest.raises(RewriteError, match=said):
        parse_passes(spelled)
