"""Plans compute what the operator computes, in the plain form; what has no steps is refused with its reason."""

from __future__ import annotations

import pytest
import torch

from rewriter import packing
from rewriter.algebra import Dense, Sparse
from rewriter.backends.eager import EagerOps
from rewriter.backends.kernels import naive
from rewriter.backends.kernels.pack import runs_of
from rewriter.backends.kernels.plan import NOTHING, SCRATCH, Copy, Ending, Finish, NotCovered, PlanOps, Product, Y, plan
from rewriter.operator import AbstractMatrix, AbstractOperator
from rewriter.passes.structures.low_rank import LowRank
from rewriter.passes.structures.monarch import Monarch
from rewriter.passes.structures.pivoted_low_rank import PivotedLowRank
from rewriter.quantised import Quantised, quantised
from rewriter.registry import load_structures
from tests.kernels.spelled import spelled
from tests.onnx.models import close
from tests.onnx.rounding import RoundingOps

load_structures()
MATRICES = sorted(name for name, kind in AbstractOperator.kinds.items() if issubclass(kind, AbstractMatrix))
REFUSED = {
    "ByTokens": "two forms by the number of tokens",
    "Compose": "scales beside a product have no kernel",  # its random member has a Diagonal
    "Diagonal": "scales beside a product have no kernel",
    "Guided": "scales beside a product have no kernel",  # of training alone, known where its module was imported
    "HouseholderProduct": "sums have no kernel",
    "Permutation": "there is no product in it",
    "Sum": "sums have no kernel",
}


def random(name: str) -> AbstractMatrix:
    kind = AbstractOperator.kinds[name]
    assert issubclass(kind, AbstractMatrix)
    return kind.random(torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MATRICES)
def test_every_matrix_has_a_plan_or_a_reason(name: str) -> None:
    operator = random(name)
    if name in REFUSED:
        with pytest.raises(NotCovered, match=REFUSED[name]):
            plan(operator)
        return
    x = torch.randn(2, 5, operator.shape[1], generator=torch.Generator().manual_seed(1))  # none of which is halfway between steps
    oracle = RoundingOps(blockwise=True, by_row=True) if isinstance(operator, Quantised) else EagerOps()
    close(naive.run(plan(operator), x), operator.product(oracle, x))


@pytest.mark.parametrize("seed", range(300))
def test_random_spellings(seed: int) -> None:
    operator = spelled(seed)
    x = torch.randn(3, operator.shape[1])
    bias = torch.randn(operator.shape[0]) if seed % 2 else None
    made = operator.product(EagerOps(), x)
    close(naive.run(plan(operator, Ending(bias, "silu")), x), torch.nn.functional.silu(made if bias is None else made + bias))


def kinds(operator: AbstractMatrix) -> list[type]:
    return [type(step) for step in plan(operator, Ending(torch.zeros(operator.shape[0]), "relu")).steps]


def test_shuffles_and_padding_cost_no_step_and_leave_runs() -> None:
    """The first product's columns stand in the second's order: block λ reads its rank's columns of each block side by side."""
    operator = Monarch(torch.randn(3, 4, 6), torch.randn(2, 9, 5), 11, 9)
    assert kinds(operator) == [Product, Product]
    first, second = plan(operator).steps
    assert isinstance(first, Product) and isinstance(second, Product)
    assert (first.valid, first.target, second.target, second.width) == (11, SCRATCH, Y, 9)
    assert (second.first, second.block, second.run, second.jump, second.step) == (0, 3, 3, 6, 1)


def test_a_strided_input_costs_no_step_and_a_strided_output_one() -> None:
    assert kinds(Monarch(torch.randn(3, 4, 6), torch.randn(2, 9, 5), 12, 10, stride_in=True)) == [Product, Product]
    assert kinds(Monarch(torch.randn(3, 4, 6), torch.randn(2, 9, 5), 12, 10, stride_out=True)) == [Product, Product, Copy, Finish]


def test_pivots_lie_in_the_output() -> None:
    """The first product is a piece of y and the second's input; so nothing may be done to y before both are."""
    operator = PivotedLowRank(torch.randn(7, 2), torch.randn(2, 3), 3)
    assert kinds(operator) == [Product, Product, Finish]
    assert plan(operator).scratch == 0


