"""The laws of AbstractStructure, for every structure that is found in the folder."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewriter.moments import isotropic
from rewriter.operator import AbstractMatrix, AbstractOperator, flatten, tensors, unflatten
from rewriter.registry import eager_ops, load_structures
from rewriter.structure import AbstractStructure, Fitted, NoMatch
from rewriter.tolerances import EQUAL, EXACT

from .inputs import anisotropic, decaying, generator

load_structures()
MINE = ("low-rank", "pivoted-low-rank", "block-dense", "monarch", "block-shuffle", "block-diagonal", "nm-sparse")
FITTED = (*MINE, "blast")  # blast: a descent that need not end at a planted member, and no discovery
OPERATORS = ("LowRank", "PivotedLowRank", "BlockDense", "Monarch", "UnequalBlocks", "HouseholderProduct", "Sparse", "Blast")
SHAPES = [(48, 64), (64, 48), (37, 53), (53, 37), (96, 30), (40, 101)]
structures = pytest.mark.parametrize("name", MINE)
fitted = pytest.mark.parametrize("name", FITTED)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
many = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
sides = st.integers(1, 70)


def structure(name: str, spelling: str = "") -> AbstractStructure:
    """The structure, with the options of a spelling."""
    options = dict(part.split("=") for part in spelling.split(":")[1:])
    return AbstractStructure.kinds[name](**{key.replace("-", "_"): int(value) for key, value in options.items()})


def member(name: str, m: int, n: int, seed: int) -> Fitted | None:
    """A random member at half of the dense numbers, made by fitting noise."""
    noise = torch.randn(m, n, generator=generator(seed))
    fit = structure(name).fit(noise, isotropic(n), m * n // 2, generator(seed))
    return fit if isinstance(fit, Fitted) else None


@fitted
@shapes
def test_fit_keeps_shape_limit_and_says_its_error(name: str, shape: tuple[int, int]) -> None:
    weight, moments = decaying(*shape), anisotropic(shape[1])
    for limit in (prod(shape) // 3, prod(shape) // 2, prod(shape) * 4 // 5):
        fit = structure(name).fit(weight, moments, limit, generator(0))
        if isinstance(fit, NoMatch):
            assert str(limit) in fit.reason
            continue
        assert fit.operator.shape == shape
        assert fit.operator.cost().params <= limit
        assert all(t.dtype in (torch.float32, torch.int64, torch.uint8) for t in tensors(fit.operator))
        assert fit.weighted_error == pytest.approx(moments.error(weight, fit.operator.dense()), rel=EXACT[torch.float32])
        assert 0 < fit.weighted_error < 1


@structures
@many
@given(m=sides, n=sides, seed=st.integers(0, 9))
def test_member_is_recovered_and_discovered(name: str, m: int, n: int, seed: int) -> None:
    planted = member(name, m, n, seed)
    if planted is None:
        return
    weight = planted.operator.dense()
    again = structure(name, planted.spelling).fit(weight, anisotropic(n, seed), m * n, generator(1))
    assert isinstance(again, Fitted)
    assert again.spelling == planted.spelling
    assert again.weighted_error <= EXACT[torch.float32]
    found = structure(name).discover(weight)
    assert isinstance(found, Fitted), found
    assert found.operator.cost().params <= planted.operator.cost().params
    assert torch.linalg.norm(found.operator.dense() - weight) <= EXACT[torch.float32] * torch.linalg.norm(weight)


@structures
@many
@given(m=sides, n=sides, seed=st.integers(0, 9))
def test_discovery_is_exact_or_nothing(name: str, m: int, n: int, seed: int) -> None:
    weight = torch.randn(m, n, generator=generator(seed))
    found = structure(name).discover(weight)
    if min(m, n) > 1:
        assert isinstance(found, NoMatch)
        assert found.reason
    elif isinstance(found, Fitted):
        assert found.operator.cost().params < m * n


@structures
def test_generic_weights_are_rejected_also_with_zeros_and_decay(name: str) -> None:
    noise = torch.randn(60, 84, generator=generator(3))
    sparse = noise * (torch.rand(60, 84, generator=generator(4)) < 0.5)
    for weight in (noise, sparse, decaying(60, 84, power=2.0), noise + 10, noise.bfloat16(), noise.double()):
        assert isinstance(structure(name).discover(weight), NoMatch)


@fitted
@shapes
def test_more_numbers_are_not_worse(name: str, shape: tuple[int, int]) -> None:
    weight, moments = decaying(*shape), anisotropic(shape[1])
    fits = [structure(name).fit(weight, moments, prod(shape) * part // 10, generator(0)) for part in (2, 4, 6, 8)]
    errors = [fit.weighted_error for fit in fits if isinstance(fit, Fitted)]
    assert errors == sorted(errors, reverse=True)


@fitted
def test_same_input_same_bytes(name: str) -> None:
    weight, moments = decaying(37, 53), anisotropic(53)
    first, second = (structure(name).fit(weight, moments, 37 * 53 // 2, generator(7)) for _ in range(2))
    assert isinstance(first, Fitted)
    assert isinstance(second, Fitted)
    assert first.spelling == second.spelling
    assert all(torch.equal(a, b) for a, b in zip(tensors(first.operator), tensors(second.operator), strict=True))


@pytest.mark.parametrize("name", sorted(AbstractStructure.kinds))
def test_how_a_weight_lies_in_memory_does_not_matter(name: str) -> None:
    """ONNX stores the transpose of what torch does."""
    weight, moments = decaying(48, 64), anisotropic(64)
    fits = [structure(name).fit(w, moments, int(0.7 * weight.numel()), generator(5)) for w in (weight, weight.T.contiguous().T)]
    assert all(isinstance(fit, Fitted) for fit in fits) or all(isinstance(fit, NoMatch) for fit in fits)
    if isinstance(fits[0], Fitted) and isinstance(fits[1], Fitted):
        assert fits[1].weighted_error == pytest.approx(fits[0].weighted_error, rel=EXACT[torch.float32])


@structures
def test_weights_without_answer_are_refused_in_words(name: str) -> None:
    for value in (float("nan"), float("inf")):
        weight = torch.ones(8, 12)
        weight[3, 4] = value
        for answer in (structure(name).discover(weight), structure(name).fit(weight, isotropic(12), 48, generator(0))):
            assert isinstance(answer, NoMatch)
            assert "NaN" in answer.reason
    moments = isotropic(12)
    moments.second[0, 0] = float("nan")
    assert isinstance(structure(name).fit(torch.ones(8, 12), moments, 48, generator(0)), NoMatch)
    with pytest.raises(ValueError, match="moments of 12 features"):
        structure(name).fit(torch.ones(8, 11), isotropic(12), 48, generator(0))


@fitted
@pytest.mark.parametrize("shape", [(1, 1), (1, 24), (24, 1), (2, 3), (12, 20)], ids=str)
def test_zero_and_thin_weights(name: str, shape: tuple[int, int]) -> None:
    for weight in (torch.zeros(shape), torch.ones(shape)):
        fit = structure(name).fit(weight, isotropic(shape[1]), prod(shape) - 1, generator(0))
        assert isinstance(fit, NoMatch) or fit.operator.cost().params < prod(shape)
        found = structure(name).discover(weight)
        if isinstance(found, Fitted):
            assert found.operator.cost().params < prod(shape)
            assert torch.allclose(found.operator.dense(), weight, *EQUAL[torch.float32])


@fitted
def test_options_are_kept_or_refused_with_numbers(name: str) -> None:
    weight, moments = decaying(37, 53), anisotropic(53)
    fit = structure(name).fit(weight, moments, 37 * 53 // 2, generator(0))
    assert isinstance(fit, Fitted)
    same = structure(name, fit.spelling).fit(weight, moments, fit.operator.cost().params, generator(0))
    assert isinstance(same, Fitted)
    assert same.spelling == fit.spelling
    assert same.weighted_error == pytest.approx(fit.weighted_error, rel=EXACT[torch.float32])
    refused = structure(name, fit.spelling).fit(weight, moments, fit.operator.cost().params - 1, generator(0))
    assert isinstance(refused, NoMatch)
    assert str(fit.operator.cost().params) in refused.reason


@fitted
def test_few_calibration_rows_and_dead_inputs(name: str) -> None:
    weight = decaying(30, 44)
    rows = torch.randn(6, 44, generator=generator(0), dtype=torch.float64)
    rows[:, 5:9] = 0
    for second in (rows.T @ rows / 6, torch.zeros(44, 44, dtype=torch.float64)):
        moments = isotropic(44)
        moments.second[:] = second
        fit = structure(name).fit(weight, moments, 30 * 44 // 2, generator(0))
        assert isinstance(fit, Fitted)
        assert torch.isfinite(fit.operator.dense()).all()
        assert fit.weighted_error < 1


@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_agree_with_their_dense_form(kind: str) -> None:
    operator = AbstractOperator.kinds[kind].random(generator(0))  # type: ignore[attr-defined]
    assert isinstance(operator, AbstractMatrix)
    m, n = operator.shape
    x = torch.randn(2, 3, n, generator=generator(1))
    dense = operator.dense()
    assert dense.shape == (m, n)
    assert torch.allclose(operator.product(eager_ops(), x), x @ dense.T, *EQUAL[torch.float32])
    leaves, spec = flatten(operator)
    assert torch.equal(unflatten(spec, leaves).dense(), dense)  # type: ignore[attr-defined]
    assert operator.cost().params == sum(t.numel() for t in leaves if t.is_floating_point())
