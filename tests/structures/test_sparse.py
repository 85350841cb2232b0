"""The atom Sparse: what is kept, how it is packed, what it costs, and that kept values train."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.algebra import Dense, Sparse
from rewriter.backends.counting import CountingOps
from rewriter.backends.eager import EagerOps
from rewriter.operator import flatten, skeleton
from rewriter.packing import bits, pack, unpack
from rewriter.tolerances import EQUAL

from .inputs import generator

some = settings(max_examples=60, deadline=None, derandomize=True)


@some
@given(m=st.sampled_from([2, 3, 4, 5, 16, 17, 256]), rows=st.integers(1, 23), columns=st.integers(1, 5), seed=st.integers(0, 9))
def test_what_is_packed_comes_back(m: int, rows: int, columns: int, seed: int) -> None:
    positions = torch.randint(0, m, (rows, columns), generator=generator(seed))
    packed = pack(positions, m)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-rows * bits(m) // 8), columns)
    assert torch.equal(unpack(packed, rows, m), positions)


@pytest.mark.parametrize("m", [1, 257])
def test_groups_that_no_byte_numbers_are_refused(m: int) -> None:
    with pytest.raises(ValueError, match=f"groups of {m}"):
        bits(m)


@some
@given(
    m=st.sampled_from([2, 4, 5, 8, 20]), share=st.integers(1, 3), shared=st.sampled_from([1, 2, 3]), inputs=st.integers(1, 41),
    owners=st.integers(1, 4), seed=st.integers(0, 9),
)  # fmt: skip
def test_the_largest_are_kept_where_they_stand(m: int, share: int, shared: int, inputs: int, owners: int, seed: int) -> None:
    n = min(share, m - 1)
    weight = torch.randn(inputs, owners * shared, generator=generator(seed))
    operator = Sparse.of(weight, n, m, shared)
    dense = operator.dense().T
    assert dense.shape == weight.shape
    for begin in range(0, inputs, m):
        for owner in range(0, weight.shape[1], shared):
            group, got = (w[begin : begin + m, owner : owner + shared] for w in (weight, dense))
            best = sorted(range(len(group)), key=lambda r: -float(group[r].square().sum()))[:n]
            assert torch.equal(got, torch.where(torch.tensor([r in best for r in range(len(group))])[:, None], group, 0.0))


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize(("n", "m", "width"), [(2, 4, 2), (1, 4, 2), (4, 8, 4), (4, 32, 8)])
def test_costs_are_those_of_what_is_stored(n: int, m: int, width: int, shared: int) -> None:
    operator = Sparse.of(torch.randn(64, 48, generator=generator(0)), n, m, shared)
    cost, values = operator.cost(tokens=3), 64 * n // m * 48
    assert (cost.params, cost.nbytes) == (values, 4 * values + values * width // 8 // shared)
    assert cost.flops == Dense(torch.zeros(64, 48)).cost(tokens=3).flops  # runtimes apply it as a dense weight


def test_the_kept_values_train() -> None:
    operator = Sparse.of(torch.randn(8, 6, generator=generator(0)), 2, 4)
    x, values = torch.randn(5, 8, generator=generator(1)), operator.values.clone().requires_grad_()
    y = x @ EagerOps().scatter(values, operator.positions, 2, 4)
    y.square().sum().backward()
    whole = operator.dense().T.clone().requires_grad_()
    (x @ whole).square().sum().backward()
    assert whole.grad is not None and values.grad is not None
    found = EagerOps().scatter(values.grad, operator.positions, 2, 4)
    torch.testing.assert_close(found, whole.grad * (operator.dense().T != 0), rtol=EQUAL[torch.float32][0], atol=EQUAL[torch.float32][1])


def test_a_spec_says_the_type_of_its_indices() -> None:
    operator = Sparse.random(generator(0))
    leaves, spec = flatten(operator)
    bare, found = skeleton(spec)
    assert [t.dtype for t in found] == [t.dtype for t in leaves] == [torch.float32, torch.uint8]
    assert bare.cost() == operator.cost()


def test_to_put_values_in_their_places_counts_as_nothing() -> None:
    operator, ops = Sparse.random(generator(0)), CountingOps()
    operator.product(ops, torch.zeros(2, operator.shape[1]))
    assert ops.flops == operator.cost(tokens=2).flops
