"""The graph protocol over ONNX: names, constants, nested bodies, splice, restore, prune, run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from rewriter.algebra import BlockDiagonal, Compose, Dense, Diagonal
from rewriter.backends.onnx.emit import check, finish
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.graph import PLAIN, Layout, Place, Site, WeightRef
from tests.onnx.models import MLP, MLP_WEIGHTS, close, model

SIZES = {"B": 3, "S": 4, "T": 5, "H": 2, "W": 3}


def graph(text: str, weights: dict[str, Any], opset: int = 18) -> OnnxGraph:
    return OnnxGraph(model(text, opset, weights))


def feeds(g: OnnxGraph) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        s.name: torch.randn(s.shape(SIZES)) if s.torch_dtype.is_floating_point else torch.full(s.shape(SIZES), 3).to(s.torch_dtype)
        for s in g.specs()
    }


def find(g: OnnxGraph, op: str, which: int = 0) -> ir.Node:
    return [n for n in g.nodes() if g.op(n) == op][which]


def product_site(
    g: OnnxGraph, node: ir.Node, shape: tuple[int, int], *, weight: int = 1, axes: tuple[int, ...] = (1, 0), **place: Any
) -> Site:
    """A hand-made site over one node; `weight` is the stored operand's index."""
    x, w = node.inputs[1 - weight], node.inputs[weight]
    assert w is not None
    spot = Place(**{"nodes": (node,), "x": x, "y": node.outputs[0], **place})
    name = g.stored_name(w)
    return Site(name, name, "linear", shape, torch.float32, (spot,), {"weight": WeightRef(name, w, axes)})


def equal_form(weight: Tensor) -> Compose:
    """The (m, n) matrix as a product of two factors."""
    return Compose((Diagonal(torch.full((weight.shape[1],), 2.0)), Dense(weight.T.contiguous() / 2)))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        close(a[name], b[name])


def assert_splices(g: OnnxGraph, sites: list[Site]) -> None:
    """Splice equal forms: same outputs, nothing dense left after prune, and back again by restore."""
    given = feeds(g)
    before, names, nbytes, count = g.run(given), g.output_names(), g.nbytes(), len(list(g.nodes()))
    for site in sites:
        ref = site.weights["weight"]
        stored = g.const(ref.value)
        assert stored is not None
        weight = (stored.permute(ref.axes) if ref.axes else stored).reshape(site.shape) * ref.scale
        g.splice(site, equal_form(weight))
    assert_same(g.run(given), before)
    assert g.output_names() == names
    clean = g.clone()
    clean.prune()
    check(clean.model)
    assert_same(clean.run(given), before)
    assert not {site.weights["weight"].name for site in sites} & set(clean.model.graph.initializers)
    held = [clean.operator(n) for n in clean.nodes() if clean.op(n) == "structured"]
    assert len(held) == sum(len(site.places) for site in sites)
    assert all(isinstance(o, Compose) for o in held)
    for site in sites:
        g.restore(site)
    assert_same(g.run(given), before)
    assert (g.nbytes(), len(list(g.nodes()))) == (nbytes, count)


@pytest.mark.parametrize("opset", [13, 18, 25])
def test_matmul_add(opset: int) -> None:
    g = graph(MLP, MLP_WEIGHTS, opset)
    one, two = find(g, "matmul"), find(g, "matmul", 1)
    adds = [find(g, "add"), find(g, "add", 1)]
    sites = [
        product_site(g, one, (8, 6), nodes=(one, adds[0]), y=adds[0].outputs[0], bias=adds[0].inputs[1]),
        product_site(g, two, (5, 8), nodes=(two, adds[1]), y=adds[1].outputs[0], bias=adds[1].inputs[0]),
    ]
    assert_splices(g, sites)
    assert_splices(g, sites[::-1])


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("c", [None, (5,), (1, 5), (1,), (3, 5)])
def test_gemm_with_all_flags(trans_a: int, trans_b: int, c: tuple[int, ...] | None) -> None:
    x = "float[6,B] x" if trans_a else "float[B,6] x"
    operands = "x, w, c" if c else "x, w"
    text = f"g ({x}) => (float[B,5] y) {{ y = Gemm<alpha=0.5, beta=3.0, transA={trans_a}, transB={trans_b}>({operands}) }}"
    g = graph(text, {"w": (5, 6) if trans_b else (6, 5), **({"c": c} if c else {})})
    node = find(g, "gemm")
    assert g.attributes(node) == {"alpha": 0.5, "beta": 3.0, "trans_a": bool(trans_a), "trans_b": bool(trans_b)}
    layout = Layout(before=(1, 0)) if trans_a else PLAIN
    bias = node.inputs[2] if c else None
    site = product_site(g, node, (5, 6), axes=() if trans_b else (1, 0), layout=layout, bias=bias, bias_scale=3.0 if c else 1.0)
    site.weights["weight"].__dict__["scale"] = 0.5
    assert_splices(g, [site])


