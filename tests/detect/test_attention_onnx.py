"""Attention in ONNX, as exporters and other tools spell it: read as one form, replaced without a change, near misses refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.passes.detect.attention import detect
from rewriter.passes.structures.attention import Attention
from rewriter.tolerances import EQUAL
from tests.onnx.models import model

B, T, H, D = 2, 5, 4, 3
E = H * D
BASE: dict[str, Any] = {"heads": H, "shared": H, "key": D, "width": D, "scale": 1.0}
Q4 = "float[B,4,T,3] q, float[B,4,S,3] k, float[B,4,S,3] v"
INPUTS = f"{Q4}, float[B,1,T,S] m, bool[B,1,1,S] c"
ROWS = "float[B,T,12] q, float[B,S,12] k, float[B,S,12] v"
HALF = {"half": np.float32(0.5), "two": np.float32(2.0), "lowest": np.finfo("f").min, "never": np.float32(-np.inf), "one": np.float32(1.0)}
SIZES = {
    "to4": np.array([0, 0, 4, 3]), "to3": np.array([0, 0, 12]), "flat": np.array([-1, 5, 3]), "four": np.array([-1, 4, 5, 5]),
    "flatT": np.array([-1, 5, 5]), "back": np.array([-1, 4, 5, 3]), "at2": np.array([2]), "twice": np.array([1, 1, 2, 1, 1]),
    "joined": np.array([0, 4, -1, 3]), "thirds": np.array([12, 12, 12]), "last": np.array([-1]), "far": np.array([1 << 40]),
    "zero": np.array([0]), "before": np.array([-(1 << 40)]),
}  # fmt: skip

# the body, what it is read as, the inputs where they are not INPUTS
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "div": ("s = MatMul(q, kt) d = Div(s, two) p = Softmax<axis=-1>(d) y = MatMul(p, v)", {"scale": 0.5}),
    "mul, added": (
        "s = MatMul(q, kt) d = Mul(half, s) a = Add(d, m) p = Softmax<axis=-1>(a) y = MatMul(p, v)",
        {"scale": 0.5, "mask": ("batch", 1, "time", "keys"), "empty": "nan"},
    ),
    "where": (
        "s = MatMul(q, kt) d = Where(c, s, lowest) p = Softmax<axis=-1>(d) y = MatMul(p, v)",
        {"mask": ("batch", 1, 1, "keys"), "boolean": True, "hidden": float(np.finfo("f").min)},
    ),
    "where, turned": (
        "n = Not(c) s = MatMul(q, kt) d = Where(n, never, s) p = Softmax<axis=-1>(d) y = MatMul(p, v)",
        {"mask": ("batch", 1, 1, "keys"), "boolean": True, "empty": "nan"},
    ),
    "guarded": (
        """s = MatMul(q, kt) d = Where(c, s, never) p = Softmax<axis=-1>(d) i = IsNaN(p) z = Sub(one, one) g = Where(c, p, z)
           y = MatMul(g, v)""",
        {"mask": ("batch", 1, 1, "keys"), "boolean": True, "empty": "zero"},
    ),
    "both by the root of a size": (
        """h = Shape(q) l = Slice(h, last, far) w = Cast<to=1>(l) r = Sqrt(w) f = Div(one, r) g = Sqrt(f) a = Mul(q, g) b = Mul(kt, g)
           s = MatMul(a, b) p = Softmax<axis=-1>(s) y = MatMul(p, v)""",
        {"scale": D**-0.5},
    ),
    "einsum": (
        """s = Einsum<equation="bhtd,bhsd->bhts">(q, k) p = Softmax<axis=-1>(s) y = Einsum<equation="bhts,bhsd->bhtd">(p, v)""",
        {},
    ),
    "softmax over rows": (
        "qt = Transpose<perm=[0,1,3,2]>(q) s = MatMul(k, qt) p = Softmax<axis=2>(s) t = Transpose<perm=[0,1,3,2]>(p) y = MatMul(t, v)",
        {},
    ),
    "dropout": ("s = MatMul(q, kt) p = Softmax<axis=-1>(s) d = Dropout(p) y = MatMul(d, v)", {}),
}
OWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "packed": (
        f"float[B,T,{3 * E}] x",
        """a, b, c = Split<axis=-1>(x, thirds) q = Reshape(a, to4) k = Reshape(b, to4) v = Reshape(c, to4)
           qh = Transpose<perm=[0,2,1,3]>(q) kh = Transpose<perm=[0,2,3,1]>(k) vh = Transpose<perm=[0,2,1,3]>(v)
           s = MatMul(qh, kh) p = Softmax<axis=-1>(s) o = MatMul(p, vh) t = Transpose<perm=[0,2,1,3]>(o) y = Reshape(t, to3)""",
        {},
    ),
    "three axes": (
        "float[B,4,5,3] q, float[B,4,5,3] k, float[B,4,5,3] v, float[B,1,1,5] m",
        """a = Reshape(q, flat) b = Reshape(k, flat) c = Reshape(v, flat) bt = Transpose<perm=[0,2,1]>(b) s = MatMul(a, bt)
           s4 = Reshape(s, four) n = Add(s4, m) p = Softmax<axis=-1>(n) p3 = Reshape(p, flatT) o = MatMul(p3, c) y = Reshape(o, back)""",
        {"mask": ("batch", 1, 1, "keys"), "empty": "nan"},
    ),
    "Expand": (
        "float[B,4,T,3] q, float[B,2,S,3] k, float[B,2,S,3] v",
        """ku = Unsqueeze(k, at2) ke = Expand(ku, twice) kr = Reshape(ke, joined) vu = Unsqueeze(v, at2) ve = Expand(vu, twice)
           vr = Reshape(ve, joined) kt = Transpose<perm=[0,1,3,2]>(kr) s = MatMul(q, kt) p = Softmax<axis=-1>(s) y = MatMul(p, vr)""",
        {"shared": 2},
    ),
    "Tile": (
        "float[B,4,T,3] q, float[B,2,S,3] k, float[B,2,S,3] v",
        """ku = Unsqueeze(k, at2) ke = Tile(ku, twice) kr = Reshape(ke, joined) vu = Unsqueeze(v, at2) ve = Tile(vu, twice)
           vr = Reshape(ve, joined) kt = Transpose<perm=[0,1,3,2]>(kr) s = MatMul(q, kt) p = Softmax<axis=-1>(s) y = MatMul(p, vr)""",
        {"shared": 2},
    ),
    "Concat": (
        "float[B,4,T,3] q, float[B,2,S,3] k, float[B,2,S,3] v",
        """ku = Unsqueeze(k, at2) ke = Concat<axis=2>(ku, ku) kr = Reshape(ke, joined) vu = Unsqueeze(v, at2) ve = Concat<axis=2>(vu, vu)
           vr = Reshape(ve, joined) kt = Transpose<perm=[0,1,3,2]>(kr) s = MatMul(q, kt) p = Softmax<axis=-1>(s) y = MatMul(p, vr)""",
        {"shared": 2},
    ),
    "Gemm": (
        "float[T,3] q, float[S,3] k, float[S,3] v",
        "s = Gemm<alpha=0.5, transB=1>(q, k) p = Softmax<axis=-1>(s) y = MatMul(p, v)",
        {"heads": 1, "shared": 1, "scale": 0.5},
    ),
}
WHOLE: dict[str, tuple[int, str, str, dict[str, Any]]] = {
    "Attention": (23, INPUTS, "y = Attention<scale=0.5>(q, k, v)", {"scale": 0.5}),
    "Attention, causal": (23, INPUTS, "y = Attention<is_causal=1>(q, k, v)", {"scale": D**-0.5, "causal": True}),
    "Attention, boolean": (
        25,
        "float[B,4,T,3] q, float[B,4,S,3] k, float[B,4,S,3] v, bool[B,1,T,S] c",
        "y = Attention(q, k, v, c)",
        {"scale": D**-0.5, "mask": ("batch", 1, "time", "keys"), "boolean": True, "empty": "zero"},
    ),
    "Attention, three axes, groups": (
        23,
        "float[B,T,12] q, float[B,S,6] k, float[B,S,6] v",
        "y = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)",
        {"scale": D**-0.5, "shared": 2},
    ),
    "MultiHeadAttention, one head": (
        20,
        f"{ROWS}, float[B,1,T,S] m",
        "y = com.microsoft.MultiHeadAttention<num_heads=1>(q, k, v, , , m)",
        {"heads": 1, "shared": 1, "key": E, "width": E, "scale": E**-0.5, "mask": ("batch", 1, "time", "keys"), "empty": "nan"},
    ),
    "MultiHeadAttention": (
        20,
        f"{ROWS}, float[B,1,T,S] m",
        "y = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, , , m)",
        {"scale": D**-0.5, "mask": ("batch", 1, "time", "keys"), "empty": "nan"},
    ),
}
NAMES = [*PLAIN, *OWN, *WHOLE]


def graph(inputs: str, body: str, opset: int = 20) -> OnnxGraph:
    kt = "kt = Transpose<perm=[0,1,3,2]>(k) " if "kt" in body and "kt =" not in body else ""
    weights = {name: array for name, array in {**HALF, **SIZES}.items() if name in body}
    first = inputs.partition("]")[0]
    y = {2: "T,3", 3: "B,T,12"}.get(first.count(",") + 1, "B,4,T,3")
    return OnnxGraph(model(f"g ({inputs}) => (float[{y}] y) {{ {kt}{body} }}", opset, weights))


def case(name: str) -> tuple[OnnxGraph, dict[str, Any]]:
    if name in PLAIN:
        return graph(INPUTS, PLAIN[name][0]), PLAIN[name][1]
    if name in OWN:
        return graph(*OWN[name][:2]), OWN[name][2]
    opset, inputs, body, expected = WHOLE[name]
    return graph(inputs, body, opset), expected


def feeds(g: OnnxGraph, keys: int = 6) -> dict[str, Tensor]:
    sizes = {"B": B, "T": T, "S": keys}
    rng = torch.Generator().manual_seed(0)
    found = {}
    for spec in g.specs():
        x = torch.randn([n if isinstance(n, int) else sizes[n] for n in spec.dims], generator=rng)
        found[spec.name] = x > -1 if spec.dtype == "bool" else x
    return found


@pytest.mark.parametrize("name", NAMES)
def test_spelling(name: str) -> None:
    g, changes = case(name)
    (site,) = detect(g)
    expected = Attention(**{**BASE, **changes})
    assert isinstance(site.form, Attention), site.reason
    assert site.form.scale == pytest.approx(expected.scale)
    assert {**vars(site.form), "scale": 0} == {**vars(expected), "scale": 0}
    assert site.region is not None and g.can_splice(site.region) == ""
    before = g.run(feeds(g))
    g.splice(site, site.form)
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(g.run(feeds(g)), before, rtol=rtol, atol=atol, equal_nan=True)


REFUSED: dict[str, tuple[int, str, str, str]] = {
    "shapes that nothing knows": (
        20,
        Q4,
        "s = com.microsoft.FusedMatMul<transB=1>(q, k) p = Softmax<axis=-1>(s) y = MatMul(p, v)",
        "the shape of its scores is unknown",
    ),
    "keys flipped by a slice": (
        20,
        "float[2,4,5,3] q, float[2,4,5,3] k, float[2,4,5,3] v",
        "t = Transpose<perm=[0,1,3,2]>(k) f = Slice(t, last, before, last, last) s = MatMul(q, f) p = Softmax<axis=-1>(s) y = MatMul(p, v)",
        "it looks like attention and computes something else",
    ),
    "a mask multiplied": (
        20,
        INPUTS,
        "s = MatMul(q, kt) d = Mul(s, m) p = Softmax<axis=-1>(d) y = MatMul(p, v)",
        "its scores are multiplied by what is not one number",
    ),
    "the wrong axis": (
        20,
        INPUTS,
        "s = MatMul(q, kt) p = Softmax<axis=1>(s) y = MatMul(p, v)",
        "the product after its softmax does not sum over the softmax's axis",
    ),
    "a cache": (
        23,
        f"{Q4}, float[B,4,P,3] a",
        "y, pk, pv = Attention(q, k, v, , a, a)",
        "it holds a cache, a window or a cap",
    ),
    "a cap": (23, INPUTS, "y = Attention<softcap=5.0>(q, k, v)", "it holds a cache, a window or a cap"),
    "a window": (25, INPUTS, "y = Attention<left_window_size=2>(q, k, v)", "it holds a cache, a window or a cap"),
    "heads that vary": (
        23,
        "float[B,H,T,3] q, float[B,H,S,3] k, float[B,H,S,3] v",
        "y = Attention(q, k, v)",
        "its result cannot be told apart by batch, heads and tokens",
    ),
    "groups that vary": (23, "float[B,4,T,3] q, float[B,G,S,3] k, float[B,G,S,3] v", "y = Attention(q, k, v)", "its heads cannot be told"),
    "widths that vary": (
        20,
        "float[B,4,T,D] q, float[B,4,D,S] k, float[B,4,S,3] v",
        "s = MatMul(q, k) p = Softmax<axis=-1>(s) y = MatMul(p, v)",
        "its heads or their widths vary",
    ),
    "causal and masked": (23, INPUTS, "y = Attention<is_causal=1>(q, k, v, m)", "it is causal and has a mask, too"),
    "causal from the last": (
        20,
        ROWS,
        "y = com.microsoft.MultiHeadAttention<num_heads=4, unidirectional=1>(q, k, v)",
        "its causal mask is counted from the last query",
    ),
    "padding inside": (
        20,
        f"{ROWS}, int32[B,S] n",
        "y = com.microsoft.MultiHeadAttention<num_heads=4>(q, k, v, , n)",
        "it holds more than attention",
    ),
    "projections inside": (
        20,
        "float[B,T,12] x, float[12,36] w, float[36] b",
        "y = com.microsoft.Attention<num_heads=4>(x, w, b)",
        "it holds more than attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_near_misses_are_listed_with_the_reason(name: str) -> None:
    opset, inputs, body, reason = REFUSED[name]
    (site,) = detect(graph(inputs, body, opset))
    assert reason in site.reason
    assert site.form is None and site.region is None


def test_queries_are_the_axis_that_varies() -> None:
    body = 's = Einsum<equation="bthd,bsd->bths">(q, k) p = Softmax<axis=-1>(s) y = Einsum<equation="bths,bsd->bthd">(p, v)'
    g = OnnxGraph(model(f"g (float[B,T,4,3] q, float[B,S,3] k, float[B,S,3] v) => (float[B,T,4,3] y) {{ {body} }}", 20))
    (site,) = detect(g)
    assert site.form == Attention(**{**BASE, "shared": 1}), site.reason


def test_several_sizes_that_vary() -> None:
    """What stands there afterwards takes any batch and any length."""
    g, _ = case("mul, added")
    (site,) = detect(g)
    assert isinstance(site.form, Attention)
    expected = {keys: g.run(feeds(g, keys)) for keys in (1, 6, 9)}
    g.splice(site, site.form)
    rtol, atol = EQUAL[torch.float32]
    for keys, before in expected.items():
        torch.testing.assert_close(g.run(feeds(g, keys)), before, rtol=rtol, atol=atol)
