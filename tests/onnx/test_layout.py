"""Features first or last: the cut is the least energy, what is chosen runs as before, transposes between two such layers cancel."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewriter.algebra import BlockDiagonal, Compose, Dense, Permutation
from rewriter.backend import EmitOptions
from rewriter.backends.eager import EagerOps
from rewriter.backends.onnx import layout, measure
from rewriter.backends.onnx.constants import Constants
from rewriter.backends.onnx.emit import attach, check
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.backends.onnx.layout import ELEMENTWISE, Conditions, Form, cut, energy, layouts
from rewriter.backends.onnx.opaque import SITE, is_opaque
from rewriter.backends.onnx.ops import COLUMNS, function
from rewriter.backends.onnx.part import part, text
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.target import OnnxTarget
from rewriter.graph import Place, Site, WeightRef
from rewriter.operator import AbstractMatrix, flatten
from rewriter.passes.structures.monarch import Monarch
from rewriter.quantised import quantised
from tests.onnx.models import close, model

ASKED = Conditions((4, 64), 1, 20)
IN, OUT = "g (float[B,S,6] x) => (float[B,S,6] y)", {"w1": (6, 8), "w2": (8, 6)}
BETWEEN = {
    "nothing": "h = Identity(a)",
    "bias and relu": "s = Add(a, b)  h = Relu(s)",
    "bias first, gelu": "s = Add(b, a)  d = Div(s, root)  e = Erf(d)  f = Add(e, one)  g = Mul(s, f)  h = Mul(g, half)",
    "gelu of tanh": "p = Pow(a, three)  c = Mul(p, half)  i = Add(a, c)  t = Tanh(i)  u = Add(t, one)  g = Mul(a, u)  h = Mul(g, half)",
    "silu": "e = Sigmoid(a)  h = Mul(a, e)",
    "the rest": "n = Neg(a)  v = Abs(n)  q = Sqrt(v)  e = Exp(q)  h = Sub(e, wide)",
}
SCALARS = {name: np.float32(number) for name, number in {"root": 2**0.5, "one": 1, "half": 0.5, "three": 3}.items()}
CONSTANTS = {"b": (8,), "wide": (1, 1, 8), **SCALARS}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No timing is taken from, or left in, the user's cache; and none takes long."""
    monkeypatch.setenv("REWRITER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "SECONDS", 0.001)
    monkeypatch.setattr(measure, "COLD_BYTES", 1 << 12)


def blocks(n: int, m: int) -> AbstractMatrix:
    return Compose((BlockDiagonal(torch.randn(2, n // 2, 3)), BlockDiagonal(torch.randn(3, 2, 4)), Dense(torch.randn(12, m))))


def structured(body: str, weights: Mapping[str, object], make: Callable[[int, int], AbstractMatrix] = blocks, opset: int = 20) -> OnnxGraph:
    """The model with an operator in place of every w1, w2, ..., and nothing else changed."""
    g = OnnxGraph(model(body, opset, {**OUT, **CONSTANTS, **weights}))
    for node in [n for n in g.nodes() if g.op(n) == "matmul"]:
        w = node.inputs[1]
        assert w is not None and w.name is not None
        n, m = g.const(w).shape
        place = Place((node,), node.inputs[0], node.outputs[0])
        site = Site(w.name, w.name, "linear", (m, n), torch.float32, (place,), {"weight": WeightRef(w.name, w, (1, 0))})
        g.splice(site, make(n, m))
    copy = g.clone()
    copy.prune()
    return copy


def fixed(monkeypatch: pytest.MonkeyPatch, last: float, first: float, turn: float, whole: Sequence[float] = (2.0, 1.0)) -> None:
    """Seconds by decree: of each site in either layout, of a transpose, and of a chain as it stands."""

    def lowerings(_spec: str, _rank: int, among: Sequence[str], *_: object) -> list[float]:
        return [first + 2 * turn if name == COLUMNS else last for name in among]

    monkeypatch.setattr(layout, "measure_lowerings", lowerings)
    monkeypatch.setattr(layout, "measure_transposes", lambda widths, *_: [turn] * len(widths))
    monkeypatch.setattr(layout, "time_models", lambda models, *_: list(whole))


def lowered(g: OnnxGraph) -> tuple[dict[str, str], list[str]]:
    """The lowering of each site that was looked at, and what was said."""
    chosen, said = layouts(g.model, ASKED)
    return {node.metadata_props[SITE]: lowering for node, lowering in chosen.items()}, said


def optimised(model: ir.Model, folder: Path) -> list[str]:
    """The operators that ONNX Runtime is left with."""
    import onnxruntime as ort

    options = ort.SessionOptions()  # type: ignore[attr-defined]
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 4
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])  # type: ignore[attr-defined]
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


@pytest.mark.parametrize("between", BETWEEN)
def test_transposes_between_two_layers_vanish(between: str, tmp_path: Path) -> None:
    g = structured(f"{IN} {{ a = MatMul(x, w1)  {BETWEEN[between]}  y = MatMul(h, w2) }}", {})
    x = torch.randn(2, 3, 6)
    expected = g.run({"x": x})["y"]
    chain = list(layout._chains(layout._members(g.model, Constants(20))))
    assert [sum(map(is_opaque, run)) for run in chain] == [2]
    attach(g.model, lambda _spec, _rank: COLUMNS)
    check(g.model)
    assert optimised(g.model, tmp_path).count("Transpose") <= 2  # one at either end
    close(Session(ir.to_proto(g.model).SerializeToString(), 1)({"x": x})["y"], expected)


def test_every_elementwise_operator_is_tried_between_two_layers() -> None:
    tried = " ".join(BETWEEN.values())
    newer = {"Gelu", "Swish"}  # of opset 20 and 24
    assert not [name for name in ELEMENTWISE - newer if f"{name}(" not in tried]


def test_a_permutation_between_two_layers_moves_whole_rows(tmp_path: Path) -> None:
    order = torch.randperm(8)
    make = {6: lambda n, m: Compose((Dense(torch.randn(n, m)), Permutation(order, m))), 8: lambda n, m: Dense(torch.randn(n, m))}
    g = structured(f"{IN} {{ a = MatMul(x, w1)  h = Relu(a)  y = MatMul(h, w2) }}", {}, lambda n, m: make[n](n, m))
    x = torch.randn(2, 3, 6)
    expected = g.run({"x": x})["y"]
    attach(g.model, lambda _spec, _rank: COLUMNS)
    left = [node for node in _nodes(g.model) if node.op_type == "Gather"]
    assert [node.attributes["axis"].as_int() for node in left] == [-2]
    assert optimised(g.model, tmp_path).count("Transpose") <= 1
    close(Session(ir.to_proto(g.model).SerializeToString(), 1)({"x": x})["y"], expected)


def _nodes(model: ir.Model) -> list[ir.Node]:
    return [node for f in model.functions.values() for node in f.all_nodes()]


def test_the_body_as_text(golden: Callable[[str, str], None]) -> None:
    spec = flatten(Monarch.random(torch.Generator().manual_seed(0)))[1]
    lines = []
    for lowering in ("batched", COLUMNS):
        lines.append(lowering)
        for node in function(spec, 3, 20, lowering).all_nodes():
            if node.op_type == "Constant":
                continue
            lists = [v.producer().attributes for v in node.inputs if v is not None and v.producer() is not None]
            sizes = [list(held["value_ints"].as_ints()) for held in lists if "value_ints" in held]
            options = [(name, option.value) for name, option in node.attributes.items()]
            lines.append(f"  {node.op_type} {[*sizes, *options]}")
    golden("layout.txt", "\n".join(lines) + "\n")


CHAIN = f"{IN} {{ a = MatMul(x, w1)  {BETWEEN['bias and relu']}  y = MatMul(h, w2) }}"


def test_a_chain_is_turned_where_only_both_together_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, last=10.0, first=7.0, turn=2.5)  # alone 7 + 5 > 10, together 14 + 5 < 20
    assert lowered(structured(CHAIN, {})) == (
        {"w1": COLUMNS, "w2": COLUMNS},
        ["features come first from layer to layer: w1 . w2 (2.00x as fast at T=4, 2.00x as fast at T=64)"],
    )


@pytest.mark.parametrize("first", [1.0, 100.0])
def test_what_was_timed_as_it_stands_has_the_last_word(first: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, last=10.0, first=first, turn=1.0, whole=(2.0, 1.0))
    assert lowered(structured(CHAIN, {}))[0] == {"w1": COLUMNS, "w2": COLUMNS}
    monkeypatch.setenv("REWRITER_CACHE", f"{os.environ['REWRITER_CACHE']}.other")
    fixed(monkeypatch, last=10.0, first=first, turn=1.0, whole=(1.0, 2.0))
    assert lowered(structured(CHAIN, {})) == (
        {"w1": "split", "w2": "split"},
        ["features stay last where first would be slower: w1 . w2 (0.50x as fast at T=4, 0.50x as fast at T=64)"],
    )


def test_a_single_layer_is_turned_for_its_own_sake(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = "g (float[B,S,6] x) => (float[B,S,8] y) { y = MatMul(x, w1) }"
    fixed(monkeypatch, last=10.0, first=7.0, turn=1.0)
    assert lowered(structured(alone, {}))[0] == {"w1": COLUMNS}
    fixed(monkeypatch, last=10.0, first=7.0, turn=2.0)
    said = ["features stay last where first would be slower: w1 (by the sum of parts)"]
    assert lowered(structured(alone, {})) == ({"w1": "split"}, said)


def test_token_counts_weigh_alike() -> None:
    assert layout.Seconds((1.0, 100.0), (1.1, 80.0)).pays
    assert not layout.Seconds((1.0, 100.0), (2.0, 80.0)).pays


STAYS = {
    "another value": ("g (float[B,S,6] x, float[B,S,8] r) => (float[B,S,6] y)", "a = MatMul(x, w1)  h = Add(a, r)  y = MatMul(h, w2)"),
    "a number for each token": (IN, "a = MatMul(x, w1)  h = Mul(a, steps)  y = MatMul(h, w2)"),
    "a constant of more axes": (IN, "a = MatMul(x, w1)  i = Add(a, deep)  h = Squeeze(i, zero)  y = MatMul(h, w2)"),
    "something that is not elementwise": (IN, "a = MatMul(x, w1)  h = Softmax(a)  y = MatMul(h, w2)"),
}


@pytest.mark.parametrize("why", STAYS)
def test_what_needs_features_last_parts_a_chain(why: str) -> None:
    head, body = STAYS[why]
    deep = {"steps": (3, 1), "deep": (1, 1, 1, 8), "zero": np.array([0])}
    g = structured(f"{head} {{ {body} }}", {k: v for k, v in deep.items() if k in body})
    assert [len(run) for run in layout._chains(layout._members(g.model, Constants(20)))] == [1, 1]


def test_a_reader_outside_costs_one_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    g = structured("g (float[B,S,6] x) => (float[B,S,6] y, float[B,S,8] h) { a = MatMul(x, w1)  h = Relu(a)  y = MatMul(h, w2) }", {})
    (chain,) = layout._chains(layout._members(g.model, Constants(20)))
    turns = {6: 1.0, 8: 10.0}
    assert energy(chain, turns, ()) == 0
    assert energy(chain, turns, set(chain)) == 1 + 10 + 1
    (relu,) = [node for node in chain if not is_opaque(node)]
    assert energy(chain, turns, {relu}) == 20


def test_two_layers_into_one(tmp_path: Path) -> None:
    """SwiGLU: nothing that comes from outside is added, so all three are one chain."""
    body = "a = MatMul(x, w1)  c = MatMul(x, w3)  s = Sigmoid(a)  d = Mul(a, s)  h = Mul(d, c)  y = MatMul(h, w2)"
    g = structured(f"{IN} {{ {body} }}", {"w3": (6, 8)})
    (chain,) = layout._chains(layout._members(g.model, Constants(20)))
    turns = {6: 1.0, 8: 1.0}
    assert energy(chain, turns, set(chain)) == 2  # x is turned once for both
    x = torch.randn(2, 3, 6)
    expected = g.run({"x": x})["y"]
    attach(g.model, lambda _spec, _rank: COLUMNS)
    assert optimised(g.model, tmp_path).count("Transpose") <= 3
    close(Session(ir.to_proto(g.model).SerializeToString(), 1)({"x": x})["y"], expected)


def test_integers_keep_features_last(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed(monkeypatch, last=10.0, first=1.0, turn=1.0)

    def make(n: int, m: int) -> AbstractMatrix:
        operator = quantised(blocks(n, m)) if n == 8 else blocks(n, m)
        assert operator is not None
        return operator

    chosen, _ = lowered(structured(CHAIN, {}, make))
    assert chosen == {"w1": COLUMNS, "w2": "split"}


def test_dense_factors_alone_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "measure_lowerings", None)
    dense = structured(CHAIN, {}, lambda n, m: Dense(torch.randn(n, m)))
    assert lowered(dense) == ({}, [])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Seconds of three sites, last and first, and of transposes by width; whole numbers of nanoseconds."""
    cost = st.integers(0, 20)
    return draw(st.lists(st.tuples(cost, cost), min_size=3, max_size=3)), draw(st.tuples(cost, cost))


THREE = "a = MatMul(x, w1)  h = Relu(a)  b2 = MatMul(h, w2)  c = MatMul(b2, w3)  y = Sigmoid(c)"
FORK = "a = MatMul(x, w1)  h = Relu(a)  u = MatMul(h, w2)  v = MatMul(h, w4)  y = Add(u, v)"
TWO_READERS = "a = MatMul(x, w1)  c = MatMul(x, w3)  h = Mul(a, c)  y = MatMul(h, w2)"


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from([THREE, FORK, TWO_READERS]), st.booleans())
def test_the_cut_is_the_least_energy(problem: tuple[list[tuple[int, int]], tuple[int, int]], body: str, read_outside: bool) -> None:
    costs, (narrow, wide) = problem
    head = "g (float[B,S,6] x) => (float[B,S,6] y, float[B,S,8] a)" if read_outside else IN
    shapes = {"w3": (6, 8), "w4": (8, 6)}
    text = f"{head} {{ {body} }}".replace("float[B,S,6] y", "float[B,S,8] y" if body is THREE else "float[B,S,6] y")
    g = structured(text, {name: shape for name, shape in shapes.items() if name in body}, lambda n, m: Dense(torch.randn(n, m)))
    (found,) = layout._chains(layout._members(g.model, Constants(20)))
    seconds = iter(costs)
    chain = {}
    for node, form in found.items():
        last, first = next(seconds) if is_opaque(node) else (0, 0)
        chain[node] = Form(form.rank, form.width, form.inputs, last / layout.NANO, first / layout.NANO)
    turns = {6: narrow / layout.NANO, 8: wide / layout.NANO}
    subsets = ({n for n, there in zip(chain, flags, strict=True) if there} for flags in product([False, True], repeat=len(chain)))
    least = min(round(energy(chain, turns, subset) * layout.NANO) for subset in subsets)
    assert round(energy(chain, turns, cut(chain, turns)) * layout.NANO) == least


def test_ties_stay_last() -> None:
    g = structured(CHAIN, {})
    (chain,) = layout._chains(layout._members(g.model, Constants(20)))
    assert cut(chain, {6: 0.0, 8: 0.0}) == set()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))
def test_features_first_equal_eager_at_any_size(k: int, q: int, p: int, batch: int, tokens: int) -> None:
    operator = Compose((BlockDiagonal(torch.randn(k, q, p)), Permutation(torch.randperm(k * p), k * p), Dense(torch.randn(k * p, 5))))
    built = measure.stacked([operator], 3)
    attach(built, lambda _spec, _rank: COLUMNS)
    x = torch.randn(batch, tokens, k * q)
    close(Session(ir.to_proto(built).SerializeToString(), 1)({"x": x})["y0"], operator.product(EagerOps(), x))


@pytest.mark.parametrize("opset", [18, 20, 23, 25])
@pytest.mark.parametrize("flat", [False, True])
def test_a_turned_chain_is_emitted_and_said(opset: int, flat: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fixed(monkeypatch, last=10.0, first=7.0, turn=2.5)
    g = structured(CHAIN, {}, opset=18)
    x = torch.randn(2, 3, 6)
    expected = g.run({"x": x})["y"]
    (said,) = OnnxTarget().emit(g, tmp_path / "m.onnx", EmitOptions(opset, flat, (4, 64)))
    assert said.startswith("features come first from layer to layer: w1 . w2")
    kinds = [node.op_type for f in onnx.load(str(tmp_path / "m.onnx")).functions for node in f.node]
    assert flat or kinds.count("Transpose") >= 4
    close(OnnxTarget().open(tmp_path / "m.onnx", 1)({"x": x})["y"], expected)


def test_equal_operators_may_lie_differently(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One in a chain, one alone: two bodies of one operator, told apart by their overload."""
    fixed(monkeypatch, last=10.0, first=7.0, turn=2.5)
    text = (
        "g (float[B,S,6] x) => (float[B,S,6] y, float[B,S,8] z) { a = MatMul(x, w1)  h = Relu(a)  y = MatMul(h, w2)  z = MatMul(x2, w3) }"
    )
    text = text.replace("float[B,S,6] x)", "float[B,S,6] x, float[B,S,6] x2)")
    g = structured(text, {"w3": (6, 8)})
    feeds = {"x": torch.randn(2, 3, 6), "x2": torch.randn(2, 3, 6)}
    expected = g.run(feeds)
    OnnxTarget().emit(g, tmp_path / "m.onnx", EmitOptions(20, False, (4,)))
    overloads = [f.overload.rpartition("_")[2] for f in onnx.load(str(tmp_path / "m.onnx")).functions]
    assert sorted(overloads) == [COLUMNS, COLUMNS, "split"]
    found = OnnxTarget().open(tmp_path / "m.onnx", 1)(feeds)
    for name, value in expected.items():
        close(found[name], value)


def test_a_part_is_the_same_function_and_its_text_names_nothing() -> None:
    g, other = structured(CHAIN, {}), structured(CHAIN.replace("a =", "k =").replace("Add(a", "Add(k"), {})
    parts = []
    for each in (g, other):
        constants = Constants(20)
        (chain,) = layout._chains(layout._members(each.model, constants))
        parts.append((part(list(chain), layout.dims_of(chain, 3), constants, 20, 2), text(list(chain), constants)))
    assert parts[0][1] == parts[1][1]
    whole, _ = parts[0]
    attach(whole)
    check(whole)
    x = torch.randn(1, 3, 6)
    images = Session(ir.to_proto(whole).SerializeToString(), 1)({v.name or "": x for v in whole.graph.inputs})
    first, second = images.values()
    close(first, g.run({"x": x})["y"])
    assert not torch.allclose(first, second)  # else one copy of the weights could serve both, from the cache


def test_times_are_taken_as_they_are() -> None:
    """With nothing decreed: whatever is faster, every site has a lowering, and the chain is spoken of."""
    chosen, said = lowered(structured(CHAIN, {}))
    assert set(chosen) == {"w1", "w2"}
    assert said
