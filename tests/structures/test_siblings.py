"""Linears that read one value, as one map: what each of them gives by itself, in every interpretation."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.algebra import Dense
from rewriter.backends.eager import EagerOps
from rewriter.backends.fx.custom_op import MAP
from rewriter.backends.onnx.emit import attach
from rewriter.backends.onnx.measure import stacked_maps
from rewriter.backends.onnx.run import Session
from rewriter.operator import flatten, unflatten
from rewriter.passes.structures.siblings import Siblings
from rewriter.tolerances import EQUAL
from tests.structures.inputs import generator

DENSE = Siblings(7, (Dense(torch.randn(7, 9, generator=generator(1))),), (4, 5), (), ())
FORMS = {
    "thin, biases": Siblings.random(generator(0)),
    "dense": DENSE,
    "apart": Siblings(7, (), (), tuple(Dense(torch.randn(7, m, generator=generator(m))) for m in (3, 2, 6)), ()),
}
forms = pytest.mark.parametrize("name", FORMS)
X = torch.randn(2, 5, 7, generator=generator(2))


def expected(form: Siblings, x: Tensor) -> list[Tensor]:
    """One torch linear after the other."""
    parts = [x] * len(form.outputs())
    if form.first:
        parts = list(F.linear(x, form.first[0].dense()).split([int(width) for width in form.widths], -1))
    found = [F.linear(part, matrix.dense()) for part, matrix in zip(parts, form.each, strict=True)] if form.each else parts
    return [y + bias for y, bias in zip(found, form.biases, strict=True)] if form.biases else found


def check(form: Siblings, found: list[Tensor]) -> None:
    wanted = expected(form, X)
    assert [y.shape[-1] for y in found] == [dims[-1] for dims in form.outputs().values()]
    for y, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(y, other, rtol=EQUAL[torch.float32][0], atol=EQUAL[torch.float32][1])


@forms
def test_eager_and_torch(name: str) -> None:
    leaves, spec = flatten(FORMS[name])
    again = unflatten(spec, leaves)
    assert isinstance(again, Siblings)
    check(again, list(again.apply(EagerOps(), X)))
    check(again, MAP([X], leaves, spec, "a"))


@forms
def test_onnx(name: str) -> None:
    model = stacked_maps([FORMS[name]])
    attach(model)
    found = Session(ir.to_proto(model).SerializeToString(), 1)({"x": X})
    check(FORMS[name], list(found.values()))


def test_cost_counts_each_product_once() -> None:
    form = FORMS["thin, biases"]
    assert form.cost().params == 7 * 5 + 2 * 4 + 3 * 6 + 4 + 6
    assert form.cost(3).flops == 3 * (2 * (7 * 5 + 2 * 4 + 3 * 6) + 4 + 6)
    assert DENSE.cost(3).flops == 3 * 2 * 7 * 9
