"""Weights in 8 bits around every operator: half a step off at the most, the operator's own product, a quarter of the bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewriter.algebra import Dense
from rewriter.backends.eager import EagerOps
from rewriter.operator import AbstractMatrix, AbstractOperator, flatten, tensors, unflatten
from rewriter.packing import nibbles, pack_nibbles
from rewriter.passes.structures.low_rank import LowRank
from rewriter.quantised import GROUPS, LARGEST, LEAST, Quantised, floats, quantised, rounded, rounded_to_4, weights_of
from rewriter.registry import load_structures
from rewriter.tolerances import EXACT
from tests.onnx.models import close

load_structures()
MATRICES = sorted(name for name, kind in AbstractOperator.kinds.items() if issubclass(kind, AbstractMatrix) and name != "Quantised")
WEIGHTLESS = {"Diagonal", "Permutation"}  # nothing of theirs is the weight of a product as it is stored


def random(name: str) -> AbstractMatrix:
    kind = AbstractOperator.kinds[name]
    assert issubclass(kind, AbstractMatrix)
    return kind.random(torch.Generator().manual_seed(3))


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 3), q=st.integers(1, 9), p=st.integers(1, 9), power=st.integers(-30, 30))
def test_half_a_step_off_at_the_most(seed: int, k: int, q: int, p: int, power: int) -> None:
    weight = torch.randn(k, q, p, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    values, scales = rounded(weight)
    assert values.dtype == torch.int8 and scales.shape == (k, 1, p)
    off = (weight - values * scales).abs()
    assert (off <= scales * 0.5 * (1 + EXACT[torch.float32] * LARGEST)).all()
    assert (values.abs().amax(1) == LARGEST).all()  # all steps are used


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 3), q=st.integers(1, 12), p=st.integers(1, 9), power=st.integers(-30, 30))
def test_half_a_step_of_4_bits_off_but_where_a_number_is_nearly_the_largest(seed: int, k: int, q: int, p: int, power: int) -> None:
    """The largest is -8 steps; one of the other sign is cut at 7, up to a step off."""
    weight = torch.randn(k, 16 * q, p, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    values, scales = rounded_to_4(weight)
    group = next(g for g in GROUPS if 16 * q % g == 0)
    assert values.dtype == torch.uint8 and values.shape == (k, 8 * q, p) and scales.shape == (k, 16 * q // group, p)
    steps = (weight.unflatten(1, (-1, group)) - floats(values, scales).unflatten(1, (-1, group))).abs() / scales.abs()[:, :, None]
    most = torch.where(weight.unflatten(1, (-1, group)) / scales[:, :, None] > 7, 1.0, 0.5)
    assert (steps <= most * (1 + EXACT[torch.float32] * LARGEST)).all()
    assert (nibbles(values).unflatten(1, (-1, group)).amin(2) == LEAST).all()


def test_what_no_group_divides_is_in_8_bits() -> None:
    made = quantised(LowRank(torch.randn(32, 5), torch.randn(5, 8)), 4)
    assert made is not None and made.bits == 4
    assert [v.dtype for v in made.values] == [torch.uint8, torch.int8]
    whole = quantised(LowRank(torch.randn(9, 5), torch.randn(5, 8)), 4)
    assert whole is not None and whole.bits == 8


def test_bytes_and_numbers_of_4_bits() -> None:
    operator = Dense(torch.randn(64, 6))
    made = quantised(operator, 4)
    assert made is not None
    assert (made.cost().params, made.cost().nbytes) == (64 * 6 + 2 * 6, 64 * 6 // 2 + 2 * 6 * 4)
    assert made.cost(7).flops == operator.cost(7).flops
    x = torch.randn(3, 64)
    close(made.product(EagerOps(), x), x @ made.dense().T)
    error = (made.dense() - operator.dense()).norm() / operator.dense().norm()
    assert 1 / LARGEST < error < -1 / LEAST


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5))
def test_nibbles_come_back(seed: int, rows: int, columns: int) -> None:
    values = torch.randint(-8, 8, (2, 2 * rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    assert nibbles(pack_nibbles(values)).equal(values)


def test_columns_of_zeros_stay_zeros() -> None:
    weight = torch.randn(5, 4)
    weight[:, 2] = 0
    values, scales = rounded(weight)
    assert not (values * scales)[:, 2].any() and (values * scales).isfinite().all()
    wide = torch.zeros(32, 4)
    wide[:, 1] = 1
    assert floats(*rounded_to_4(wide)).equal(wide)


@pytest.mark.parametrize("name", MATRICES)
def test_the_product_is_the_operators_own(name: str) -> None:
    operator = random(name)
    made = quantised(operator)
    if name in WEIGHTLESS:
        assert made is None
        return
    assert isinstance(made, Quantised) and made.shape == operator.shape
    x = torch.randn(4, operator.shape[1])
    close(made.product(EagerOps(), x), made.inside.product(EagerOps(), x))
    error = (made.dense() - operator.dense()).norm() / operator.dense().norm()
    assert 0 < error < 2 / LARGEST


@pytest.mark.parametrize("name", [n for n in MATRICES if n not in WEIGHTLESS])
def test_bytes_fall_and_numbers_are_counted(name: str) -> None:
    operator = random(name)
    made = quantised(operator)
    assert isinstance(made, Quantised)
    places = weights_of(operator)
    leaves, _ = flatten(operator)
    assert sum(v.numel() for v in made.values) == sum(leaves[i].numel() for i in places)
    assert made.cost().params == operator.cost().params + sum(s.numel() for s in made.scales)
    assert made.cost().nbytes == sum(t.numel() * t.element_size() for t in tensors(made))
    assert made.cost(7).flops == operator.cost(7).flops


def test_what_is_no_weight_of_a_product_stays() -> None:
    operator = random("HouseholderProduct")
    made = quantised(operator)
    assert isinstance(made, Quantised)
    leaves, _ = flatten(operator)
    kept = [leaf for i, leaf in enumerate(leaves) if i not in made.places]
    assert all(a is b for a, b in zip(kept, made.others, strict=True))


def test_a_spec_brings_it_back() -> None:
    made = quantised(LowRank(torch.randn(9, 3), torch.randn(3, 8)))
    assert isinstance(made, Quantised)
    leaves, spec = flatten(made)
    back = unflatten(spec, leaves)
    assert isinstance(back, Quantised) and back.dense().equal(made.dense())
    assert [leaf.dtype for leaf in leaves] == [torch.int8, torch.int8, torch.float32, torch.float32]