def test_a_bias_that_varies_is_added_as_it_is() -> None:
    g = graph("g (float[B,6] x, float[5] c) => (float[B,5] y) { y = Gemm<beta=2.0>(x, w, c) }", {"w": (6, 5)})
    node = find(g, "gemm")
    site = product_site(g, node, (5, 6), bias=node.inputs[2], bias_scale=2.0)
    assert_splices(g, [site])
    given = feeds(g)
    before = g.run(given)["y"]
    g.splice(site, equal_form(g.const(node.inputs[1]).T), torch.full((5,), 0.25))
    close(g.run(given)["y"], before + 0.25)


def test_shift_and_bias_become_one_constant() -> None:
    g = graph(MLP, MLP_WEIGHTS)
    node, add = find(g, "matmul"), find(g, "add")
    site = product_site(g, node, (8, 6), nodes=(node, add), y=add.outputs[0], bias=add.inputs[1])
    shift = torch.arange(8.0)
    g.splice(site, equal_form(g.const(node.inputs[1]).T), shift)
    g.prune()
    assert [g.op(n) for n in g.nodes()] == ["structured", "add", "relu", "matmul", "add"]
    close(
        g.const(g.model.graph.initializers["w1.bias"]),
        torch.from_numpy(model(MLP, 18, MLP_WEIGHTS).graph.initializers["b1"].const_value.numpy()) + shift,
    )


def test_convolution_and_einsum_layouts() -> None:
    g = graph("g (float[B,6,H,W] x) => (float[B,5,H,W] y) { y = Conv<kernel_shape=[1,1]>(x, w, c) }", {"w": (5, 6, 1, 1), "c": (5,)})
    node = find(g, "conv")
    assert g.attributes(node) == {"strides": (1, 1), "pads": (0,) * 4, "dilations": (1, 1), "groups": 1}
    layout = Layout(before=(0, 2, 3, 1), after=(0, 3, 1, 2))
    assert_splices(g, [product_site(g, node, (5, 6), axes=(), layout=layout, bias=node.inputs[2])])
    g = graph('g (float[B,S,2,3] x) => (float[B,5,S,4] y) { y = Einsum<equation="bsij,ijko->bosk">(x, w) }', {"w": (2, 3, 4, 5)})
    layout = Layout(join=2, spread=(4, 5), after=(0, 3, 1, 2))
    assert_splices(g, [product_site(g, find(g, "einsum"), (20, 6), axes=(2, 3, 0, 1), layout=layout)])


BODIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "if": (
        """g (float[B,6] x, bool p) => (float[B,5] y) { y = If(p) <
           then_branch = t () => (float[B,5] a) { m = MatMul(x, w)  a = Relu(m) },
           else_branch = e () => (float[B,5] b) { b = MatMul(x, v) }> }""",
        {"w": (6, 5), "v": (6, 5)},
        "cond",
    ),
    "scan": (
        """g (float[2,4] h0, float[T,2,6] x) => (float[2,4] h, float[T,2,4] ys) { h, ys = Scan<num_scan_inputs=1,
           body = b (float[2,4] s, float[2,6] e) => (float[2,4] so, float[2,4] o) {
             a = MatMul(e, w)  r = MatMul(s, u)  t = Add(a, r)  so = Tanh(t)  o = Identity(so) }>(h0, x) }""",
        {"w": (6, 4), "u": (4, 4)},
        "scan",
    ),
    "loop": (
        """g (float[B,4] x, int64 n, bool c) => (float[B,4] y) { y = Loop(n, c, x) <
           body = b (int64 i, bool ci, float[B,4] s) => (bool co, float[B,4] so) {
             co = Identity(ci)  r = MatMul(s, u)  so = Tanh(r) }> }""",
        {"u": (4, 4)},
        "loop",
    ),
}


