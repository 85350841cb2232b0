"""What is written: complete, checked, atomic, as dynamic as before; what is read back, timed, quantised."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from rewriter.algebra import BlockDiagonal, Compose, Dense
from rewriter.backend import EmitOptions
from rewriter.backends.eager import EagerOps
from rewriter.backends.files.export import export_module
from rewriter.backends.files.onnx_file import load_onnx, save_onnx
from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.onnx import lowering, measure
from rewriter.backends.onnx.emit import finish
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.backends.onnx.int8 import quantise
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.target import OnnxRuntimeTarget, OnnxTarget
from rewriter.errors import RewriteError
from rewriter.graph import Place, Site, WeightRef
from rewriter.inputs import parse_input
from rewriter.operator import AbstractMatrix, flatten
from tests.onnx.models import MLP, MLP_WEIGHTS, close, model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No timing is taken from, or left in, the user's cache; and none takes long."""
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "SECONDS", 0.001)
    monkeypatch.setattr(measure, "COLD_BYTES", 1 << 12)
    monkeypatch.setattr(lowering, "_chosen", {})


def structured(opset: int = 18) -> tuple[OnnxGraph, AbstractMatrix]:
    """The MLP with its first product replaced by a block-diagonal one of other numbers."""
    g = OnnxGraph(model(MLP, opset, MLP_WEIGHTS))
    node, add = (next(n for n in g.nodes() if g.op(n) == op) for op in ("matmul", "add"))
    w, bias = node.inputs[1], add.inputs[1]
    assert w is not None
    place = Place((node, add), node.inputs[0], add.outputs[0], bias=bias)
    site = Site("w1", "w1", "linear", (8, 6), torch.float32, (place,), {"weight": WeightRef("w1", w, (1, 0))})
    operator = Compose((BlockDiagonal(torch.randn(2, 3, 4)), BlockDiagonal(torch.randn(4, 2, 2))))
    g.splice(site, operator)
    return g, operator


def expected(operator: AbstractMatrix, x: torch.Tensor) -> torch.Tensor:
    w = {name: torch.from_numpy(v.const_value.numpy()) for name, v in model(MLP, 18, MLP_WEIGHTS).graph.initializers.items()}
    return torch.relu(operator.product(EagerOps(), x) + w["b1"]) @ w["w2"] + w["b2"]


@pytest.mark.parametrize("opset", [18, 20, 23, 25])
@pytest.mark.parametrize("flatten_functions", [False, True])
def test_what_is_emitted_runs_anywhere(tmp_path: Path, opset: int, flatten_functions: bool) -> None:
    g, operator = structured()
    target, path = OnnxTarget(), tmp_path / "m.onnx"
    target.emit(g, path, EmitOptions(opset, flatten_functions, (1, 16), provenance={"seed": "0", "passes": "monarch"}))
    proto = onnx.load(str(path))
    onnx.checker.check_model(proto, full_check=True)
    assert {o.domain: o.version for o in proto.opset_import}[""] == opset
    assert bool(proto.functions) != flatten_functions
    assert {p.key: p.value for p in proto.metadata_props} == {"rewriter.seed": "0", "rewriter.passes": "monarch"}
    nodes = [*proto.graph.node, *(n for f in proto.functions for n in f.node)]
    assert not [n for n in nodes if n.op_type == "Shape"]
    assert {n.domain for n in nodes} <= {"", "structured"}
    run = target.open(path, 1)
    for leading in ((1, 1), (2, 5)):
        x = torch.randn(*leading, 6)
        close(run({"x": x})["y"], expected(operator, x))


def test_an_emitted_file_is_read_back_with_its_operators(tmp_path: Path) -> None:
    g, operator = structured()
    OnnxRuntimeTarget().emit(g, tmp_path / "m.onnx", EmitOptions())
    again = OnnxGraph(load_onnx(tmp_path / "m.onnx"))
    (node,) = [n for n in again.nodes() if again.op(n) == "structured"]
    held = again.operator(node)
    assert held is not None
    assert flatten(held)[1] == flatten(operator)[1]
    x = torch.randn(1, 2, 6)
    close(again.run({"x": x})["y"], expected(operator, x))
    OnnxTarget().emit(again, tmp_path / "again.onnx", EmitOptions())
    close(OnnxTarget().open(tmp_path / "again.onnx", 1)({"x": x})["y"], expected(operator, x))


