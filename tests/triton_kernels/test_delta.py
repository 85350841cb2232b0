"""Delta rules and their relatives in Triton equal the step-by-step form in float64, at lengths that fill no chunk; nothing else is read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from rewriter.backends.kernels.plan import NotCovered
from rewriter.backends.triton_kernels import chain, delta
from rewriter.errors import RewriteError
from rewriter.operator import AbstractRecurrence
from rewriter.passes.structures.diagonal_recurrence import DiagonalRecurrence
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.passes.structures.retention import Retention
from tests.kernels.recurrent import given, inputs, recurrence, wanted
from tests.onnx.models import close
from tests.triton_kernels.test_chain import fenced


def ran(operator: AbstractRecurrence, xs: list[Tensor]) -> list[Tensor]:
    """On fenced inputs."""
    return delta.run(delta.covered(operator), [fenced(x) for x in given(operator, xs)])


def agree(operator: AbstractRecurrence, xs: list[Tensor]) -> None:
    for found, expected in zip(ran(operator, xs), wanted(operator, xs), strict=True):
        close(found, expected.to(found.dtype))


def taken(seeds: range) -> list[int]:
    """Those that are covered: matrices without a decay by key."""
    found = []
    for seed in seeds:
        try:
            delta.covered(recurrence(seed))
        except NotCovered:
            continue
        found.append(seed)
    return found


@pytest.mark.parametrize("seed", taken(range(50)))
def test_random_recurrences(seed: int) -> None:
    """Every rule and way to share heads, stored and moving decays, with and without a state."""
    operator = recurrence(seed)
    agree(operator, inputs(operator, 1 + seed % 2, 1 + seed % 13, seed))


@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("time", [1, 16, 17, 40])
def test_products_of_householder_factors(time: int, factors: int) -> None:
    """Chunks that end within a token: 16 sub-steps are no multiple of three factors."""
    operator = LinearAttention(2, 9, 5, 2, 2, factors=factors, decay="head", scale=0.5)
    agree(operator, inputs(operator, 1, time, time))


@pytest.mark.parametrize("dtype", chain.DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    operator = LinearAttention(2, 9, 5, 4, 1, factors=2, decay="head")
    xs = [x.to(dtype) for x in inputs(operator, 2, 20, 0)]
    out, state = delta.run(delta.covered(operator), xs)
    assert out.dtype == state.dtype == dtype
    for found, expected in zip((out, state), wanted(operator, xs), strict=True):
        close(found, expected.to(dtype))


@pytest.mark.parametrize("size", [32, 64])
def test_larger_chunks_as_on_a_device(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "chunk_of", lambda *_: size)
    operator = LinearAttention(1, 20, 40, 1, 1, factors=2, decay="head")
    agree(operator, inputs(operator, 1, 50, 3))


def correlated(time: int) -> list[Tensor]:
    """One key of length 1 all along, of which nothing is forgotten, and strengths of 2: a reflection at each token."""
    rng = torch.Generator().manual_seed(1)
    key = torch.nn.functional.normalize(torch.randn(1, 1, 9, generator=rng), dim=-1).expand(1, time, 9)
    q, v, state = torch.randn(1, time, 9, generator=rng), torch.randn(1, time, 5, generator=rng), torch.randn(1, 1, 9, 5, generator=rng)
    return [q / 3, key.contiguous(), v / 8, torch.full((1, time, 1), 2.0), state / 3]


def test_keys_that_are_all_alike() -> None:
    """Powers of the triangle, as in a Neumann series, grow to 1e8 here, where its inverse has entries of order one."""
    operator = LinearAttention(1, 9, 5, 1, 1)
    agree(operator, correlated(33))


def test_resets_forget_everything_and_lose_nothing() -> None:
    """Logarithms of minus infinity among small ones: differences of running sums would be rounding alone."""
    operator = LinearAttention(2, 9, 5, 2, 2, decay="head")
    xs = inputs(operator, 1, 30, 4)
    xs[3][0, [3, 9, 20]] = -torch.inf
    finite = [x.clamp_min(-1e4) if i == 3 else x for i, x in enumerate(xs)]
    for found, expected in zip(ran(operator, xs), wanted(operator, finite), strict=True):
        close(found, expected)


def test_in_two_pieces_as_in_one() -> None:
    operator = LinearAttention(2, 9, 5, 2, 2, factors=2, decay="head")
    xs = inputs(operator, 2, 21, 5)
    out, state = ran(operator, xs)
    first, between = ran(operator, [*[x[:, :8] for x in xs[:-1]], xs[-1]])
    second, last = ran(operator, [*[x[:, 8:] for x in xs[:-1]], between])
    close(torch.cat([first, second], 1), out)
    close(last, state)


def test_no_token_and_nobody() -> None:
    operator = LinearAttention(2, 5, 3, 2, 2)
    for batch in (2, 0):
        xs = inputs(operator, batch, 0, 0)
        out, state = ran(operator, xs)
        assert out.shape == (batch, 0, 6) and torch.equal(state, xs[-1])


def test_nan_stays_in_its_head_and_shows() -> None:
    """In a key, and in a decay, which the bound at a reset must not hide."""
    operator = LinearAttention(2, 5, 3, 2, 2, decay="head")
    for place, which in ((1, slice(0, 5)), (3, slice(0, 1))):
        xs = inputs(operator, 1, 20, 0)
        xs[place][0, 17, which] = torch.nan
        out, state = ran(operator, xs)
        assert out[0, 17:, :3].isnan().all() and not out[0, :16].isnan().any() and not out[0, :, 3:].isnan().any()
        assert state[0, 0].isnan().all() and not state[0, 1].isnan().any()


@pytest.mark.parametrize(
    ("operator", "said"),
    [
        (DiagonalRecurrence(6), "recurrences entry by entry have no kernel for a GPU"),
        (LinearAttention(2, 5, 3, 2, 2, decay="key"), "a decay for each entry of the key has no kernel for a GPU"),
        (LinearAttention(1, 257, 3, 1, 1), "keys of 257 numbers; kernels for a GPU keep states of up to 256 on chip"),
        (LinearAttention(4, 5, 3, 4, 3), "its sizes do not fit together"),
        (LinearAttention(4, 5, 3, 3, 4), "its sizes do not fit together"),
        (LinearAttention(2, 5, 3, 3, 2), "its sizes do not fit together"),
        (LinearAttention(2, 5, 0, 2, 2), "its sizes do not fit together"),
        (Retention(2, 5, 3, 2, 2, rule="plain", decay="", rates=torch.zeros(2)), "its sizes do not fit together"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_has_no_kernel(operator: AbstractRecurrence, said: str) -> None:
    with pytest.raises(NotCovered, match=said):
        delta.covered(operator)


def test_inputs_that_do_not_fit_are_refused() -> None:
    operator = LinearAttention(2, 5, 3, 2, 2, decay="head")
    of, xs = delta.covered(operator), inputs(operator, 2, 4, 0)
    wrong = [
        [x.double() for x in xs],
        [xs[0].half(), *xs[1:]],
        xs[:-1],
        [*xs[:-1], xs[-1][:1]],
        [xs[0], xs[1][:, :3], *xs[2:]],
        [xs[0], xs[1][..., :9], *xs[2:]],
        [xs[0][0], *xs[1:]],
        [],
    ]
    for tensors in wrong:
        with pytest.raises(RewriteError, match="the kernel takes inputs"):
            delta.run(of, tensors)


def test_chunks_are_as_long_as_the_chip_holds() -> None:
    of = delta.covered(LinearAttention(1, 128, 8, 1, 1, factors=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "interpreted", lambda: False)
        assert [delta.chunk_of(of, time, torch.bfloat16) for time in (1, 9, 30, 1000)] == [16, 32, 64, 64]
        assert delta.chunk_of(of, 1000, torch.float32) == delta.chunk_of(dataclasses.replace(of, key=200), 1000, torch.float16) == 32
    assert delta.chunk_of(of, 1000, torch.bfloat16) == 16
