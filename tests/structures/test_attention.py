"""Attention's oracle against softmax(scale Q K^T + masks) V written out, and torch's own operator against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.backends.eager import EagerOps
from rewriter.backends.fx.custom_op import MAP
from rewriter.backends.fx.native import NATIVE
from rewriter.operator import flatten, unflatten
from rewriter.passes.structures.attention import Attention
from rewriter.tolerances import EQUAL
from tests.structures.attentions import FORMS, PLAIN, inputs

forms = pytest.mark.parametrize("name", FORMS)
sizes = pytest.mark.parametrize(("time", "keys"), [(4, 6), (1, 5), (7, 3), (1, 1)])


def close(got: Tensor, expected: Tensor) -> None:
    rtol, atol = EQUAL[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)


def written_out(form: Attention, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(form.heads // form.shared, 1) for x in (key, value))
    scores = form.scale * torch.einsum("bhtk,bhsk->bhts", query, key)
    if form.causal:
        time, keys = scores.shape[-2:]
        scores = scores.masked_fill(torch.arange(time)[:, None] < torch.arange(keys), -math.inf)
    for i, mask in enumerate(masks):
        scores = torch.where(mask, scores, form.hidden) if i == 0 and form.boolean else scores + mask
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhts,bhsv->bhtv", weights.nan_to_num(0.0) if form.empty == "zero" else weights, value)


@sizes
@forms
def test_naive(name: str, time: int, keys: int) -> None:
    form = FORMS[name]
    given = inputs(form, time, keys)
    (got,) = form.apply(EagerOps(), *given)
    close(got, written_out(form, *given))


def test_rows_that_see_nothing_are_what_the_form_says() -> None:
    """So that the tests that compare them compare something."""
    first = {name: form.apply(EagerOps(), *inputs(form))[0][0, 0, 0] for name, form in FORMS.items() if form.mask}
    for name, row in first.items():
        form = FORMS[name]
        mean = inputs(form)[2][0, 0].mean(0)
        expected = {"nan": mean * math.nan, "zero": mean * 0}.get(form.empty, mean)
        if form.empty or (form.hidden > -math.inf and not form.bias) or (not form.boolean and not form.bias):
            close(row, expected)


@sizes
@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torch_has_it_as_one_operator(name: str, dtype: torch.dtype, time: int, keys: int) -> None:
    form = FORMS[name]
    given = inputs(form, time, keys, dtype=dtype)
    (got,) = NATIVE["Attention"](form, *given)
    close(got, form.apply(EagerOps(), *given)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_torch_says_the_same(causal: bool) -> None:
    form = Attention(heads=4, shared=2, key=5, width=3, scale=5**-0.5, causal=causal)
    query, key, value = inputs(form)
    (got,) = form.apply(EagerOps(), query, key, value)
    close(got, F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True))


@forms
def test_spec_holds_it(name: str) -> None:
    leaves, spec = flatten(FORMS[name])
    assert not leaves
    assert unflatten(spec, leaves) == FORMS[name]


def test_shapes_are_those_of_the_first_input() -> None:
    """Masks may bring a batch of another name."""
    with torch._subclasses.FakeTensorMode():
        form = FORMS["added to all queries"]
        given = [torch.empty(x.shape) for x in inputs(form)[:3]]
        (got,) = MAP([*given, torch.empty(1, 1, 1, 6)], [], flatten(form)[1], "a")
        assert got.shape == (2, 4, 4, 3)


def test_cost_counts_both_products() -> None:
    heads, time = 4, 9
    cost = PLAIN.cost(time)
    assert cost.params == cost.nbytes == 0
    products = 2 * heads * time * time * (PLAIN.key + PLAIN.width)
    elementwise = 2 * heads * time * time  # scale and softmax
    assert cost.flops == products + elementwise
    assert FORMS["plain, grouped"].cost(time).flops == cost.flops