@pytest.mark.parametrize("kind", BODIES)
def test_nested_bodies(kind: str) -> None:
    text, weights, op = BODIES[kind]
    g = graph(text, weights)
    owner = find(g, op)
    nodes = list(g.nodes())
    inner = [n for n in nodes if g.op(n) == "matmul"]
    assert all(g.body(n).startswith(f"{owner.name}.") and nodes.index(n) < nodes.index(owner) for n in inner)
    assert g.body(owner) == ""
    assert not any(g.can_tap(n.outputs[0]) for n in inner)
    sites = [product_site(g, n, tuple(g.shape(n.inputs[1]))[::-1]) for n in inner]
    assert not any(g.can_splice(s.places[0]) for s in sites)
    assert_splices(g, sites)


def test_local_functions_are_inlined_and_keep_their_scope() -> None:
    m = model("g (float[B,6] x) => (float[B,5] y) { h = local.F(x, w)  y = Add(h, b) }", 18, {"w": (6, 5), "b": (5,)})
    a, w = ir.Value(name="a"), ir.Value(name="w")
    product = ir.Node(
        "", "MatMul", [a, w], num_outputs=1, metadata_props={"pkg.torch.onnx.name_scopes": "['', 'layer.0', 'layer.0.dense', 'linear']"}
    )
    body = ir.Graph([a, w], product.outputs, nodes=[product], opset_imports={"": 18}, name="F")
    m.functions["local", "F", ""] = ir.Function("local", "F", graph=body, attributes=())
    g = OnnxGraph(m)
    assert [g.op(n) for n in g.nodes()] == ["matmul", "add"]
    assert g.scope(find(g, "matmul")) == "layer.0.dense"
    assert g.shape(find(g, "matmul").outputs[0]) == ("B", 5)
    assert_splices(g, [product_site(g, find(g, "matmul"), (5, 6))])
    assert len(m.functions) == 1


def test_constants_through_expressions() -> None:
    wq = np.random.default_rng(1).integers(-100, 100, (6, 5)).astype(np.int8)
    g = graph(
        """g (float[B,6] x) => (float[B,5] y, float[B,3] z) {
          wt = Transpose<perm=[1,0]>(w)  half = Mul(wt, h)  a = MatMul(x, half)
          wd = DequantizeLinear<axis=1>(wq, sc, zp)  b = MatMul(x, wd)
          s1, s2 = Split<axis=1>(packed, sizes)  z = MatMul(x, s2)  y = Add(a, b) }""",
        {"w": (5, 6), "h": np.float32(0.5), "wq": wq, "sc": (5,), "zp": np.zeros(5, np.int8), "packed": (6, 7), "sizes": np.array([4, 3])},
    )
    stored = {name: torch.from_numpy(v.const_value.numpy()) for name, v in g.model.graph.initializers.items()}
    first, second, third = (find(g, "matmul", i).inputs[1] for i in range(3))
    close(g.const(first), stored["w"].T * 0.5)
    close(g.const(second), stored["wq"] * stored["sc"])
    close(g.const(third), stored["packed"][:, 4:])
    assert [g.stored_name(v) for v in (first, second, third)] == ["w", "wq", "packed"]
    assert [n for n, _ in g.storage_users(first)] == [find(g, "matmul")]
    assert not g.is_const(find(g, "add").outputs[0])
    assert g.const(find(g, "add").outputs[0]) is None


def test_the_parameter_behind_a_value_knows_all_its_users() -> None:
    g = graph(
        "g (int64[B] i, float[B,4] x) => (float[B,4] e, float[B,9] y) { e = Gather(w, i)  t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t) }",
        {"w": (9, 4)},
    )
    found = g.storage_users(find(g, "matmul").inputs[1])
    assert [(g.op(n), g.name(v)) for n, v in found] == [("gather", "w"), ("matmul", "t")]
    assert g.attributes(find(g, "gather")) == {"axis": 0}
    assert [g.op(n) for n in g.users(g.outputs(find(g, "matmul"))[0])] == ["output"]


