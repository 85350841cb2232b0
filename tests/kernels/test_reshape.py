"""A Reshape between a matrix and what follows it: exporters put one around every matrix of two axes. It goes into the kernel's node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.algebra import Dense
from rewriter.backends.kernels import session
from rewriter.backends.kernels.covering import DOMAIN, chain_node
from rewriter.backends.kernels.library import kernels
from rewriter.backends.kernels.pack import pack
from rewriter.backends.kernels.plan import Ending, plan
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.tensors import from_torch
from rewriter.errors import RewriteError
from rewriter.opened import open_model
from rewriter.options import Options
from rewriter.tolerances import EQUAL

N, M = 6, 4


class Flat(nn.Module):
    """Matrices on (rows, features), what follows on (batch, time, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 96), nn.Linear(96, 32), nn.Linear(32, 48)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.a(x.reshape(-1, 32))
        h = nn.functional.gelu(flat.reshape(*x.shape[:2], 96))
        h = self.norm(self.b(h.reshape(-1, 96)).reshape(*x.shape[:2], 32) + x)
        return self.c(h.reshape(-1, 32)).reshape(*x.shape[:2], 6, 8)  # features are taken apart: no business of the kernel


def test_what_follows_a_reshape_is_fused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "flat.onnx"
    options = {"inputs": ["x:float32[batch,time,32]"], "target": "onnxruntime", "timing": False, "objective": "params", "force": True}
    rewriter.rewrite(Flat(), "low-rank:rank=4", out=str(path), **options)  # type: ignore[arg-type]
    fused = {c.site: c.fused for c in session.coverage(path)}
    assert fused == {"a": ("bias", "gelu"), "b": ("bias", "sum", "norm"), "c": ("bias",)}
    stock, model = ort.InferenceSession(str(path)), rewriter.inference_session(path)  # type: ignore[attr-defined]
    for shape in ((1, 1, 32), (3, 7, 32), (2, 0, 32), (5, 40, 32)):
        x = {"x": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
        np.testing.assert_allclose(model.run(None, x)[0], stock.run(None, x)[0], *EQUAL[torch.float32])


def test_all_of_a_decoder_with_a_cache_is_covered(tmp_path: Path) -> None:
    """As torch.onnx exports it: matrices of two axes, sizes left open, keys turned by way of three axes."""
    import transformers

    from rewriter.backends.files.onnx_file import save_onnx

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    save_onnx(open_model(str(tmp_path / "gpt2"), Options()).graph.to_onnx(20), tmp_path / "dense.onnx")
    options = {"dims": "batch=1,past=5,seq=1", "timing": False, "objective": "params", "force": True, "samples": 2}
    path = tmp_path / "new.onnx"
    rewriter.rewrite(str(tmp_path / "dense.onnx"), "fuse-attention,quantize", out=str(path), **options)  # type: ignore[arg-type]
    covered = session.coverage(path)
    assert {c.reason for c in covered} == {""} and [c.kind for c in covered].count("Attention") == 2
    fused = {c.site: c.fused for c in covered}
    assert fused["transformer.h.0.mlp.c_fc"] == ("gelu-tanh",) and fused["transformer.h.0.mlp.c_proj"] == ("sum",)
    assert [node.op_type for node in ir.load(path).graph].count("Transpose") == 8  # of q, k, v and the result: none of the cache


def chain(x: Tensor, shape: list[int], allowzero: int = 0, beside: Tensor | None = None) -> Tensor:
    """A model of one Chain whose output's shape is an input."""
    packed = pack(plan(Dense(WEIGHT), Ending(skip=beside is not None)), kernels().layout)
    inputs = [ir.val("x", ir.DataType.FLOAT, [None] * x.dim()), ir.val("shape", ir.DataType.INT64, [None])]
    if beside is not None:
        inputs.append(ir.val("beside", ir.DataType.FLOAT, [None] * beside.dim()))
    weights = ir.Value(name="packed", const_value=from_torch(packed, "packed"))
    reshape = ir.node("Reshape", [inputs[0], inputs[1]], {"allowzero": allowzero})
    node = chain_node([inputs[0], weights, *(inputs[2:] or [None])], packed, 1, reshape)
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, [y], nodes=[node], initializers=[weights], opset_imports={"": 20, DOMAIN: 1}, name="chain")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    feeds = {"x": x, "shape": torch.tensor(shape, dtype=torch.int64)} | ({} if beside is None else {"beside": beside})
    return Session(model, 1, library=str(kernels().path))(feeds)["y"]


WEIGHT = torch.randn(N, M, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("rows", "shape", "allowzero"),
    [
        ((12,), [3, 4, M], 0),
        ((12,), [-1, M], 0),
        ((3, 4), [-1, M], 0),
        ((12,), [3, -1, M], 0),
        ((12,), [0, 1, M], 0),
        ((3, 4), [0, 0, M], 0),
    ]
    + [((3, 4), [12, -1], 0), ((0,), [2, 0, M], 1), ((0,), [0, M], 0), ((12,), [-1, 2, 2, M], 1)],
)
def test_the_shape_is_what_a_reshape_gives(rows: tuple[int, ...], shape: list[int], allowzero: int) -> None:
    x = torch.randn(*rows, N)
    x_, y_ = ir.val("x", ir.DataType.FLOAT, [None] * x.dim()), ir.val("shape", ir.DataType.INT64, [None])
    node = ir.node("Reshape", [x_, y_], {"allowzero": allowzero})
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x_, y_], list(node.outputs), nodes=[node], opset_imports={"": 20}, name="reshape")
    stock = Session(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), 1)
    wanted = stock({"x": x @ WEIGHT, "shape": torch.tensor(shape)})["y"]
    torch.testing.assert_close(chain(x, shape, allowzero), wanted, rtol=EQUAL[torch.float32][0], atol=EQUAL[torch.float32][1])
    other = torch.randn(wanted.shape)
    torch.testing.assert_close(
        chain(x, shape, allowzero, other), wanted + other, rtol=EQUAL[torch.float32][0], atol=EQUAL[torch.float32][1]
    )


@pytest.mark.parametrize(
    ("shape", "why"),
    [([3, 5, M], "does not fit"), ([24, 2], "does not fit"), ([12, M, 1], "does not fit"), ([5, -1, M], "does not fit")]
    + [([-1, -1, M], "no output"), ([-2, 6, M], "no output"), ([], "1 to 16 axes"), ([1] * 16 + [M], "1 to 16 axes")]
    + [([1 << 32, 1 << 32, M], "no output"), ([0, 12, M], "does not fit"), ([0, -1, M], "does not fit")],
)
def test_shapes_that_do_not_fit_are_refused(shape: list[int], why: str) -> None:
    with pytest.raises(RewriteError, match=why):
        chain(torch.randn(12, N), shape, 1)


def test_what_is_added_has_the_shape_that_is_given() -> None:
    for other in (torch.randn(12, M), torch.randn(4, 3, M), torch.randn(1, M)):
        with pytest.raises(RewriteError, match="what a Chain adds has another shape than its output"):
            chain(torch.randn(12, N), [3, 4, M], 0, other)
