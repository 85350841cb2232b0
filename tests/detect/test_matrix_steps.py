"""Delta rules as papers write them, with the transition I - beta k k^T as a matrix: read as the delta rules that they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.passes.structures.linear_attention import LinearAttention
from tests.detect.loops import to_onnx
from tests.detect.test_probed import B, N, T, graph
from tests.detect.test_recurrence import equal, only, raised

HEADS, WIDTH = 3, 5
Write = Callable[..., Tensor]


def column(x: Tensor) -> Tensor:
    return x[..., :, None]


def row(x: Tensor) -> Tensor:
    return x[..., None, :]


def factor(k: Tensor, beta: Tensor) -> Tensor:
    return torch.eye(N) - column(beta) * column(k) * row(k)


def plain(s: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return factor(k, beta) @ s + column(beta) * column(k) * row(v)


def products(s: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return (torch.eye(N) - column(beta) * (column(k) @ row(k))) @ s + column(beta) * (column(k) @ row(v))


def einsums(s: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    p = torch.eye(N) - torch.einsum("bhi,bhj->bhij", beta * k, k)
    return torch.einsum("bhij,bhjv->bhiv", p, s) + torch.einsum("bhi,bhv->bhiv", beta * k, v)


def written_last(s: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return factor(k, beta) @ s + column(k) * row(beta * v)


def in_turn(s: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    for j in range(2):
        s = plain(s, k[:, j], v[:, j], beta[:, j])
    return s


def at_once(s: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    first, second = (factor(k[:, j], beta[:, j]) for j in range(2))
    first_write, second_write = (column(beta[:, j] * k[:, j]) * row(v[:, j]) for j in range(2))
    return second @ first @ s + second @ first_write + second_write


def step(write: Write, by_key: bool = False) -> Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Tensor]]:
    def body(s: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, v, beta = x
        s = write(s, k, v, beta)
        return s, (s.transpose(-1, -2) @ column(k if by_key else q)).squeeze(-1)

    return body


def inputs(factors: int) -> tuple[Tensor, ...]:
    lead = (T, B, factors, HEADS) if factors > 1 else (T, B, HEADS)
    g = torch.Generator().manual_seed(0)
    beta = torch.rand(*lead, 1, generator=g)
    q, k, v = (torch.randn(*shape, generator=g) for shape in ((T, B, HEADS, N), (*lead, N), (*lead, WIDTH)))
    return torch.randn(B, HEADS, N, WIDTH, generator=g), q, torch.nn.functional.normalize(k, dim=-1), v, beta


@pytest.mark.parametrize("onnx", [False, True], ids=["torch", "onnx"])
@pytest.mark.parametrize(
    ("write", "factors"),
    [(plain, 1), (products, 1), (einsums, 1), (written_last, 1), (in_turn, 2), (at_once, 2)],
    ids=lambda given: getattr(given, "__name__", ""),
)
def test_a_transition_that_is_a_matrix_is_seen_through(write: Write, factors: int, onnx: bool) -> None:
    given = inputs(factors)
    g = graph(step(write), given)
    read = OnnxGraph(to_onnx(g.program)) if onnx else g
    site = only(read)
    assert isinstance(site.form, LinearAttention), site.reason
    assert (site.form.rule, site.form.factors, site.form.key, site.form.width) == ("delta", factors, N, WIDTH)
    equal(read, raised(read), dict(zip("sqkvb", given, strict=True)))


def test_a_query_may_be_the_key() -> None:
    given = inputs(1)
    g = graph(step(plain, by_key=True), given)
    equal(g, raised(g), dict(zip("sqkvb", given, strict=True)))


def test_a_transition_that_is_no_product_of_factors_is_listed() -> None:
    """A matrix for every step: nothing smaller is behind it."""

    def body(s: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        q, p, k, v = x
        s = (torch.eye(N) - p) @ s + column(k) * row(v)
        return s, (s.transpose(-1, -2) @ column(q)).squeeze(-1)

    s, q, k, v, _ = inputs(1)
    site = only(graph(body, (s, q, torch.rand(T, B, HEADS, N, N), k, v)))
    assert site.form is None and "a linear state" in site.reason


def test_factors_of_sequences_of_their_own_are_told_to_be_stacked() -> None:
    def body(s: Tensor, x: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        q, *factors = x
        for j in range(2):
            s = plain(s, *factors[3 * j : 3 * j + 3])
        return s, (s.transpose(-1, -2) @ column(q)).squeeze(-1)

    s, q, *one = inputs(1)
    site = only(graph(body, (s, q, *one, *(torch.rand_like(x) for x in one))))
    assert site.form is None and "several factors are stacked along an axis of one" in site.reason
