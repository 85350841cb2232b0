"""What `_Judge` refuses by itself: `onnx.checker` is patched out, because it refuses some of these later and hides a missing guard.

Wherever a guard is not about sizes, the sizes are right, so that no other guard speaks for it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from rewriter.backends.files import onnx_file
from rewriter.backends.files.onnx_file import load_onnx
from rewriter.backends.onnx import normal as onnx_graph
from rewriter.backends.onnx.normal import normalised
from rewriter.backends.onnx.opaque import DOMAIN
from rewriter.errors import RewriteError
from tests.files.test_onnx_file import WEIGHT, external, model, refused, written

OPSETS = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
CHECKED = ("test_sparse_initialisers", "test_data_below")  # the checker accepts these
NEEDS = r"tensor 't' of shape \[1099511627776\] needs"


@pytest.fixture(autouse=True)
def no_checker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.node.name.startswith(CHECKED):
        monkeypatch.setattr(onnx.checker, "check_model", lambda *args, **kwargs: None)


def oversized() -> TensorProto:
    """Four bytes that claim to be four tebibytes."""
    return TensorProto(name="t", dims=[1 << 40], data_type=TensorProto.FLOAT, raw_data=b"\0" * 4)


def away(tensor: TensorProto, location: str = "w.bin") -> TensorProto:
    """The tensor with its data in a file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def sparse() -> SparseTensorProto:
    values, indices = numpy_helper.from_array(np.ones(1, np.float32), "w2"), numpy_helper.from_array(np.zeros(1, np.int64), "i")
    return SparseTensorProto(values=values, indices=indices, dims=[1 << 60])


def holding(**fields: object) -> NodeProto:
    """A node whose one attribute has these fields."""
    return NodeProto(op_type="Constant", output=["c"], attribute=[AttributeProto(name="a", **fields)])  # type: ignore[arg-type]


def inner(*tensors: TensorProto) -> GraphProto:
    return GraphProto(name="inner", initializer=tensors)


def branching(tensor: TensorProto) -> list[NodeProto]:
    """y = x @ w from within both branches of an If, where w is an initialiser of the branch."""
    product = helper.make_node("MatMul", ["x", tensor.name], ["z"])
    branch = helper.make_graph([product], "branch", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)], [tensor])
    condition = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
    return [condition, helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]


def with_function(nodes: list[NodeProto], defaults: list[AttributeProto] | None = None) -> ModelProto:
    proto = model()
    function = helper.make_function("local", "F", ["x"], ["y"], nodes, OPSETS[:1], attribute_protos=defaults)
    proto.functions.append(function)
    proto.opset_import.append(OPSETS[1])
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.append(helper.make_node("F", ["x"], ["y"], domain="local"))
    return proto


