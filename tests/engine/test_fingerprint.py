"""A fingerprint is the same for the same model, and another as soon as anything that decides an output changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from rewriter.algebra import Dense
from rewriter.backends.files.load import open_source
from rewriter.graph import Graph
from rewriter.options import Options
from tests.engine.nets import Mlp, Net, decaying, graph, normal, sites


def gelu(how: str, bias: Tensor | None = None) -> Graph:
    fc = nn.Linear(24, 20)
    fc.weight, fc.bias = nn.Parameter(decaying(20, 24)), nn.Parameter(normal(20) if bias is None else bias)
    return graph(Net(lambda n, x: nn.functional.gelu(n.fc(x), approximate=how), fc=fc))


def by_cond(flip: bool) -> Graph:
    def both(net: Any, x: Tensor) -> Any:
        first, second = (torch.sin, torch.cos) if not flip else (torch.cos, torch.sin)
        return torch.cond(x.sum() > 0, lambda a: first(a), lambda a: second(a), (x,))

    return graph(Net(both))


@pytest.mark.parametrize(
    "make",
    [
        (lambda: gelu("none"), lambda: gelu("tanh")),
        (lambda: gelu("none"), lambda: gelu("none", 2 * normal(20))),
        (lambda: by_cond(False), lambda: by_cond(True)),
        (lambda: graph(Mlp()), lambda: graph(Mlp(bias=False))),
    ],
    ids=["option", "bias", "branches", "operands"],
)
def test_torch(make: tuple[Callable[[], Graph], Callable[[], Graph]]) -> None:
    first, second = make
    assert first().fingerprint() == first().fingerprint() != second().fingerprint()


def onnx_graph(axis: int = -1, bias: float = 1.0, text: str = "a", branch: str = "Sin") -> Graph:
    inner = [
        helper.make_graph(
            [helper.make_node(op, ["y"], [f"z_{op}"])], op, [], [helper.make_tensor_value_info(f"z_{op}", TensorProto.FLOAT, None)]
        )
        for op in (branch, "Neg")
    ]
    nodes = [
        helper.make_node("Softmax", ["x"], ["s"], axis=axis),
        helper.make_node("Add", ["s", "b"], ["y"]),
        helper.make_node("Equal", ["t", "t"], ["same"]),
        helper.make_node("Squeeze", ["same"], ["flag"]),
        helper.make_node("If", ["flag"], ["z"], then_branch=inner[0], else_branch=inner[1]),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(normal(4).numpy() * bias, "b"), helper.make_tensor("t", TensorProto.STRING, [1], [text.encode()])],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    import onnx_ir as ir

    found: Graph = open_source(ir.from_proto(model), Options()).graph
    return found


@pytest.mark.parametrize("change", [{"axis": 0}, {"bias": 2.0}, {"text": "b"}, {"branch": "Cos"}])
def test_onnx(change: dict[str, Any]) -> None:
    assert onnx_graph().fingerprint() == onnx_graph().fingerprint() != onnx_graph(**change).fingerprint()


def test_a_splice_changes_it_and_its_undoing_brings_it_back() -> None:
    g = graph(Mlp())
    before, site = g.fingerprint(), sites(g)[0]
    g.splice(site, Dense(normal(24, 32)))
    assert g.fingerprint() != before
    g.restore(site)
    assert g.fingerprint() == before
    assert g.clone().fingerprint() == before
