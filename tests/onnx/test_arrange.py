"""The lazy layout against eager torch: any chain of shuffles, block products and diagonals, in every lowering and at every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.algebra import BlockDiagonal, Compose, Diagonal
from rewriter.backends.eager import EagerOps
from rewriter.backends.onnx.emit import attach, check
from rewriter.backends.onnx.measure import stacked
from rewriter.backends.onnx.ops import LOWERINGS
from rewriter.backends.onnx.run import Session
from rewriter.operator import AbstractMatrix, AbstractOperator
from tests.onnx.models import close

WIDTH = 24
_known = dict(AbstractOperator.kinds)


@dataclass(frozen=True)
class ShuffleForTests(AbstractMatrix):
    """The stride permutation as an operator of its own."""

    scale: torch.Tensor  # (1,), so that there is something to store
    k: int

    @property
    def shape(self) -> tuple[int, int]:
        return WIDTH, WIDTH

    def product(self, ops: Any, x: Any) -> Any:
        return ops.shuffle(x, self.k)

    @classmethod
    def random(cls, rng: torch.Generator) -> ShuffleForTests:
        return cls(torch.ones(1), 4)


AbstractOperator.kinds.clear()  # known while a chain is built, to nobody else's product over the registry
AbstractOperator.kinds.update(_known)
DIVISORS = [k for k in range(1, WIDTH + 1) if WIDTH % k == 0]
STEPS = st.tuples(st.sampled_from(["shuffle", "blocks", "diagonal"]), st.sampled_from(DIVISORS))


def factor(kind: str, k: int) -> AbstractMatrix:
    if kind == "shuffle":
        return ShuffleForTests(torch.ones(1), k)
    if kind == "diagonal":
        return Diagonal(torch.randn(WIDTH))
    return BlockDiagonal(torch.randn(k, WIDTH // k, WIDTH // k) / (WIDTH // k) ** 0.5)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=6), st.integers(1, 4), st.sampled_from(LOWERINGS))
def test_chains_equal_eager(steps: list[tuple[str, int]], rank: int, lowering: str) -> None:
    operator = Compose(tuple(factor(kind, k) for kind, k in steps))
    AbstractOperator.kinds["ShuffleForTests"] = ShuffleForTests
    try:
        model = stacked([operator], rank)
        attach(model, lambda spec, rank: lowering)
    finally:
        del AbstractOperator.kinds["ShuffleForTests"]
    check(model)
    (body,) = model.functions.values()
    assert not [n for n in body.all_nodes() if n.op_type == "Shape"]
    session = Session(ir.to_proto(model).SerializeToString(), 1)
    for leading in ((5, 2, 3)[: rank - 1], (1, 4, 1)[: rank - 1]):
        x = torch.randn(*leading, WIDTH)
        rows = x if rank > 1 else x[None]
        close(session({"x": x})["y0"], operator.product(EagerOps(), rows).reshape(x.shape))
