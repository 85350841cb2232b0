"""Quantised operators as ONNX bodies: what torch gives with the same rounding, at every rank, opset and lowering; one node each for ORT."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from rewriter.algebra import BlockDiagonal, Dense, Sparse
from rewriter.backends.eager import EagerOps
from rewriter.backends.onnx.emit import check
from rewriter.backends.onnx.nibbles import NBITS
from rewriter.backends.onnx.ops import LOWERINGS
from rewriter.backends.onnx.run import Session
from rewriter.operator import AbstractMatrix
from rewriter.passes.structures.low_rank import LowRank
from rewriter.passes.structures.monarch import Monarch
from rewriter.quantised import quantised
from rewriter.tolerances import EQUAL
from tests.onnx.models import close
from tests.onnx.rounding import RoundingOps
from tests.onnx.test_ops import LEADING, built

RNG = torch.Generator().manual_seed(5)
FORMS = {
    "dense": Dense(torch.randn(13, 9, generator=RNG)),
    "low-rank": LowRank(torch.randn(13, 4, generator=RNG), torch.randn(4, 9, generator=RNG)),
    "one block": BlockDiagonal(torch.randn(1, 13, 9, generator=RNG)),
    "monarch": Monarch(torch.randn(3, 3, 4, generator=RNG), torch.randn(2, 6, 3, generator=RNG), 7, 5),
    "sparse": Sparse.of(torch.randn(13, 9, generator=RNG), 2, 4),
}


FOUR = {
    "dense": Dense(torch.randn(64, 9, generator=RNG)),
    "groups of 16": Dense(torch.randn(48, 9, generator=RNG)),
    "low-rank": LowRank(torch.randn(32, 64, generator=RNG), torch.randn(64, 9, generator=RNG)),
    "a rank that no group divides": LowRank(torch.randn(32, 5, generator=RNG), torch.randn(5, 9, generator=RNG)),
    "monarch": Monarch(torch.randn(2, 32, 48, generator=RNG), torch.randn(3, 32, 5, generator=RNG), 64, 15),
}


@pytest.mark.parametrize("opset", [18, 25])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", FOUR)
def test_4_bits_in_standard_operators_are_the_weight_they_stand_for(name: str, lowering: str, rank: int, opset: int) -> None:
    operator = quantised(FOUR[name], 4)
    assert operator is not None and operator.bits == 4
    model = built(operator, rank, opset, lowering)
    check(model)
    session = Session(ir.to_proto(model).SerializeToString(), 1)
    x = torch.randn(*[2, 3][: rank - 1], operator.shape[1], generator=torch.Generator().manual_seed(rank))
    found, oracle = session({"x": x})["y0"], RoundingOps(blockwise=lowering == "split" and rank > 1)  # of what is in 8 bits
    close(found, operator.product(oracle, x[None] if rank == 1 else x).reshape(found.shape))


@pytest.mark.parametrize("name", FOUR)
def test_4_bits_as_onnx_runtime_multiplies_them(name: str) -> None:
    """MatMulNBits rounds inputs to 8 bits: its results are near, and no float weight is left in the optimised model."""
    operator = quantised(FOUR[name], 4)
    assert operator is not None
    proto = ir.to_proto(built(operator, 3, 20, NBITS))
    x = torch.randn(2, 3, operator.shape[1], generator=torch.Generator().manual_seed(4))
    found, wanted = Session(proto.SerializeToString(), 1)({"x": x})["y0"], operator.product(EagerOps(), x)
    assert 0 < (found - wanted).norm() <= EQUAL[torch.bfloat16][0] * wanted.norm()
    assert Session(proto.SerializeToString(), 1)({"x": x[:, :0]})["y0"].shape == (2, 0, operator.shape[0])


def test_one_node_for_each_product_in_4_bits(tmp_path: Path) -> None:
    options = ort.SessionOptions()  # type: ignore[attr-defined]
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    operator = quantised(FOUR["low-rank"], 4)
    assert operator is not None
    ort.InferenceSession(ir.to_proto(built(operator, 2, 20, NBITS)).SerializeToString(), options)  # type: ignore[attr-defined]
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    assert [node.op_type for node in graph.node] == ["MatMulNBits", "MatMulNBits"]
    assert all(i.data_type == onnx.TensorProto.UINT8 or len(i.dims) == 1 for i in graph.initializer)


def form(name: str) -> AbstractMatrix:
    made = quantised(FORMS[name])
    assert made is not None
    return made


@pytest.mark.parametrize("opset", [18, 20, 25])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", FORMS)
def test_bodies_equal_torch_with_the_same_rounding(name: str, lowering: str, rank: int, opset: int) -> None:
    operator = form(name)
    model = built(operator, rank, opset, lowering)
    check(model)
    session = Session(ir.to_proto(model).SerializeToString(), 1)
    for leading in [()] if rank == 1 else [s for s in LEADING[rank] if 0 not in s]:
        x = torch.randn(*leading, operator.shape[1], generator=torch.Generator().manual_seed(rank))
        oracle = RoundingOps(blockwise=lowering == "split" and rank > 1)
        close(session({"x": x})["y0"], operator.product(oracle, x[None] if rank == 1 else x).reshape(*leading, -1))


@pytest.mark.parametrize("name", FORMS)
def test_no_rows_give_no_rows(name: str) -> None:
    session = Session(ir.to_proto(built(form(name), 2, 20, LOWERINGS[0])).SerializeToString(), 1)
    operator = form(name)
    assert session({"x": torch.randn(0, operator.shape[1])})["y0"].shape == (0, operator.shape[0])


def test_onnxruntime_makes_one_node_of_each_product(tmp_path: Path) -> None:
    options = ort.SessionOptions()  # type: ignore[attr-defined]
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(ir.to_proto(built(form("low-rank"), 2, 20, LOWERINGS[0])).SerializeToString(), options)  # type: ignore[attr-defined]
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds == ["DynamicQuantizeMatMul", "DynamicQuantizeMatMul"]