def test_bias_and_activation_go_with_the_last_product() -> None:
    bias = torch.randn(5)
    first, last = plan(LowRank(torch.randn(7, 2), torch.randn(2, 5)), Ending(bias, "gelu")).steps
    assert isinstance(first, Product) and isinstance(last, Product)
    assert first.ending is NOTHING
    assert last.ending.bias is not None and last.ending.bias.equal(bias) and last.ending.activation == "gelu"


def test_copies_are_runs() -> None:
    pairs = torch.tensor([[4, 0], [5, 1], [6, 2], [-1, 3], [-1, 4], [0, 5], [2, 6], [3, 7], [3, 9]], dtype=torch.int32)
    assert runs_of(pairs).tolist() == [[4, 0, 3], [-1, 3, 2], [0, 5, 1], [2, 6, 2], [3, 9, 1]]


def test_sparse_integers_meet_inputs_as_they_are() -> None:
    """Their sums are of floats: what torch gives, not what rounded inputs would."""
    made = quantised(Sparse.of(torch.randn(24, 10), 2, 4))
    assert made is not None
    x = torch.randn(3, 24)
    (step,) = plan(made).steps
    assert isinstance(step, Product) and step.pattern is not None and step.weight.dtype == torch.int8
    close(naive.run(plan(made), x), made.product(EagerOps(), x))


@pytest.mark.parametrize("features", [32, 48, 192])
def test_4_bits_are_multiplied_by_rounded_inputs(features: int) -> None:
    made = quantised(LowRank(torch.randn(features, 64), torch.randn(64, 10)), 4)
    assert made is not None
    x = torch.randn(3, features)
    assert {(s.bits, s.weight.dtype) for s in plan(made).steps if isinstance(s, Product)} == {(4, torch.int8)}
    close(naive.run(plan(made), x), made.product(RoundingOps(blockwise=True, by_row=True), x))


@pytest.mark.parametrize(
    ("values", "scales", "reason"),
    [
        (torch.zeros(4, 3, dtype=torch.uint8), torch.ones(2, 3), "8 rows in 2 groups are not 8 or a multiple in each"),
        (torch.zeros(4, 3, dtype=torch.int8), torch.ones(2, 3), "scales for some of a column's rows are known with 4 bits alone"),
    ],
)
def test_integers_that_kernels_do_not_take(values: torch.Tensor, scales: torch.Tensor, reason: str) -> None:
    ops = PlanOps(8)
    with pytest.raises(NotCovered, match=reason):
        ops.scaled(ops.nibbles(values) if values.dtype == torch.uint8 else values, scales)


@pytest.mark.parametrize(
    ("positions", "group", "reason"),
    [
        ([[1], [1]], 4, "its positions are not 2 different ones of every 4 in order"),
        ([[2], [1]], 4, "its positions are not 2 different ones of every 4 in order"),
        ([[1], [3]], 3, "its positions are not 2 different ones of every 3 in order"),
        ([[1], [3]], 17, "kernels pick from groups of up to 16, not 17"),
    ],
)
def test_positions_that_kernels_do_not_pick(positions: list[list[int]], group: int, reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        plan(Sparse(torch.randn(2, 5), packing.pack(torch.tensor(positions), group), 2, group, group))


def test_a_sparse_product_reads_whole_groups_side_by_side() -> None:
    """What is not whole or not side by side is copied first; where all is, there is no copy."""
    sparse = Sparse.of(torch.randn(24, 10), 2, 4)
    assert kinds(sparse) == [Product]
    assert kinds(Sparse.of(torch.randn(23, 10), 2, 4)) == [Copy, Product]
    assert kinds(Monarch(torch.randn(3, 4, 6), torch.randn(2, 9, 5), 12, 10, stride_in=True)) == [Product, Product]  # these do not mind


def test_sums_that_may_overflow_are_refused() -> None:
    long = Dense(torch.zeros(65_537, 1).index_fill(0, torch.tensor([3]), 1.0))
    made = quantised(long)
    assert made is not None and plan(long).inputs == 65_537
    with pytest.raises(NotCovered, match="sums over 65,537 products of 8 bits may not fit in 32"):
        plan(made)
