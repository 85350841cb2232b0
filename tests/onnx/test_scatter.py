"""N:M weights in ONNX: the file holds what is kept, ONNX Runtime makes it dense once as it loads, maps have the word too."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from rewriter.algebra import BlockDiagonal, Compose, Dense, Sparse
from rewriter.backend import EmitOptions
from rewriter.backends.eager import EagerOps
from rewriter.backends.fx.target import TorchTarget
from rewriter.backends.onnx.emit import attach
from rewriter.backends.onnx.measure import stacked
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.sequence_ops import SequenceOps, Sized
from rewriter.backends.onnx.target import OnnxTarget
from rewriter.backends.onnx.tensors import from_torch
from rewriter.operator import AbstractMatrix
from tests.fx.models import Net, graph, sites
from tests.onnx.models import close

TEXT = 8192  # bytes of nodes and names


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def armored(n: int, m: int, shared: int) -> Compose:
    core = Sparse.of(normal(128, 96), n, m, shared)
    return Compose((BlockDiagonal(normal(8, 16, 16)), core, BlockDiagonal(normal(6, 16, 16))))


def emitted(operator: AbstractMatrix) -> bytes:
    model = stacked([operator], 2)
    attach(model)
    return ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize(("n", "m", "shared"), [(2, 4, 1), (1, 4, 2), (4, 8, 1), (3, 32, 4), (2, 4, 8)])
def test_the_file_holds_what_is_counted(n: int, m: int, shared: int, tmp_path: Path) -> None:
    operator = armored(n, m, shared)
    path = tmp_path / "one.onnx"
    path.write_bytes(emitted(operator))
    assert sum(len(i.raw_data) for i in onnx.load(path).graph.initializer) == operator.cost().nbytes
    assert 0 < path.stat().st_size - operator.cost().nbytes < TEXT
    assert operator.cost().nbytes < Dense(normal(128, 96)).cost().nbytes
    x = normal(3, 128)
    close(Session(str(path), 1)({"x": x})["y0"], operator.product(EagerOps(), x))


def test_the_runtime_makes_it_dense_once(tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(emitted(Sparse.of(normal(64, 48), 2, 4)), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node] == ["MatMul"]


@pytest.mark.parametrize("shared", [1, 3])
def test_the_word_of_maps_is_the_same(shared: int) -> None:
    operator = Sparse.of(normal(10, 6), 2, 4, shared)
    held = [ir.Value(name=name, const_value=from_torch(t, name)) for name, t in (("v", operator.values), ("p", operator.positions))]
    for value in held:
        assert value.const_value is not None
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    ops = SequenceOps({id(t): v for t, v in zip((operator.values, operator.positions), held, strict=True)})
    x = ir.val("x", ir.DataType.FLOAT, ["batch", 10])
    y: Sized = operator.product(ops, Sized(x, (None, 10)))
    y.value.name, y.value.shape, y.value.type = "y", ir.Shape(["batch", 6]), x.type
    graph = ir.Graph([x], [y.value], nodes=ops.tape.nodes, initializers=held, opset_imports={"": 20}, name="one")
    given = normal(3, 10)
    session = Session(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), 1)
    close(session({"x": given})["y"], operator.product(EagerOps(), given))


def test_a_torch_model_takes_it_to_onnx_and_to_pt2(tmp_path: Path) -> None:
    """Through the exporter with its positions as uint8, and as plain aten in a file that the checks let in."""
    operator = Sparse.of(normal(16, 12), 2, 4)
    x = normal(5, 16)
    for target in (OnnxTarget(), TorchTarget()):
        g = graph(Net(lambda s, x: s.l(x), l=nn.Linear(16, 12, bias=False)), x)
        (site,) = sites(g)
        g.splice(site, operator)
        path = tmp_path / f"m{target.suffix}"
        target.emit(g, path, EmitOptions(20, False, (1,)))
        run = target.open(path, 1)
        (given,) = (spec.name for spec in g.specs())
        close(next(iter(run({given: x}).values())), operator.product(EagerOps(), x))