@pytest.mark.parametrize(
    ("op_type", "domain", "expected"),
    [
        ("SimplifiedLayerNormalization", "", "rms_norm"),
        ("RMSNormalization", "", "rms_norm"),
        ("GroupQueryAttention", "com.microsoft", "attention"),
        ("Attention", "com.microsoft", "attention"),
        ("Attention", "", "attention"),
        ("LSTM", "", "lstm"),
        ("If", "", "cond"),
        ("FusedMatMul", "com.microsoft", "com.microsoft.FusedMatMul"),
        ("Erf", "", "Erf"),
    ],
)
def test_one_name_an_idea(op_type: str, domain: str, expected: str) -> None:
    g = graph(MLP, MLP_WEIGHTS)
    assert g.op(ir.Node(domain, op_type, [])) == expected


def test_taps_see_what_flows() -> None:
    g = graph(MLP, MLP_WEIGHTS)
    values = [find(g, "matmul").inputs[0], find(g, "matmul", 1).inputs[0], find(g, "add", 1).outputs[0], find(g, "matmul").outputs[0]]
    seen: dict[int, Tensor] = {}
    given = feeds(g)
    taps: dict[ir.Value, Callable[[Tensor], None]] = {v: lambda t, i=i: seen.__setitem__(i, t) for i, v in enumerate(values)}  # type: ignore[misc]
    assert all(g.can_tap(v) for v in values)
    result = g.run(given, taps)
    w1, b1 = (g.const(g.model.graph.initializers[n]) for n in ("w1", "b1"))
    close(seen[0], given["x"])
    close(seen[1], torch.relu(given["x"] @ w1 + b1))
    close(seen[2], result["y"])
    close(seen[3], given["x"] @ w1)
    session = g._session
    g.run(given, taps)
    assert g._session is session
    assert list(result) == ["y"]


def test_taps_are_fetched_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.backends.onnx.run.TAPPED_BYTES", 1)
    test_taps_see_what_flows()


def test_clones_are_independent_and_share_tensors() -> None:
    g = graph(MLP, MLP_WEIGHTS)
    c = g.clone()
    node = find(c, "matmul")
    c.splice(product_site(c, node, (8, 6)), equal_form(c.const(node.inputs[1]).T))
    assert "structured" not in [g.op(n) for n in g.nodes()]
    assert g.model.graph.initializers["w1"].const_value is c.model.graph.initializers["w1"].const_value


def test_specs_name_dynamic_dimensions() -> None:
    g = graph("g (float[B,?,6] x, int64[3] k) => (float[B,?,6] y) { y = Identity(x) }", {})
    assert [str(s) for s in g.specs()] == ["x:float32[B,x_1,6]", "k:int64[3]"]
    assert g.output_names() == ["y"]


def test_one_weight_at_two_places_is_stored_once() -> None:
    g = graph("g (float[B,6] x) => (float[B,6] y) { a = MatMul(x, w)  r = Relu(a)  y = MatMul(r, w) }", {"w": (6, 6)})
    first, second = find(g, "matmul"), find(g, "matmul", 1)
    one = product_site(g, first, (6, 6))
    both = Site("w", "w", "linear", (6, 6), torch.float32, (*one.places, *product_site(g, second, (6, 6)).places), one.weights)
    given = feeds(g)
    before = g.run(given)
    g.splice(both, BlockDiagonal(g.const(first.inputs[1])[None].contiguous()))
    assert_same(g.run(given), before)
    g.prune()
    assert list(g.model.graph.initializers) == ["w.blocks"]


def test_bfloat16_weights_are_torch_tensors() -> None:
    m = model("g (bfloat16[B,6] x) => (bfloat16[B,5] y) { t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t) }")
    weight = torch.randn(5, 6).bfloat16()
    held = ir.tensor_adapters.TorchTensor(weight, name="w")
    stored = ir.Tensor(held.numpy(), dtype=ir.DataType.BFLOAT16, name="w")
    value = ir.Value(name="w", const_value=stored, shape=stored.shape, type=ir.TensorType(stored.dtype))
    for node in m.graph:
        if node.op_type == "Transpose":
            node.replace_input_with(0, value)
    m.graph.register_initializer(value)
    g = OnnxGraph(m)
    found = g.const(find(g, "matmul").inputs[1])
    assert found.dtype == torch.bfloat16
    close(found, weight.T)