def test_equal_sites_share_one_function() -> None:
    g = OnnxGraph(model(MLP, 18, {**MLP_WEIGHTS, "w2": (8, 5)}))
    for node in [n for n in g.nodes() if g.op(n) == "matmul"]:
        w = node.inputs[1]
        assert w is not None
        n, m = g.const(w).shape
        place = Place((node,), node.inputs[0], node.outputs[0])
        site = Site(w.name, w.name, "linear", (m, n), torch.float32, (place,), {"weight": WeightRef(w.name, w, (1, 0))})
        g.splice(site, Compose((Dense(torch.randn(n, 2)), Dense(torch.randn(2, m)))))
    copy = g.clone()
    copy.prune()
    assert len(finish(copy.model, 18).functions) == 2


def test_a_failed_emission_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g, _ = structured()
    path = tmp_path / "out" / "m.onnx"
    path.parent.mkdir()
    path.write_bytes(b"old")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(ir, "save", refuse)
    with pytest.raises(RewriteError, match="disk full"):
        OnnxTarget().emit(g, path, EmitOptions())
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["m.onnx"]


def test_weights_beside_the_model(tmp_path: Path) -> None:
    g, operator = structured()
    copy = g.clone()
    copy.prune()
    path = tmp_path / "m.onnx"
    save_onnx(finish(copy.model, 20), path, external_above=0)
    x = torch.randn(1, 2, 6)
    close(OnnxTarget().open(path, 1)({"x": x})["y"], expected(operator, x))
    close(OnnxGraph(load_onnx(path)).run({"x": x})["y"], expected(operator, x))


