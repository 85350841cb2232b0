"""Attention in ONNX: its spelling and its own operators against the oracle, in every opset and type; which one a file gets."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from rewriter.backends.eager import EagerOps
from rewriter.backends.onnx import lowering
from rewriter.backends.onnx.emit import attach, check
from rewriter.backends.onnx.lowering import chooser
from rewriter.backends.onnx.measure import measure_lowerings, stacked_maps
from rewriter.backends.onnx.run import Session
from rewriter.operator import flatten
from rewriter.passes.structures.attention import Attention
from rewriter.tolerances import EQUAL
from tests.structures.attentions import FORMS, PLAIN, inputs

LOWERED = [("naive", 18), ("naive", 25), ("contrib", 18), ("standard", 23), ("standard", 24), ("standard", 25)]
forms = pytest.mark.parametrize("name", FORMS)
lowered = pytest.mark.parametrize(("how", "opset"), LOWERED)


def built(form: Attention, how: str, opset: int, dtype: torch.dtype) -> ir.Model:
    model = stacked_maps([form], dtype)
    model.graph.opset_imports[""] = opset
    attach(model, lambda spec, rank: how)
    check(model)
    return model


def agrees(form: Attention, model: ir.Model, given: list[Tensor], library: str = "") -> None:
    (got,) = Session(ir.to_proto(model).SerializeToString(), 1, library=library)(dict(zip(form.inputs(), given, strict=True))).values()
    exact = [x.double() if x.is_floating_point() else x for x in given]
    rtol, atol = EQUAL[got.dtype]
    torch.testing.assert_close(got, form.apply(EagerOps(), *exact)[0].to(got.dtype), rtol=rtol, atol=atol, equal_nan=True)


@lowered
@forms
def test_bodies_equal_the_oracle(name: str, how: str, opset: int) -> None:
    """At sizes that the file leaves open; rows that see no key, and rows that add the lowest number everywhere, are among them."""
    form = FORMS[name]
    model = built(form, how, opset, torch.float32)
    (body,) = model.functions.values()
    own = {"standard": "Attention", "contrib": "MultiHeadAttention", "naive": "Softmax"}
    assert [name for name, kind in own.items() if kind in {node.op_type for node in body.all_nodes()}] == [how]
    for time, keys in [(4, 6), (1, 5), (7, 3)]:
        agrees(form, model, inputs(form, time, keys, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@lowered
@pytest.mark.parametrize("name", ["plain, grouped", "causal", "boolean, zero", "boolean, nan", "two, or infinite", "added to all queries"])
def test_other_types_get_what_is_right_for_them(name: str, how: str, opset: int, dtype: torch.dtype) -> None:
    form = FORMS[name]
    model = built(form, how, opset, dtype)
    (body,) = model.functions.values()
    halves = dtype == torch.float16 and (form.boolean or not form.mask)
    assert ("Attention" in [node.op_type for node in body.all_nodes()]) == (how == "standard" and halves)
    given = inputs(form, dtype=dtype)
    if form.mask and not form.boolean and not form.empty:
        given[3][0] = 0  # the lowest number of 16 bits leaves something of a score
    agrees(form, model, given)


def spec(**changes: object) -> str:
    return flatten(replace(PLAIN, **changes))[1]  # type: ignore[arg-type]


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a lowering takes, by the test's word."""
    table = {"naive": 3.0, "contrib": 2.0, "standard": 1.0}
    monkeypatch.setattr(lowering, "_chosen", {})
    monkeypatch.setattr(lowering, "measure_lowerings", lambda spec, rank, among, *_: [table[name] for name in among])
    return table


def test_the_fastest_is_taken_where_onnx_runtime_is_the_target(seconds: dict[str, float]) -> None:
    assert chooser((1,), 1, contrib=True, opset=22)(spec(), 0) == "contrib"
    assert chooser((1,), 1, contrib=True, opset=23)(spec(), 0) == "standard"
    seconds["naive"] = 0.5
    assert chooser((2,), 1, contrib=True, opset=23)(spec(), 0) == "naive"


def test_any_runtime_gets_the_standard_operator_once_there_is_one(seconds: dict[str, float]) -> None:
    seconds["naive"] = 0.5
    assert chooser((1,), 1, opset=22)(spec(), 0) == "naive"
    assert chooser((1,), 1, opset=23)(spec(), 0) == "standard"


def test_all_can_be_measured() -> None:
    form = spec(mask=("batch", 1, 1, "keys"), boolean=True, empty="zero")
    assert all(s > 0 for s in measure_lowerings(form, 0, ["naive", "standard", "contrib"], 4, 1, opset=23))