def test_shapes_behind_contrib_operators_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "g (float[B,S,6] x) => (y) { h = com.microsoft.Gelu(x)  a = MatMul(h, u)  z = com.microsoft.BiasGelu(a, v)  y = MatMul(z, k) }"
    g = graph(text, {"u": (6, 4), "v": (4,), "k": (4, 6)})
    assert g.shape(find(g, "matmul", 1).outputs[0]) == ("B", "S", 6)
    assert not list(tmp_path.iterdir())
    m = model("g (float[B,S,6] x) => (y) { h = com.microsoft.Nobody(x)  y = MatMul(h, u) }", 18, {"u": (6, 4)})
    unknown = OnnxGraph(m)
    (node,) = [n for n in unknown.nodes() if unknown.op(n) == "matmul"]
    assert "rank" in unknown.can_splice(Place((node,), node.inputs[0], node.outputs[0]))
    assert not list(tmp_path.iterdir())


def test_a_norm_with_a_second_summand_is_a_norm() -> None:
    text = "g (float[B,S,6] x, float[B,S,6] r) => (float[B,S,6] y) { y = com.microsoft.SkipLayerNormalization(x, r, gamma, beta) }"
    g = graph(text, {"gamma": (6,), "beta": (6,)})
    (node,) = g.nodes()
    assert g.op(node) == "layer_norm"
    assert [g.name(v) for v in g.inputs(node)] == ["x", "gamma", "beta"]


def test_old_models_are_raised_and_weights_are_no_inputs() -> None:
    text = "g (float[B,6] x, float[6,5] w) => (float[B,5] y) { m = MatMul(x, w)  s = Squeeze<axes=[1]>(u)  y = Mul(m, s) }"
    m = model(text, 9, {"w": (6, 5), "u": (5, 1)})
    given = {"x": torch.randn(3, 6)}
    w, u = (torch.from_numpy(m.graph.initializers[n].const_value.numpy().copy()) for n in ("w", "u"))
    g = OnnxGraph(m)
    assert g.opset >= 13
    assert [s.name for s in g.specs()] == ["x"]
    close(g.run(given)["y"], (given["x"] @ w) * u[:, 0])
    assert_splices(g, [product_site(g, find(g, "matmul"), (5, 6))])
    assert m.graph.opset_imports[""] == 9


def test_initialisers_never_clash() -> None:
    text = "g (float[B,6] x) => (float[B,5] y) { t = MatMul(x, w)  y = Add(t, taken) }"
    m = model(text, 18, {"w": (6, 5), "taken": (5,)})
    taken = m.graph.initializers.pop("taken")
    taken.name = "w.factors.1.weight"
    m.graph.register_initializer(taken)
    g = OnnxGraph(m)
    site = product_site(g, find(g, "matmul"), (5, 6))
    assert_splices(g, [site])
    g.splice(site, equal_form(g.const(site.weights["weight"].value).T))
    g.splice(site, equal_form(g.const(site.weights["weight"].value).T))
    assert sorted(g.model.graph.initializers) == ["w", "w.factors.0.scale", "w.factors.1.weight", "w.factors.1.weight_2"]


def test_sizes_that_were_left_open_are_inferred() -> None:
    text = "g (float[B,S,6] x) => (float[B,S,5] y) { m = MatMul(x, w)  y = Identity(m) }"
    m = model(text, 18, {"w": (6, 5)})
    (product, _) = m.graph
    product.outputs[0].shape, product.outputs[0].type = ir.Shape([None, None, None]), ir.TensorType(ir.DataType.FLOAT)
    g = OnnxGraph(m)
    assert g.shape(next(iter(g.nodes())).outputs[0]) == ("B", "S", 5)


def test_what_is_emitted_has_its_shapes() -> None:
    text = "g (float[B,S,6] x) => (float[B,S,5] y) { t = Transpose<perm=[0,2,1]>(x)  u = Transpose<perm=[0,2,1]>(t)  y = MatMul(u, w) }"
    m = model(text, 18, {"w": (6, 5)})
    finish(m, 18)
    assert [str(v.shape) for node in m.graph for v in node.outputs] == ["[B,6,S]", "[B,S,6]", "[B,S,5]"]