def test_models_too_large_for_memory_run_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.backends.onnx.run.MAX_PROTO", 0)
    g, operator = structured()
    x = torch.randn(1, 2, 6)
    close(g.run({"x": x})["y"], expected(operator, x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def test_torch_graphs_are_emitted_with_their_sites(tmp_path: Path) -> None:
    net = Net().eval()
    g = FxGraph.of(export_module(net, [parse_input("x:float32[batch,seq,12]")], {}))
    node = next(n for n in g.nodes() if g.op(n) == "linear")
    x, w, b = g.inputs(node)
    site = Site(
        "first", "first", "linear", (16, 12), torch.float32, (Place((node,), x, node, bias=b),), {"weight": WeightRef("first.weight", w)}
    )
    operator = BlockDiagonal(torch.randn(4, 3, 4))
    g.splice(site, operator)
    path = tmp_path / "m.onnx"
    OnnxRuntimeTarget().emit(g, path, EmitOptions(20))
    proto = onnx.load(str(path))
    assert [f.name for f in proto.functions] == ["BlockDiagonal"]
    assert str(tmp_path.cwd()) not in str(proto)
    assert not [p for n in proto.graph.node for p in n.metadata_props if p.key.endswith(("stack_trace", "fx_node"))]
    given = torch.randn(2, 5, 12)
    (y,) = OnnxRuntimeTarget().open(path, 1)({g.specs()[0].name: given}).values()
    close(y, net.second(torch.relu(operator.product(EagerOps(), given) + net.first.bias)).detach())


def test_int8_form_runs_and_is_close(tmp_path: Path) -> None:
    g = OnnxGraph(model(MLP, 18, MLP_WEIGHTS))
    path = tmp_path / "m.onnx"
    OnnxTarget().emit(g, path, EmitOptions())
    x = torch.randn(2, 8, 6)
    dense, int8 = OnnxTarget().open(path, 1)({"x": x})["y"], OnnxTarget().open_int8(path, 1)({"x": x})["y"]
    assert not torch.equal(dense, int8)
    assert (int8 - dense).norm() < dense.norm() - int8.sub(dense).norm()


def test_refusals_are_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\x08\x0a")
    for call in (OnnxTarget().open, OnnxTarget().open_int8):
        with pytest.raises(RewriteError) as caught:
            call(bad, 1)
        assert "\n" not in str(caught.value)
    with pytest.raises(RewriteError, match="no value is given for input 'x'"):
        OnnxGraph(model(MLP, 18, MLP_WEIGHTS)).run({})


def test_timings_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = [Dense(torch.randn(8, 8)), BlockDiagonal(torch.randn(2, 4, 4))]
    seconds = OnnxTarget().measure(forms, 4, 1)
    assert len(seconds) == 2
    assert all(s > 0 for s in seconds)
    monkeypatch.setattr(measure, "interleave", lambda *_, **__: pytest.fail("measured twice"))
    assert OnnxTarget().measure([Dense(torch.randn(8, 8)), BlockDiagonal(torch.randn(2, 4, 4))], 4, 1) == seconds
    for file in (tmp_path / "cache" / "timings").iterdir():
        file.write_text("{broken")
    monkeypatch.undo()
    assert len(OnnxTarget().measure(forms, 4, 1)) == 2


def test_timings_of_other_code_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = [Dense(torch.randn(8, 8)), BlockDiagonal(torch.randn(2, 4, 4))]
    calls: list[int] = []
    monkeypatch.setattr(measure, "time_bodies", lambda bodies, *_, **__: [calls.append(1) or 1.0 for _ in bodies])
    OnnxTarget().measure(forms, 4, 1)
    before = len(calls)
    OnnxTarget().measure(forms, 4, 1)
    assert len(calls) == before
    monkeypatch.setattr("rewriter.cache.sources", lambda: "a form was written anew")
    OnnxTarget().measure(forms, 4, 1)
    assert len(calls) > before


def test_the_fastest_lowering_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = flatten(BlockDiagonal(torch.randn(2, 4, 4)))[1]
    figures = {1: [1.0, 2.0, 9.0], 256: [5.0, 3.0, 9.0]}
    monkeypatch.setattr(lowering, "measure_lowerings", lambda spec, rank, names, tokens, *rest: figures[tokens])
    choose = lowering.chooser
    assert [choose(t, 1)(spec, 3) for t in ((1,), (256,), (1, 256))] == ["split", "batched", "batched"]
    assert lowering.matrix_lowerings(flatten(Dense(torch.randn(2, 2)))[1], 3) == ("split",)


def test_timing_entries_are_plain_numbers(tmp_path: Path) -> None:
    OnnxTarget().measure([BlockDiagonal(torch.randn(2, 4, 4))], 2, 1)
    entries = [json.loads(f.read_text()) for f in (tmp_path / "cache" / "timings").iterdir()]
    assert entries
    assert all(isinstance(s, float) for entry in entries for s in entry)


BF16 = "g (bfloat16[B,6] x) => (bfloat16[B,5] y) { t = Transpose<perm=[1,0]>(w)  c = Cast<to=16>(s)  m = MatMul(x, t)  y = Mul(m, c) }"


def bfloat16_graph() -> OnnxGraph:
    m = model(BF16, 18, {"w": (5, 6), "s": (1,)})
    w = m.graph.initializers["w"]
    w.const_value = ir.Tensor(w.const_value.numpy().astype(ir.DataType.BFLOAT16.numpy()), name="w")
    w.dtype = ir.DataType.BFLOAT16
    return OnnxGraph(m)


def test_bfloat16_runs_as_float32_and_stays_where_files_are_portable(tmp_path: Path) -> None:
    g = bfloat16_graph()
    node = next(n for n in g.nodes() if g.op(n) == "matmul")
    w = node.inputs[1]
    weight = g.const(w)
    assert weight is not None
    assert weight.dtype == torch.bfloat16
    x = torch.randn(3, 6).bfloat16()
    scale = g.const(g.model.graph.initializers["s"])
    y = (x.float() @ weight.float()) * scale
    close(g.run({"x": x})["y"], y)
    place = Place((node,), node.inputs[0], node.outputs[0])
    g.splice(Site("w", "w", "linear", (5, 6), torch.bfloat16, (place,), {"weight": WeightRef("w", w, (1, 0))}), Dense(weight.contiguous()))
    close(g.run({"x": x})["y"], y)
    for target, kept in ((OnnxTarget(), True), (OnnxRuntimeTarget(), False)):
        path = tmp_path / f"{target.name}.onnx"
        target.emit(g, path, EmitOptions())
        stored = onnx.load(str(path)).graph.initializer
        assert (onnx.TensorProto.BFLOAT16 in [t.data_type for t in stored]) == kept
        close(target.open(path, 1)({"x": x})["y"], y)
        target.open_int8(path, 1)({"x": x})


def test_batched_weights_do_not_break_the_int8_form(tmp_path: Path) -> None:
    text = "g (float[B,2,4,6] x) => (float[B,2,4,5] y) { a = MatMul(x, w)  y = MatMul(a, v) }"
    path = tmp_path / "m.onnx"
    OnnxTarget().emit(OnnxGraph(model(text, 18, {"w": (2, 6, 8), "v": (8, 5)})), path, EmitOptions())
    x = {"x": torch.randn(3, 2, 4, 6)}
    dense, int8 = OnnxTarget().open(path, 1)(x)["y"], OnnxTarget().open_int8(path, 1)(x)["y"]
    assert not torch.equal(dense, int8)
    assert (int8 - dense).norm() < dense.norm() - int8.sub(dense).norm()


def test_a_tied_output_layer_is_multiplied_in_int8(tmp_path: Path) -> None:
    """Its weight is the transpose of a table that something else reads as it is stored."""
    text = "g (int64[B] ids) => (float[B,50] y) { x = Gather(table, ids)  w = Transpose <perm = [1, 0]> (table)  y = MatMul(x, w) }"
    path = tmp_path / "m.onnx"
    OnnxTarget().emit(OnnxGraph(model(text, 18, {"table": (50, 6)})), path, EmitOptions())
    x = {"ids": torch.tensor([3, 7, 49])}
    dense, int8 = OnnxTarget().open(path, 1)(x)["y"], OnnxTarget().open_int8(path, 1)(x)["y"]
    assert "MatMulInteger" in [node.op_type for node in onnx.load(str(quantise(path, tmp_path / "int8.onnx"))).graph.node]
    assert not torch.equal(dense, int8)
    assert (int8 - dense).norm() < dense.norm() - int8.sub(dense).norm()


def test_wrong_shapes_in_the_source_do_not_stop_emission(tmp_path: Path) -> None:
    g, operator = structured()
    (relu,) = [n for n in g.nodes() if g.op(n) == "relu"]
    relu.outputs[0].shape = ir.Shape(["B", "S", 99])
    OnnxTarget().emit(g, tmp_path / "m.onnx", EmitOptions())
    x = torch.randn(1, 2, 6)
    close(OnnxTarget().open(tmp_path / "m.onnx", 1)({"x": x})["y"], expected(operator, x))


def test_half_precision_has_an_int8_form(tmp_path: Path) -> None:
    m = model("g (float16[B,6] x) => (float16[B,5] y) { y = MatMul(x, w) }", 18)
    stored = ir.Tensor(torch.randn(6, 5).half().numpy(), name="w")
    for node in m.graph:
        value = ir.Value(name="w", const_value=stored, shape=stored.shape, type=ir.TensorType(stored.dtype))
        node.replace_input_with(1, value)
        m.graph.register_initializer(value)
    OnnxTarget().emit(OnnxGraph(m), tmp_path / "m.onnx", EmitOptions())
    x = {"x": torch.randn(3, 6).half()}
    dense, int8 = OnnxTarget().open(tmp_path / "m.onnx", 1)(x)["y"], OnnxTarget().open_int8(tmp_path / "m.onnx", 1)(x)["y"]
    assert (dense.dtype, int8.dtype) == (torch.float16, torch.float32)
    assert (int8 - dense).norm() < dense.norm() - int8.sub(dense).norm()


def test_the_portable_target_refuses_contrib_operators(tmp_path: Path) -> None:
    g = OnnxGraph(model("g (float[B,6] x) => (float[B,6] y) { y = com.microsoft.FastGelu(x) }", 18))
    with pytest.raises(RewriteError, match="FastGelu"):
        OnnxTarget().emit(g, tmp_path / "m.onnx", EmitOptions())
    OnnxRuntimeTarget().emit(g, tmp_path / "m.onnx", EmitOptions())
    assert OnnxRuntimeTarget().open(tmp_path / "m.onnx", 1)({"x": torch.randn(2, 6)})["y"].shape == (2, 6)


def test_a_model_of_a_higher_opset_keeps_it(tmp_path: Path) -> None:
    g, operator = structured(23)
    OnnxTarget().emit(g, tmp_path / "m.onnx", EmitOptions(20))
    assert {o.domain: o.version for o in onnx.load(str(tmp_path / "m.onnx")).opset_import}[""] == 23
    x = torch.randn(1, 2, 6)
    close(OnnxTarget().open(tmp_path / "m.onnx", 1)({"x": x})["y"], expected(operator, x))


def test_threads_sleep_between_runs() -> None:
    """Sessions take turns when they are compared: one that spins after its run takes the next one's cores."""
    session = Session(ir.to_proto(model(MLP, 18, MLP_WEIGHTS)).SerializeToString(), 2)
    assert session.session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"
