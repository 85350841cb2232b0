"""ONNX's own LinearAttention, in both domains: read by its attributes, and the same under ONNX Runtime once it is raised."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from rewriter import rewrite
from rewriter.backends.files.onnx_file import load_onnx
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.passes.detect.recurrence import detect
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.tolerances import EQUAL

BATCH, TIME, KEY, WIDTH = 2, 5, 4, 3
RULES = ("linear", "gated", "delta", "gated_delta")


def model(
    domain: str, rule: str, queries: int = 2, heads: int = 2, per_key: bool = False, state: bool = False, beta: int = 0, **options: Any
) -> onnx.ModelProto:
    widths = {"query": queries * KEY, "key": heads * KEY, "value": heads * WIDTH}
    widths |= {"decay": heads * KEY if per_key else heads} if "gated" in rule else {}
    widths |= {"beta": beta or heads} if "delta" in rule else {}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "time", n]) for name, n in widths.items()]
    if state:
        inputs.append(helper.make_tensor_value_info("state", TensorProto.FLOAT, ["batch", heads, KEY, WIDTH]))
    named = [x if x in widths or (x == "state" and state) else "" for x in ("query", "key", "value", "state", "decay", "beta")]
    node = helper.make_node(
        "LinearAttention", named, ["y", "last"], domain=domain, q_num_heads=queries, kv_num_heads=heads, update_rule=rule, **options
    )
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "time", max(queries, heads) * WIDTH])]
    outputs.append(helper.make_tensor_value_info("last", TensorProto.FLOAT, ["batch", heads, KEY, WIDTH]))
    opsets = [helper.make_opsetid("", 27), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets, ir_version=11)


def run(path: str, time: int) -> list[Any]:
    session, rng = onnxruntime.InferenceSession(path), np.random.default_rng(time)
    sizes = {"batch": BATCH, "time": time}
    feeds = {x.name: rng.standard_normal([sizes.get(n, n) for n in x.shape]).astype("float32") for x in session.get_inputs()}
    feeds |= {"decay": -abs(feeds["decay"])} if "decay" in feeds else {}
    return list(session.run(None, feeds))


CASES: dict[str, dict[str, Any]] = {
    **{rule: {"rule": rule} for rule in RULES},
    "grouped": {"rule": "delta", "queries": 4},
    "per-key": {"rule": "gated", "per_key": True},
    "per-key-delta": {"rule": "gated_delta", "per_key": True},
    "from-a-state": {"rule": "gated_delta", "state": True},
    "scaled": {"rule": "linear", "scale": 0.25},
    "default-scale": {"rule": "linear", "scale": 0.0},
}


@pytest.mark.parametrize("domain", ["", "com.microsoft"], ids=["standard", "microsoft"])
@pytest.mark.parametrize("name", CASES)
def test_a_node_is_raised(domain: str, name: str, tmp_path: Any) -> None:
    before, after = str(tmp_path / "before.onnx"), str(tmp_path / "after.onnx")
    onnx.save(model(domain, **CASES[name]), before)
    result = rewrite(before, "raise-recurrence", out=after, force=True)
    (site,) = result.report.sites
    assert site.status == "rewritten", site.reason
    held = {node.op_type for node in onnx.load(after).graph.node if node.domain == domain}
    assert "LinearAttention" not in held
    for time in (1, TIME, 70):
        for a, b in zip(run(after, time), run(before, time), strict=True):
            np.testing.assert_allclose(a, b, *EQUAL[torch.float32])


def test_a_beta_that_all_heads_share_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model("", "delta", beta=1), path)
    (site,) = detect(OnnxGraph(load_onnx(path)))
    assert site.form is None and "whose beta is not (batch, time, 2)" in site.reason


def test_a_window_of_states_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model("com.microsoft", "linear", state_window=4), path)
    (site,) = detect(OnnxGraph(load_onnx(path)))
    assert site.form is None and "more than one state" in site.reason


def test_heads_that_share_keys_are_read(tmp_path: Any) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model("", "delta", queries=4), path)
    (site,) = detect(OnnxGraph(load_onnx(path)))
    assert isinstance(site.form, LinearAttention) and (site.form.queries, site.form.heads, site.form.keys) == (4, 2, 2)
