"""ONNX files: nothing outside the folder is read, no size is believed, and a save is whole or did not happen."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from rewriter.backends.files import onnx_file
from rewriter.backends.files.onnx_file import load_onnx, save_onnx
from rewriter.errors import RewriteError

WEIGHT = np.arange(4096, dtype=np.float32).reshape(64, 64)


def model(weight: np.ndarray = WEIGHT) -> ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64]) for name in ("x", "y")]
    tensor = numpy_helper.from_array(weight, "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def external(folder: Path, **entries: object) -> Path:
    """A model whose weight lies in w.bin, with entries of the reference changed; None drops one."""
    (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    proto = model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "w.bin", "offset": 0, "length": WEIGHT.nbytes} | entries).items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def written(folder: Path, proto: ModelProto) -> Path:
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def refused(path: Path, match: str) -> None:
    with pytest.raises(RewriteError, match=match) as caught:
        load_onnx(path)
    assert "\n" not in str(caught.value)


def weight_of(loaded: ir.Model) -> np.ndarray:
    tensor = loaded.graph.initializers["w"].const_value
    assert tensor is not None
    return tensor.numpy()


def test_models_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.array_equal(weight_of(load_onnx(written(tmp_path, model()))), WEIGHT)
    external(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(weight_of(load_onnx("m.onnx")), WEIGHT)  # a bare name has a folder too
    assert np.array_equal(weight_of(load_onnx(external(tmp_path, length=None, offset=None))), WEIGHT)


def test_a_size_that_is_spelled_as_a_number_is_one(tmp_path: Path) -> None:
    proto = model()
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "2"
    graph = load_onnx(written(tmp_path, proto)).graph
    assert [list(value.shape or ()) for value in (*graph.inputs, *graph.outputs)] == [[2, 64], [2, 64]]


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "a/../../w.bin", "", "C:\\w.bin", "..\\w.bin"])
def test_data_stays_in_the_folder(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    refused(external(folder, location=location), "tensor 'w' lies in")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    path = external(folder)
    (folder / "w.bin").unlink()
    (folder / "w.bin").symlink_to(tmp_path / "secret")
    refused(path, "leaves the model's folder")
    (folder / "w.bin").unlink()
    os.link(tmp_path / "secret", folder / "w.bin")
    refused(path, "hard link")
    (folder / "w.bin").unlink()
    refused(path, "missing")


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"length": 1 << 50}, "needs 16384 bytes"),
        ({"length": 100}, "needs 16384 bytes"),
        ({"offset": 8}, "ends at byte"),
        ({"offset": -8}, "ends at byte"),
        ({"offset": "x"}, "no number"),
        ({"length": None, "offset": 8}, "needs 16384 bytes"),
    ],
)
def test_offsets_and_lengths_are_checked(entries: dict[str, object], match: str, tmp_path: Path) -> None:
    refused(external(tmp_path, **entries), match)


@pytest.mark.parametrize(
    ("dims", "match"), [([1 << 20, 1 << 20], "needs"), ([64, 63], "needs"), ([-1, 64], "shape"), ([1 << 60], "shape"), ([1] * 65, "shape")]
)
def test_shapes_must_fit_the_bytes(dims: list[int], match: str, tmp_path: Path) -> None:
    proto = model()
    del proto.graph.initializer[0].dims[:]
    proto.graph.initializer[0].dims.extend(dims)
    refused(written(tmp_path, proto), match)


def test_values_must_fill_the_shape(tmp_path: Path) -> None:
    proto = model()
    proto.graph.initializer[0].ClearField("raw_data")
    refused(written(tmp_path, proto), "4096 values and holds 0")
    proto.graph.initializer[0].float_data.extend([0.0] * 4096)
    assert load_onnx(written(tmp_path, proto)) is not None
    proto.graph.initializer[0].data_type = 77
    refused(written(tmp_path, proto), "unknown data type")


def test_tensors_inside_nodes_are_checked(tmp_path: Path) -> None:
    proto = model()
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones(3, np.float32)))
    proto.graph.node.insert(0, constant)
    assert load_onnx(written(tmp_path, proto)) is not None
    proto.graph.node[0].attribute[0].t.dims[0] = 1 << 40
    refused(written(tmp_path, proto), "needs")
    proto.graph.node[0].attribute[0].t.dims[0] = 3
    proto.graph.node[0].attribute[0].t.data_location = TensorProto.EXTERNAL
    refused(written(tmp_path, proto), "another file")


def test_deep_and_training_graphs_are_refused(tmp_path: Path) -> None:
    proto = model()
    proto.training_info.add()
    refused(written(tmp_path, proto), "training")
    graph = helper.make_graph([], "inner", [], [])
    for _ in range(25):
        graph = helper.make_graph([helper.make_node("If", ["c"], [], then_branch=graph)], "outer", [], [])
    proto = model()
    proto.graph.node.extend(graph.node)
    refused(written(tmp_path, proto), "nested deeper")


def test_duplicate_initialisers_are_refused(tmp_path: Path) -> None:
    proto = model()
    proto.graph.initializer.append(proto.graph.initializer[0])
    refused(written(tmp_path, proto), "'w' is given 2 times")


def test_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"w": WEIGHT}, tmp_path / "m.onnx")
    refused(tmp_path / "m.onnx", "a safetensors file and no ONNX model; load it as what it is")


def test_damaged_and_invalid_models_are_refused(tmp_path: Path) -> None:
    content = model().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(content[: len(content) // 2])
    refused(path, "truncated")
    proto = model()
    proto.graph.node[0].op_type = "NoSuchOperator"
    refused(written(tmp_path, proto), "onnx.checker")
    path.write_bytes(content.replace(b"MatMul", b"\xff\xff\xff\xff\xff\xff", 1))
    refused(path, "damaged|checker")


@pytest.mark.parametrize("external_above", [0, 1 << 30])
def test_saved_models_run(external_above: int, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    loaded = load_onnx(external(tmp_path))
    save_onnx(loaded, target, external_above=external_above)
    assert (tmp_path / "out.onnx.data").exists() == (external_above == 0)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    (tmp_path / "w.bin").unlink()
    assert np.array_equal(weight_of(load_onnx(target)), WEIGHT)
    x = np.ones((2, 64), np.float32)
    session = onnxruntime.InferenceSession(str(target))
    assert np.array_equal(session.run(None, {"x": x})[0], x @ WEIGHT)


def test_data_is_named_relative_and_moves_along(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    save_onnx(load_onnx(written(tmp_path, model())), first / "out.onnx", external_above=0)
    first.rename(second)
    assert np.array_equal(weight_of(load_onnx(second / "out.onnx")), WEIGHT)


def test_saving_over_itself_keeps_one_pair(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    save_onnx(load_onnx(written(tmp_path, model())), target, external_above=0)
    (tmp_path / "m.onnx").unlink()
    loaded = load_onnx(target)
    save_onnx(loaded, target, external_above=0)
    assert len(list(tmp_path.iterdir())) == 2
    assert np.array_equal(weight_of(load_onnx(target)), WEIGHT)
    assert np.array_equal(weight_of(loaded), WEIGHT)  # the model in memory outlives its old data file
    save_onnx(load_onnx(target), target)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


@pytest.mark.parametrize("step", ["save", "check", "data", "model"])
@pytest.mark.parametrize("external_above", [0, 1 << 30])
def test_a_full_disk_leaves_the_old_pair(step: str, external_above: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.onnx"
    save_onnx(load_onnx(written(tmp_path, model())), target, external_above=0)
    (tmp_path / "m.onnx").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = load_onnx(target)
    new.graph.initializers["w"].const_value = ir.tensor(WEIGHT + 1, name="w")
    real = onnx_file.publish

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    def publish(source: Path, goal: Path) -> None:
        full() if (goal == target) == (step == "model") else real(source, goal)

    if step == "save":
        monkeypatch.setattr(ir, "save", full)
    elif step == "check":
        monkeypatch.setattr(onnx_file, "_check", full)
    elif external_above and step == "data":
        pytest.skip("no data file is written")
    else:
        monkeypatch.setattr(onnx_file, "publish", publish)
    with pytest.raises(RewriteError, match="No space left"):
        save_onnx(new, target, external_above=external_above)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert np.array_equal(weight_of(load_onnx(target)), WEIGHT)


def test_an_invalid_model_is_not_written(tmp_path: Path) -> None:
    loaded = load_onnx(written(tmp_path, model()))
    next(iter(loaded.graph)).op_type = "NoSuchOperator"
    with pytest.raises(RewriteError, match=r"onnx\.checker"):
        save_onnx(loaded, tmp_path / "out.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_local_functions_are_kept(tmp_path: Path) -> None:
    proto = model()
    body = helper.make_function(
        "structured", "Site", ["a", "b"], ["c"], [helper.make_node("MatMul", ["a", "b"], ["c"])], [helper.make_opsetid("", 20)]
    )
    proto.functions.append(body)
    proto.opset_import.append(helper.make_opsetid("structured", 1))
    proto.graph.node[0].op_type, proto.graph.node[0].domain = "Site", "structured"
    save_onnx(load_onnx(written(tmp_path, proto)), tmp_path / "out.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node] == ["Site"]


def test_data_of_others_outlives_an_overwritten_model(tmp_path: Path) -> None:
    new = ir.from_proto(model())
    path = external(tmp_path)
    save_onnx(new, path)
    assert (tmp_path / "w.bin").read_bytes() == WEIGHT.tobytes()
    (tmp_path / "w.bin").rename(tmp_path / "n.onnx.data")  # the name that another model's data would have
    save_onnx(new, external(tmp_path, location="n.onnx.data"))
    assert (tmp_path / "n.onnx.data").exists()


def test_a_dangling_link_is_no_free_name(tmp_path: Path) -> None:
    loaded = load_onnx(written(tmp_path, model()))
    (tmp_path / "out.onnx.data").symlink_to(tmp_path / "nowhere")
    save_onnx(loaded, tmp_path / "out.onnx", external_above=0)
    assert (tmp_path / "out.onnx.data").is_symlink()
    assert (tmp_path / "out.onnx.2.data").read_bytes() == WEIGHT.tobytes()


def test_no_caller_can_ask_for_more_than_protobuf_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_onnx(written(tmp_path, model()))
    assert onnx_file.MAX_INLINE_NBYTES < 2**31
    for limit, data in ((WEIGHT.nbytes, False), (WEIGHT.nbytes - 1, True)):
        monkeypatch.setattr(onnx_file, "MAX_INLINE_NBYTES", limit)
        save_onnx(loaded, tmp_path / "out.onnx", external_above=1 << 60)
        assert (tmp_path / "out.onnx.data").exists() == data


def large(size: int, layers: int) -> ir.Model:
    """y = x w0 w1 ...: each a matrix of zeros with one entry, layer + 1, at (layer, layer + 1)."""
    value = x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, size]))
    nodes, weights = [], []
    for layer in range(layers):
        matrix = torch.zeros(size, size)
        matrix[layer, layer + 1] = layer + 1
        weights.append(ir.Value(name=f"w{layer}", const_value=ir.tensor(matrix.numpy(), name=f"w{layer}")))
        nodes.append(ir.node("MatMul", [value, weights[-1]], name=f"n{layer}"))
        value = nodes[-1].outputs[0]
    value.name, value.type, value.shape = "y", x.type, x.shape
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


@pytest.mark.slow
def test_a_model_beyond_protobuf_is_written_with_a_data_file(tmp_path: Path) -> None:
    size, layers, target = 8192, 9, tmp_path / "large.onnx"
    save_onnx(large(size, layers), target)
    assert target.stat().st_size < 100_000
    assert (tmp_path / "large.onnx.data").stat().st_size == layers * size * size * 4 > 2**31
    loaded = load_onnx(target)
    for layer in (0, layers - 1):
        tensor = loaded.graph.initializers[f"w{layer}"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        row = tensor.numpy()[layer]
        assert row[layer + 1] == layer + 1 == row.sum()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(target), options)
    x = np.zeros((1, size), np.float32)
    x[0, 0] = 1
    (y,) = session.run(None, {"x": x})
    assert y[0, layers] == math.factorial(layers) == y.sum()
