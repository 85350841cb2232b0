"""Every operator x lowering x rank x opset: the body equals the eager product, keeps leading dimensions dynamic, passes the checker."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from rewriter.backends.eager import EagerOps
from rewriter.backends.onnx.emit import attach, check
from rewriter.backends.onnx.measure import stacked
from rewriter.backends.onnx.ops import LOWERINGS
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.tensors import onnx_dtype
from rewriter.operator import AbstractMatrix, AbstractOperator
from rewriter.registry import load_structures
from tests.onnx.models import close

load_structures()
# what is quantised is rounded on the way, and compared with the same rounding in test_quantised.py
MATRICES = sorted(name for name, kind in AbstractOperator.kinds.items() if issubclass(kind, AbstractMatrix) and name != "Quantised")
LEADING = {2: [(1,), (5,), (0,)], 3: [(1, 4), (2, 3), (2, 0)], 4: [(2, 1, 3)]}


def random(name: str) -> AbstractMatrix:
    kind = AbstractOperator.kinds[name]
    assert issubclass(kind, AbstractMatrix)
    return kind.random(torch.Generator().manual_seed(3))


def built(operator: AbstractMatrix, rank: int, opset: int, lowering: str) -> ir.Model:
    model = stacked([operator], rank)
    model.graph.opset_imports[""] = opset
    attach(model, lambda spec, rank: lowering)
    return model


@pytest.mark.parametrize("opset", [18, 20, 23, 25])
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", MATRICES)
def test_bodies_equal_eager(name: str, lowering: str, rank: int, opset: int) -> None:
    operator = random(name)
    model = built(operator, rank, opset, lowering)
    check(model)
    (body,) = model.functions.values()
    assert not [n for n in body.all_nodes() if n.op_type == "Shape" or n.domain]
    session = Session(ir.to_proto(model).SerializeToString(), 1)
    for leading in LEADING[rank]:
        x = torch.randn(*leading, operator.shape[1])
        close(session({"x": x})["y0"], operator.product(EagerOps(), x))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", MATRICES)
def test_bodies_take_a_single_row(name: str, lowering: str) -> None:
    operator = random(name)
    session = Session(ir.to_proto(built(operator, 1, 20, lowering)).SerializeToString(), 1)
    x = torch.randn(operator.shape[1])
    close(session({"x": x})["y0"], operator.product(EagerOps(), x[None])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("name", MATRICES)
def test_bodies_are_the_same_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    operator = random(name).to(dtype)
    model = built(operator, 3, 20, LOWERINGS[0])
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.type = ir.TensorType(onnx_dtype(dtype))
    check(model)
    x = torch.randn(2, 3, operator.shape[1]).to(dtype)
    y = Session(ir.to_proto(model).SerializeToString(), 1)({"x": x})["y0"]
    close(y, operator.product(EagerOps(), x))


def test_wrong_hints_of_shapes_give_way_to_what_can_be_inferred() -> None:
    """Some exporters state shapes that are none; kernels and readers still find the true ones."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch", 8])
    inner = ir.node("Relu", [x])
    outer = ir.node("Neg", inner.outputs)
    (between,), (y,) = inner.outputs, outer.outputs
    between.name, between.type, between.shape = "between", x.type, ir.Shape(["batch", 99])
    y.name, y.type, y.shape = "y", x.type, x.shape
    model = ir.Model(ir.Graph([x], [y], nodes=[inner, outer], opset_imports={"": 20}, name="hints"), ir_version=10)
    check(model)
    assert [str(node.outputs[0].shape) for node in model.graph] == [str(x.shape)] * 2
