"""Two model files side by side: what went, what came, what changed, and nothing where a file is compared with itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from rewriter.diff import diff_files
from tests.cli.conftest import Said
from tests.cli.samples import full_report

Rewrite = Callable[..., Said]
RNG = np.random.default_rng(0)
W, U, V, B = (RNG.standard_normal(shape).astype(np.float32) for shape in ((8, 6), (8, 2), (2, 6), (6,)))


def save_onnx(path: Path, nodes: list[Any], weights: dict[str, Any], output: str = "y", provenance: str | None = None) -> None:
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, ["n", 8])], [value(output, TensorProto.FLOAT, ["n", 6])], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if provenance is not None:
        helper.set_model_props(model, {"rewriter.report": provenance})
    onnx.save(model, str(path))


def dense(path: Path, bias: Any = B, output: str = "y") -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["s"]),
        helper.make_node("Relu", ["s"], [output]),
    ]
    save_onnx(path, nodes, {"w": W, "b": bias}, output)


def thin(path: Path, provenance: str | None = None) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "u"], ["h"]),
        helper.make_node("MatMul", ["h", "v"], ["q"]),
        helper.make_node("Add", ["q", "b"], ["t"]),
        helper.make_node("Relu", ["t"], ["y"]),
    ]
    save_onnx(path, nodes, {"u": U, "v": V, "b": B}, provenance=provenance)


@pytest.fixture
def files(folder: Path) -> Path:
    dense(folder / "a.onnx")
    thin(folder / "b.onnx", full_report().to_json())
    return folder


def test_counts_nodes_and_parameters(files: Path) -> None:
    found = diff_files(files / "a.onnx", files / "b.onnx")
    assert {op: counts for op, counts in found.ops.items() if counts[0] != counts[1]} == {"matmul": (1, 2)}
    assert [(n.op, n.shape, n.stored) for n in found.removed] == [("matmul", ("*", 6), ("w",))]
    assert [(n.op, n.shape, n.stored) for n in found.added] == [("matmul", ("*", 2), ("u",)), ("matmul", ("*", 6), ("v",))]
    assert [(p.name, p.shape, p.nbytes) for p in found.parameters_removed] == [("w", (8, 6), 192)]
    assert [(p.name, p.shape, p.nbytes) for p in found.parameters_added] == [("u", (8, 2), 64), ("v", (2, 6), 48)]
    assert found.parameters_changed == ()
    assert found.nbytes == (192 + 24, 64 + 48 + 24)
    assert found.provenance["matched"] == {"sites": 18, "rewritten": 3}
    assert not found.same


def test_a_file_does_not_differ_from_itself(files: Path, rewrite: Rewrite) -> None:
    for name in ("a.onnx", "b.onnx"):
        assert diff_files(files / name, files / name).same
    assert "no difference" in rewrite("diff", "a.onnx", "a.onnx").out


def test_other_numbers_and_another_interface(folder: Path, rewrite: Rewrite) -> None:
    dense(folder / "a.onnx")
    dense(folder / "c.onnx", B + 1, "z")
    found = diff_files(folder / "a.onnx", folder / "c.onnx")
    assert [x.name for x, _ in found.parameters_changed] == ["b"]
    assert (found.removed, found.added) == ((), ())
    assert found.outputs == (("y",), ("z",))
    said = rewrite("diff", "a.onnx", "c.onnx").out
    assert "~ b float32[6] 24 B: other numbers" in said
    assert "outputs: y became z" in said


def test_text(files: Path, rewrite: Rewrite, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    said = rewrite("diff", "a.onnx", "b.onnx")
    assert (said.code, said.err) == (0, "")
    golden("diff.txt", said.out)


class Net(nn.Module):
    def __init__(self, rank: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 6) if rank is None else nn.Sequential(nn.Linear(8, rank, bias=False), nn.Linear(rank, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.inner(x))


def save_pt2(path: Path, rank: int | None, dim: str) -> None:
    program = torch.export.export(Net(rank), (torch.zeros(3, 8),), dynamic_shapes={"x": {0: torch.export.Dim(dim)}})
    torch.export.save(program, path)


def test_pt2(folder: Path, rewrite: Rewrite) -> None:
    save_pt2(folder / "a.pt2", None, "n")
    save_pt2(folder / "b.pt2", 2, "n")
    save_pt2(folder / "c.pt2", None, "rows")
    found = diff_files(folder / "a.pt2", folder / "b.pt2")
    assert found.ops["linear"] == (1, 2)
    assert {p.name for p in found.parameters_removed} == {"inner.weight", "inner.bias"}
    assert {n.scope for n in found.added} == {"inner.0", "inner.1"}
    assert found.provenance == {}
    assert "B carries no report" in rewrite("diff", "a.pt2", "b.pt2").out
    renamed = diff_files(folder / "a.pt2", folder / "c.pt2")
    assert (renamed.removed, renamed.added, renamed.parameters_changed) == ((), (), ())


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [("a.onnx", "a.pt2", "a.onnx is onnx and a.pt2 is pt2"), ("a.onnx", "s.pt", "s.pt is no .pt2 or .onnx file")],
)
def test_other_formats_are_refused(folder: Path, rewrite: Rewrite, a: str, b: str, words: str) -> None:
    dense(folder / "a.onnx")
    save_pt2(folder / "a.pt2", None, "n")
    torch.save({"w": torch.zeros(2)}, folder / "s.pt")
    said = rewrite("diff", a, b)
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert words in said.err
