"""Balanced factors: the same product, both Gram matrices equal and diagonal; every matrix keeps what it is through training's form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewriter import registry
from rewriter.operator import AbstractMatrix, AbstractOperator
from rewriter.passes.solvers.gauge import balanced
from rewriter.tolerances import EQUAL

registry.structures()  # they are known once they are imported
MATRICES = sorted(name for name, kind in AbstractOperator.kinds.items() if issubclass(kind, AbstractMatrix))


@given(q=st.integers(1, 9), s=st.integers(1, 9), r=st.integers(1, 9), seed=st.integers(0, 99), spread=st.floats(0, 4))
def test_balanced_factors(q: int, s: int, r: int, seed: int, spread: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    gauge = torch.logspace(-spread / 2, spread / 2, r, dtype=torch.float64)
    down = torch.randn(2, q, r, generator=rng, dtype=torch.float64) * gauge
    up = torch.randn(2, r, s, generator=rng, dtype=torch.float64) / gauge[:, None]
    a, b = balanced(down, up)
    assert a.shape == down.shape and b.shape == up.shape
    rtol, atol = EQUAL[torch.float64]
    torch.testing.assert_close(a @ b, down @ up, rtol=rtol, atol=atol)
    if r <= min(q, s):
        gram = a.mT @ a
        scale = float(gram.abs().max())
        torch.testing.assert_close(gram / scale, b @ b.mT / scale, rtol=rtol, atol=atol)
        torch.testing.assert_close(gram / scale, torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)) / scale, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", MATRICES)
def test_every_matrix_survives_training_form(name: str) -> None:
    """Balanced and back: the same matrix, in the same form, at the same cost."""
    kind = AbstractOperator.kinds[name]
    matrix = kind.random(torch.Generator().manual_seed(1)).to(torch.float64)
    assert isinstance(matrix, AbstractMatrix)
    trains = matrix.balanced()
    back = matrix.unbalanced(trains)
    rtol, atol = EQUAL[torch.float64]
    torch.testing.assert_close(trains.dense(), matrix.dense(), rtol=rtol, atol=atol)
    torch.testing.assert_close(back.dense(), matrix.dense(), rtol=rtol, atol=atol)
    assert type(back) is type(matrix) and back.cost() == matrix.cost()