@pytest.mark.parametrize(
    "location", ["/w.bin", "..", "../model/w.bin", "a/../w.bin", "a\\w.bin", "C:w.bin", "", ".", "w.bin\0", "a\0/w.bin"]
)
def test_locations(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    for name in ("a\\w.bin", "C:w.bin"):
        (folder / name).write_bytes(WEIGHT.tobytes())
    refused(external(folder, location=location), "data must be in the model's own folder")


def test_an_absolute_location_in_the_folder_itself(tmp_path: Path) -> None:
    refused(external(tmp_path, location=tmp_path / "w.bin"), "data must be in the model's own folder")


def test_no_location(tmp_path: Path) -> None:
    refused(external(tmp_path, location=None), "lies in ''")


def test_links(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(folder)
    os.link(folder / "w.bin", tmp_path / "second")
    refused(path, "hard link")
    (folder / "w.bin").unlink()
    (folder / "w.bin").symlink_to(tmp_path / "second")
    refused(path, "a link that leaves the model's folder")
    (tmp_path / "second").rename(folder / "inside")
    (folder / "w.bin").unlink()
    (folder / "w.bin").symlink_to("inside")
    assert load_onnx(path) is not None


@pytest.mark.parametrize(
    ("dims", "data"), [([1] * 65, b"\0" * 4), ([1 << 60, 0], b""), ([-4, -1], b"\0" * 16)], ids=["rank", "size", "negative"]
)
def test_ranks_and_sizes(dims: list[int], data: bytes, tmp_path: Path) -> None:
    proto = model()
    proto.graph.initializer.append(TensorProto(name="t", dims=dims, data_type=TensorProto.FLOAT, raw_data=data))
    refused(written(tmp_path, proto), "tensor 't' has shape")


def test_external_strings(tmp_path: Path) -> None:
    path = external(tmp_path, length=0)
    proto = onnx.load(str(path), load_external_data=False)
    proto.graph.initializer[0].data_type = TensorProto.STRING
    refused(written(tmp_path, proto), "only numeric initialisers")


@pytest.mark.parametrize(
    "node",
    [
        holding(t=oversized(), type=AttributeProto.TENSOR),
        holding(tensors=[oversized()], type=AttributeProto.TENSORS),
        holding(g=inner(oversized()), type=AttributeProto.GRAPH),
        holding(graphs=[inner(), inner(oversized())], type=AttributeProto.GRAPHS),
        holding(g=GraphProto(name="outer", node=[holding(g=inner(oversized()))])),
    ],
    ids=["tensor", "tensors", "graph", "graphs", "nested"],
)
def test_tensors_below_nodes(node: NodeProto, tmp_path: Path) -> None:
    proto = model()
    proto.graph.node.append(node)
    refused(written(tmp_path, proto), NEEDS)
    refused(written(tmp_path, with_function([node])), NEEDS)


def test_defaults_of_functions(tmp_path: Path) -> None:
    default = holding(t=oversized(), type=AttributeProto.TENSOR).attribute[0]
    refused(written(tmp_path, with_function([helper.make_node("Relu", ["x"], ["y"])], [default])), NEEDS)


@pytest.mark.parametrize("fields", [{"t": TensorProto()}, {"tensors": [TensorProto()]}], ids=["tensor", "tensors"])
def test_attributes_lie_in_the_model(fields: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    proto = model()
    proto.graph.node.append(holding(**fields))
    attribute = proto.graph.node[1].attribute[0]
    for tensor in (attribute.t, *attribute.tensors):
        tensor.CopyFrom(away(numpy_helper.from_array(WEIGHT, "t")))
    refused(written(tmp_path, proto), "tensor 't' lies in another file")


def nested_graphs(depth: int) -> ModelProto:
    graph = inner()
    for _ in range(depth):
        graph = GraphProto(name="outer", node=[holding(g=graph, type=AttributeProto.GRAPH)])
    proto = model()
    proto.graph.node.extend(graph.node)
    return proto


def test_nesting(tmp_path: Path) -> None:
    refused(written(tmp_path, nested_graphs(21)), "nested deeper than 20")
    assert load_onnx(written(tmp_path, nested_graphs(20))) is not None


def test_sparse_initialisers_are_refused_whatever_they_hold(tmp_path: Path) -> None:
    for dims, values in (([64, 64], 1), ([1 << 60], 1), ([1 << 60], 1 << 40)):
        proto = model()
        proto.graph.sparse_initializer.append(sparse())
        held = proto.graph.sparse_initializer[0]
        held.dims[:], held.values.dims[:] = dims, [values]
        refused(written(tmp_path, proto), "initialiser 'w2' is a sparse tensor")
    proto = model()
    proto.graph.node.append(holding(g=GraphProto(name="inner", sparse_initializer=[sparse()]), type=AttributeProto.GRAPH))
    refused(written(tmp_path, proto), "initialiser 'w2' is a sparse tensor")


@pytest.mark.parametrize("fields", [{"sparse_tensor": sparse()}, {"sparse_tensors": [sparse()]}], ids=["one", "many"])
def test_sparse_attributes_are_refused(fields: dict[str, object], tmp_path: Path) -> None:
    proto = model()
    proto.graph.node.append(holding(**fields))
    refused(written(tmp_path, proto), "attribute 'a' is a sparse tensor")


def test_data_below_a_function_is_never_looked_for_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    for place, data in ((folder, WEIGHT), (elsewhere, WEIGHT + 1)):
        place.mkdir()
        (place / "w.bin").write_bytes(data.tobytes())
    monkeypatch.chdir(elsewhere)
    path = written(folder, with_function(branching(away(numpy_helper.from_array(WEIGHT, "w")))))
    refused(path, "tensor 'w' lies in another file; only numeric initialisers outside functions may")
    proto = model()
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend(branching(away(numpy_helper.from_array(WEIGHT, "w"))))
    found = normalised(load_onnx(written(folder, proto))).graph.initializers.values()  # in a branch of the main graph it may
    matrices = [value.const_value.numpy() for value in found if value.const_value is not None and value.const_value.size > 1]
    assert [np.array_equal(matrix, WEIGHT) for matrix in matrices] == [True] * 2


def test_faults_of_the_libraries_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("first\nsecond")

    path = written(tmp_path, model())
    loaded = load_onnx(path)
    for owner, name, match in (
        (ir, "from_proto", r"onnx_ir cannot read the model \(first\)"),
        (onnx, "load", r"damaged ONNX file \(first\)"),
        (onnx.checker, "check_model", r"onnx\.checker refuses the model \(first\)"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            refused(path, match)
    monkeypatch.setattr(ir, "save", fail)
    with pytest.raises(RewriteError, match=r"onnx_ir cannot write the model \(first\); nothing was replaced$"):
        onnx_file.save_onnx(loaded, path)
    assert path.read_bytes() == model().SerializeToString()


def calling(*bodies: list[str]) -> ModelProto:
    """Functions F0, F1, ...: body i applies the named ones in turn; the model calls F0."""

    def node(name: str, source: str, goal: str) -> NodeProto:
        return helper.make_node(name, [source], [goal], name=goal, domain="" if name == "Relu" else "local")

    proto = model()
    for index, body in enumerate(bodies):
        ends = ["x", *(f"v{index}_{i}" for i in range(len(body) - 1)), "y"]
        nodes = [node(*step) for step in zip(body, ends[:-1], ends[1:], strict=True)]
        proto.functions.append(helper.make_function("local", f"F{index}", ["x"], ["y"], nodes, OPSETS))
    proto.opset_import.append(OPSETS[1])
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.append(node("F0", "x", "y"))
    return proto


def doubling(levels: int) -> ModelProto:
    return calling(*([f"F{i + 1}"] * 2 for i in range(levels)), ["Relu"])


def not_inlined(proto: ModelProto, match: str) -> None:
    with pytest.raises(RewriteError, match=match) as caught:
        normalised(ir.from_proto(proto))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("levels", [30, 5000])
def test_functions_that_double_at_every_level_are_counted_first(levels: int) -> None:
    not_inlined(doubling(levels), "unfold to more than 1,000,000 nodes; that many are allowed, export it without functions")


def test_names_that_would_be_numbered_for_hours_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "MAX_RENAMING", 10_000)
    assert normalised(ir.from_proto(doubling(4))) is not None
    not_inlined(doubling(7), "make 255 copies of the (node|value) 'y' and too many like it")


def test_circles_of_functions_are_refused() -> None:
    not_inlined(calling(["F1"], ["Relu", "F0"]), r"call each other in a circle \(F\d -> F\d -> F\d\)")


def test_ordinary_functions_are_inlined_and_unused_ones_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = doubling(6)
    proto.functions.append(calling(["Relu"]).functions[0])
    proto.functions[-1].name = "unused"
    inlined = normalised(ir.from_proto(proto))
    assert [node.op_type for node in inlined.graph] == ["Relu"] * 64
    assert not inlined.functions
    made = 2 * (2**6 - 1) + 64  # calls below the first, and what they end in
    monkeypatch.setattr(onnx_graph, "MAX_UNFOLDED", made)
    assert normalised(ir.from_proto(proto)) is not None
    monkeypatch.setattr(onnx_graph, "MAX_UNFOLDED", made - 1)
    not_inlined(proto, "unfold to more than")


def test_large_models_without_functions_are_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "MAX_UNFOLDED", 0)
    monkeypatch.setattr(onnx_graph, "MAX_RENAMING", 0)
    assert len(list(normalised(ir.from_proto(model())).graph)) == 1


def test_kept_functions_count_what_is_inlined_into_them() -> None:
    proto = doubling(30)
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    kept = proto.functions[0]
    kept.domain, proto.graph.node[0].domain = DOMAIN, DOMAIN
    not_inlined(proto, "unfold to more than")
