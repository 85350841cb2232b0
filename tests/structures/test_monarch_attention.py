"""MonarchAttention against P = L R written out, its laws on padding, masks and shared heads; its body in ONNX."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from rewriter.backends.eager import EagerOps
from rewriter.backends.onnx.emit import attach, check
from rewriter.backends.onnx.measure import stacked_maps
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.tensors import onnx_dtype
from rewriter.operator import Dims
from rewriter.passes.structures.monarch_attention import MonarchAttention
from rewriter.tolerances import EQUAL
from tests.structures.inputs import generator

PLAIN = MonarchAttention(heads=2, shared=2, key=5, width=3, scale=0.5, block=4)
lengths = pytest.mark.parametrize("time", [1, 2, 4, 8, 11, 16, 17])


def close(got: Tensor, expected: Tensor) -> None:
    rtol, atol = EQUAL[got.dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol * max(1.0, float(expected.abs().max())))


def inputs(operator: MonarchAttention, time: int, batch: int = 2, seed: int = 0, sharp: float = 2.0) -> list[Tensor]:
    sizes = {"batch": batch, "time": time}
    shapes = [[n if isinstance(n, int) else sizes[n] for n in dims] for dims in list(operator.inputs().values())[:3]]
    return [sharp * torch.randn(shape, generator=generator(seed + i), dtype=torch.float64) for i, shape in enumerate(shapes)]


def applied(operator: MonarchAttention, *given: Tensor) -> Tensor:
    (found,) = operator.apply(EagerOps(), *given)
    assert isinstance(found, Tensor)
    return found


def matrix(operator: MonarchAttention, query: Tensor, key: Tensor, *mask: Tensor) -> Tensor:
    """P, (batch, heads, time, time): what comes out for V = I."""
    batch, time = query.shape[0], query.shape[2]
    eye = torch.eye(time, dtype=query.dtype).expand(batch, operator.shared, time, time)
    return applied(replace(operator, width=time), query, key, eye, *mask)


def softmax_attention(operator: MonarchAttention, query: Tensor, key: Tensor, hidden: Tensor | float = 0.0) -> Tensor:
    key = key.repeat_interleave(operator.heads // operator.shared, 1)
    return (operator.scale * query @ key.mT + hidden).softmax(-1)


def written_out(operator: MonarchAttention, query: Tensor, key: Tensor, shown: Tensor) -> Tensor:
    """P of one head, (time, time), by the equations with infinities; `shown` (time,) bool."""
    time, b = len(query), operator.block
    m = -(-time // b)
    q, k = (torch.zeros(m * b, x.shape[1], dtype=x.dtype) for x in (query, key))
    q[:time], k[:time] = operator.scale * query, key
    u = torch.zeros(m * b, dtype=q.dtype)
    u[:time] = shown.to(q.dtype)
    q, k, u = q.reshape(m, b, -1), k.reshape(m, b, -1), u.reshape(m, b)
    alive = u.sum(1) > 0
    L, R = torch.zeros(b, m, m, dtype=q.dtype), torch.zeros(m, b, b, dtype=q.dtype)  # L[j, k, l], R[k, j, i]
    for j in range(b):
        L[j] = torch.eye(m, dtype=q.dtype)
    for _ in range(operator.iterations):
        for c in range(m):
            for j in range(b):
                weight = u[:, j] * L[j, c]
                a = (weight[:, None] * q[:, j]).sum(0) / weight.sum() if weight.sum() > 0 else torch.zeros_like(q[0, 0])
                scores = (k[c] @ a).masked_fill(u[c] == 0, -torch.inf)
                R[c, j] = scores.softmax(0) if alive[c] else 1 / b
        L = torch.zeros_like(L)
        for j in range(b):
            for row in range(m):
                gains = torch.stack([q[row, j] @ (R[c, j] @ k[c]) - torch.xlogy(R[c, j], R[c, j]).sum() for c in range(m)])
                L[j, :, row] = gains.masked_fill(~alive, -torch.inf).softmax(0)
    P = torch.einsum("jkl,kji->ljki", L, R).reshape(m * b, m * b)
    return P[:time, :time]


@pytest.mark.parametrize("iterations", [1, 2, 3])
@lengths
def test_equals_the_product_written_out(time: int, iterations: int) -> None:
    operator = replace(PLAIN, iterations=iterations)
    query, key, _ = inputs(operator, time)
    found = matrix(operator, query, key)
    every = torch.ones(time, dtype=torch.bool)
    for b in range(2):
        for h in range(2):
            close(found[b, h].float(), written_out(operator, query[b, h], key[b, h], every).float())


@lengths
def test_equals_the_product_written_out_under_a_mask(time: int) -> None:
    operator = replace(PLAIN, mask=("batch", 1, 1, "time"))
    query, key, _ = inputs(operator, time)
    shown = torch.rand(2, time, generator=generator(7)) < 0.6
    shown[:, time // 2] = True
    found = matrix(operator, query, key, torch.where(shown, 0.0, -torch.inf).double()[:, None, None])
    for b in range(2):
        expected = written_out(operator, query[b, 0], key[b, 0], shown[b])
        close(found[b, 0][shown[b]].float(), expected[shown[b]].float())


@lengths
@pytest.mark.parametrize("block", [1, 20])
def test_exact_with_one_token_a_block_and_with_one_block(block: int, time: int) -> None:
    operator = replace(PLAIN, block=block, iterations=1)
    query, key, value = inputs(operator, time)
    close(applied(operator, query, key, value).float(), (softmax_attention(operator, query, key) @ value).float())


@pytest.mark.parametrize("block", [1, 20])
def test_exact_under_a_mask_too(block: int) -> None:
    operator = replace(PLAIN, block=block, mask=("batch", 1, 1, "time"))
    query, key, value = inputs(operator, 11)
    mask = torch.where(torch.rand(2, 1, 1, 11, generator=generator(3)) < 0.5, 0.0, -torch.inf).double()
    mask[..., 2] = -1.5  # a soft mask counts as it stands
    got = applied(replace(operator, iterations=1), query, key, value, mask)
    expected = softmax_attention(operator, query, key, mask) @ value
    for b in range(2):
        shown = mask[b, 0, 0].isfinite()
        close(got[b][:, shown].float(), expected[b][:, shown].float())


@lengths
def test_rows_sum_to_one_and_hidden_keys_get_nothing(time: int) -> None:
    operator = replace(PLAIN, mask=(1, 1, 1, "time"))
    query, key, _ = inputs(operator, time, sharp=6.0)
    shown = torch.arange(time) % 3 != 1
    for low in (-torch.inf, torch.finfo(torch.float64).min, -1e4):
        P = matrix(operator, query, key, torch.zeros(1, 1, 1, time).double().masked_fill(~shown, low))
        close(P.sum(-1).float(), torch.ones(P.shape[:-1]))
        assert (P >= 0).all()
        assert not P[..., ~shown].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("time", "longer"), [(7, 8), (8, 9), (9, 23), (2, 40)])
def test_hidden_tokens_change_nothing(time: int, longer: int, dtype: torch.dtype) -> None:
    query, key, value = (x.to(dtype) for x in inputs(PLAIN, longer))
    expected = applied(PLAIN, query[:, :, :time], key[:, :, :time], value[:, :, :time])
    mask = torch.zeros(1, 1, 1, longer, dtype=dtype)
    mask[..., time:] = -torch.inf
    got = applied(replace(PLAIN, mask=(1, 1, 1, "time")), query, key, value, mask)
    close(got[:, :, :time].float(), expected.float())


def test_shared_heads_are_repeated_heads() -> None:
    operator = MonarchAttention(heads=6, shared=2, key=5, width=3, scale=0.4, block=4)
    query, key, value = inputs(operator, 13)
    each = [x.repeat_interleave(3, 1) for x in (key, value)]
    close(applied(operator, query, key, value).float(), applied(replace(operator, shared=6), query, *each).float())


def test_one_step_more_is_no_worse() -> None:
    """Each half step maximises <P, S> + H(P), so that the Kullback-Leibler divergence from softmax(S) never grows."""
    query, key, _ = inputs(PLAIN, 16, sharp=1.5)
    exact = softmax_attention(PLAIN, query, key)
    found = [matrix(replace(PLAIN, iterations=steps), query, key) for steps in (1, 2, 4, 8)]
    distance = [float((torch.xlogy(P, P) - P * exact.log()).sum()) for P in found]
    assert distance == sorted(distance, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharp", [0.0, 1.0, 30.0])
def test_finite_where_scores_are_large_or_all_keys_hidden(sharp: float, dtype: torch.dtype) -> None:
    operator = replace(PLAIN, mask=("batch", 1, 1, "time"))
    query, key, value = (x.to(dtype) for x in inputs(operator, 11, sharp=sharp))
    mask = torch.zeros(2, 1, 1, 11, dtype=dtype)
    mask[0] = -torch.inf
    mask[1, ..., 5:] = torch.finfo(dtype).min
    assert applied(operator, query, key, value, mask).isfinite().all()


MASKS = [(), ("batch", 1, 1, "time"), (1, 4, 1, "time"), ("batch", 1, "time", "time")]


def hidden(axes: Dims, batch: int, time: int) -> list[Tensor]:
    """A mask with these axes that hides some keys, the same for every query; bool, true where a key is seen."""
    sizes = {"batch": batch, "time": time}
    shape = [n if isinstance(n, int) else sizes[n] for n in axes]
    return [(torch.rand(shape, generator=generator(1)) < 0.7).select(2, -1).unsqueeze(2).expand(shape)] if axes else []


@pytest.mark.parametrize("axes", MASKS[1:], ids=str)
def test_boolean_masks_are_additive_ones(axes: Dims) -> None:
    operator = replace(MonarchAttention.random(generator(0)), mask=axes)
    given, (shown,) = inputs(operator, 10), hidden(axes, 2, 10)
    expected = applied(operator, *given, torch.zeros(shown.shape).double().masked_fill(~shown, -torch.inf))
    close(applied(replace(operator, boolean=True), *given, shown), expected)


@pytest.mark.parametrize("opset", [18, 20, 23, 25])
@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("axes", MASKS, ids=str)
def test_body_equals_eager_at_every_length(axes: Dims, boolean: bool, opset: int) -> None:
    operator = replace(MonarchAttention.random(generator(0)), mask=axes, boolean=boolean)
    model = stacked_maps([operator])
    model.graph.opset_imports[""] = opset
    attach(model, lambda spec, rank: "blocks")
    check(model)
    session = Session(ir.to_proto(model).SerializeToString(), 1)
    for batch, time in ((1, 1), (2, 3), (2, 10), (3, 12)):
        masks = [m if boolean else torch.where(m, 0.0, -torch.inf) for m in hidden(axes, batch, time)]
        given = [*(x.float() for x in inputs(operator, time, batch)), *masks]
        got = session(dict(zip(operator.inputs(), given, strict=True)))
        close(got["output_0"], applied(operator, *given))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_body_in_other_types(dtype: torch.dtype) -> None:
    model = stacked_maps([PLAIN], dtype)
    attach(model, lambda spec, rank: "blocks")
    check(model)
    given = [x.to(dtype) for x in inputs(PLAIN, 10, sharp=1.0)]
    assert model.graph.inputs[0].dtype == onnx_dtype(dtype)
    got = Session(ir.to_proto(model).SerializeToString(), 1)(dict(zip(PLAIN.inputs(), given, strict=True)))
    close(got["output_0"], applied(PLAIN, *given))


def test_cost_grows_with_the_length_times_its_root() -> None:
    """Four times the tokens at twice the block: eight times the work, where softmax attention takes sixteen times."""
    operator = replace(PLAIN, key=64, width=64)
    short, long = (replace(operator, block=b).cost(b * b).flops for b in (32, 64))
    assert 7.5 < long / short < 8.5
    assert operator.cost(100).params == operator.cost(100).nbytes == 0
