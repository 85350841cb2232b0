"""Attention in torch: every spelling is read as one form, and its place taken by that form nothing changes; near misses are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.graph import Site
from rewriter.passes.detect.attention import detect
from rewriter.passes.structures.attention import Attention
from rewriter.tolerances import EQUAL
from tests.detect.attentions import (
    BASE,
    CAUSAL,
    LOWEST,
    SPELLINGS,
    D,
    E,
    H,
    T,
    flat,
    heads,
    linears,
    operands,
    out,
    parts,
    plain,
    scores,
    seen,
)
from tests.fx.models import BATCH, OTHER, Net, close, graph, normal

X = normal(BATCH, T, E)
FEEDS = {"x": normal(OTHER, T, E, seed=3)}
ALL = list(SPELLINGS)


@pytest.fixture(scope="module")
def together() -> tuple[Any, dict[str, Site], list[Tensor]]:
    """One graph of every spelling, its sites by spelling (each has one, and they come in order), and what it gives."""
    g = graph(Net(lambda s, x: [function(s, x) for function, _ in SPELLINGS.values()], **parts()), X)
    return g, dict(zip(ALL, detect(g), strict=True)), list(g.run(FEEDS).values())


@pytest.mark.parametrize("name", ALL)
def test_spelling(name: str, together: tuple[Any, dict[str, Site], list[Tensor]]) -> None:
    g, sites, before = together
    site, expected = sites[name], Attention(**{**BASE, **SPELLINGS[name][1]})
    assert isinstance(site.form, Attention), site.reason
    assert site.form.scale == pytest.approx(expected.scale)
    assert {**vars(site.form), "scale": 0} == {**vars(expected), "scale": 0}
    assert site.region is not None and g.can_splice(site.region) == ""
    g.splice(site, site.form)
    after = list(g.run(FEEDS).values())
    g.restore(site)
    for i, (now, then) in enumerate(zip(after, before, strict=True)):
        rtol, atol = EQUAL[torch.float32] if i == ALL.index(name) else (0.0, 0.0)
        torch.testing.assert_close(now, then, rtol=rtol, atol=atol, equal_nan=True)


def test_reason_says_what_was_read(together: tuple[Any, dict[str, Site], list[Tensor]]) -> None:
    _, sites, _ = together
    assert sites["repeat_kv"].reason == "softmax attention, 4 heads of 3 on 2: fuse-attention makes it one operation"
    assert "mask added, bias added" in sites["two added"].reason
    assert "masked" in sites["masked_fill"].reason and "causal" in sites["sdpa, causal"].reason


def masked_weights(mask: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return operands(lambda q, k, v: out(mask((q @ k.mT).softmax(-1)) @ v))


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "softmax over the queries": (operands(lambda q, k, v: out((q @ k.mT).softmax(-2) @ v)), "does not sum over the softmax's axis"),
    "softmax over the heads": (operands(lambda q, k, v: out((q @ k.mT).softmax(1) @ v)), "does not sum over the softmax's axis"),
    "weights transposed": (operands(lambda q, k, v: out((q @ k.mT).softmax(-1).mT @ v)), "does not sum over the softmax's axis"),
    "a mask multiplied": (scores(lambda s, x, z: z * s.square), "its scores are multiplied by what is not one number"),
    "a scale for each head": (scores(lambda s, x, z: z / s.per_head[:, :1, :1]), "its scores are divided by what is not one number"),
    "a mask subtracted": (scores(lambda s, x, z: z - s.square), "something is subtracted from its scores"),
    "a scale by chance": (scores(lambda s, x, z: z * torch.rand([])), "its scores are multiplied by what is not one number"),
    "a mask added twice": (scores(lambda s, x, z: torch.add(z, s.square, alpha=2)), "something is subtracted from its scores"),
    "scores rounded": (scores(lambda s, x, z: torch.div(z, 2, rounding_mode="floor")), "its scores are divided by what is not one number"),
    "scores as integers": (scores(lambda s, x, z: z.int().float() * 1.0), "cast stands between the product and the softmax"),
    "a mask that repeats": (
        lambda s, x: ((s.q(x[0]) @ s.k(x[0]).mT) + x[:, :, :T]).softmax(-1) @ s.v(x),
        "a mask repeats its scores along an axis",
    ),
    "a sum of the keys' own": (
        operands(lambda q, k, v: out(torch.einsum("bhtd,bhse->bhts", q, k).softmax(-1) @ v)),
        "the product before its softmax is none of queries and keys",
    ),
    "softmax over what both have": (
        operands(lambda q, k, v: torch.einsum("bhts,bhd->btsd", (q @ k.mT).softmax(1), v[:, :, 0])),
        "its softmax is over no axis of the keys alone",
    ),
    "heads summed": (
        operands(lambda q, k, v: torch.einsum("bhts,bhsd->btd", (q @ k.mT).softmax(-1), v)),
        "does not sum over the softmax's axis",
    ),
    "weights squared": (operands(lambda q, k, v: (lambda p: p @ p)((q @ k.mT).softmax(-1))), "does more than weigh values"),
    "added to the result": (
        flat(lambda s, x, q, k, v: torch.baddbmm(q, (q @ k.mT).softmax(-1), v)),
        "the product after its softmax does more than weigh values",
    ),
    "keys of one item": (
        lambda s, x: plain(heads(s.q(x)), heads(s.k(x[:1])), heads(s.v(x[:1]))),
        "its keys and values cannot be told apart by batch, heads and tokens",
    ),
    "a mask scaled": (scores(lambda s, x, z: (z + s.square) * 0.5), "its scores are scaled after a mask was added"),
    "scores turned round": (scores(lambda s, x, z: (z + s.square) * -1.0), "its scores are scaled after a mask was added"),
    "a cap": (scores(lambda s, x, z: z.tanh() + s.square), "tanh stands between the product and the softmax"),
    "a rectifier": (scores(lambda s, x, z: z.relu().reshape(-1, H, T, T) + s.square), "relu stands between the product and the softmax"),
    "weights masked": (masked_weights(lambda p: p * CAUSAL), "mul stands between the softmax and the product"),
    "weights rounded": (masked_weights(lambda p: p.masked_fill(~CAUSAL, 0.5)), "masked_fill stands between the softmax and the product"),
    "weights hidden": (masked_weights(lambda p: p.masked_fill(~CAUSAL, 0.0)), "it looks like attention and computes something else"),
    "weights hidden by the input": (
        lambda s, x: out((heads(s.q(x)) @ heads(s.k(x)).mT).softmax(-1).masked_fill(~seen(x), 0.0) @ heads(s.v(x))),
        "it depends on more than its queries, keys, values and masks",
    ),
    "three masks": (scores(lambda s, x, z: z + s.square + s.per_head + x[:, None, :, :T]), "it has 0 boolean masks and 3 that are added"),
    "two boolean masks": (
        scores(lambda s, x, z: z.masked_fill(~CAUSAL, -math.inf).masked_fill(~seen(x), -math.inf)),
        "it has 2 boolean masks and 0 that are added",
    ),
    "hidden keys that count": (scores(lambda s, x, z: z.masked_fill(~seen(x), -1e9)), "a hidden key scores -1e+09"),
    "hidden keys that count a little": (scores(lambda s, x, z: z.masked_fill(~CAUSAL, -5.0)), "a hidden key scores -5"),
    "hidden and then added": (
        scores(lambda s, x, z: torch.where(seen(x), z + x[:, None, :, :T], LOWEST)),
        "a hidden key scores -3.40282e+38",
    ),
    "hidden by a tensor": (scores(lambda s, x, z: torch.where(CAUSAL, z, s.square)), "its hidden keys do not all score one number"),
    "a mask in double": (scores(lambda s, x, z: (z + s.square.double()).float()), "a mask of another type is added to its scores"),
    "values in double": (
        operands(lambda q, k, v: (q @ k.mT).softmax(-1).double() @ v.double()),
        "its operands are of types float32, float64",
    ),
    "windows of a mask": (
        scores(lambda s, x, z: (z.view(-1, 2, H, T, T) + s.per_head[:2, None]).view(-1, H, T, T)),
        "its mask cannot be told apart by batch, heads, queries and keys",
    ),
    "sdpa, a mask of the input": (
        lambda s, x: out(torch.nn.functional.scaled_dot_product_attention(*map(heads, linears(s, x)), attn_mask=x[:, None, :, :T])),
        "its mask may be -inf in a whole row, which it makes zero",
    ),
    "sdpa, five axes": (
        operands(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])),
        "the shapes of its inputs are unknown or of different ranks",
    ),
    "sdpa, dropout": (
        operands(lambda q, k, v: out(torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5))),
        "it drops weights at random",
    ),
}


@pytest.fixture(scope="module")
def refused() -> dict[str, Site]:
    """The one site of each, in order."""
    g = graph(Net(lambda s, x: [function(s, x) for function, _ in REFUSED.values()], **parts()), X)
    return dict(zip(REFUSED, detect(g), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_near_misses_are_listed_with_the_reason(name: str, refused: dict[str, Site]) -> None:
    site = refused[name]
    assert REFUSED[name][1] in site.reason
    assert site.form is None and site.region is None and site.kind == "attention" and site.places


NONE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scores alone": lambda s, x: (x @ x.mT).softmax(-1),
    "softmax of a linear": lambda s, x: s.k1(x).softmax(-1),
    "gates": lambda s, x: s.k1(x).softmax(-1) @ s.v1(x).mT,
    "between linears": lambda s, x: s.q(s.k(x).softmax(-1)),
}


@pytest.mark.parametrize("name", NONE)
def test_other_softmaxes_are_no_sites(name: str) -> None:
    assert list(detect(graph(Net(NONE[name], **parts()), X))) == []


@pytest.mark.parametrize("causal", [False, True])
def test_taken_apart_by_torch(causal: bool) -> None:
    """Core aten spells SDPA with scales on both sides and a guard for empty rows."""
    from rewriter.backends.fx.graph import FxGraph
    from tests.fx.models import export

    def attend(s: Any, x: Tensor) -> Tensor:
        q, k, v = map(heads, linears(s, x))
        mask = None if causal else seen(x)
        return out(torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal))

    program = export(Net(attend, **parts()), X)
    g = FxGraph.of(program.run_decompositions())
    (site,) = detect(g)
    assert isinstance(site.form, Attention), site.reason
    assert (site.form.empty, site.form.boolean, site.form.scale) == ("" if causal else "zero", True, pytest.approx(D**-0.5))
    before = g.run(FEEDS)
    g.splice(site, site.form)
    for name, value in g.run(FEEDS).items():
        close(value, before[name])


def test_a_result_that_is_read_twice_is_given_as_it_is() -> None:
    """Not as what one of its readers makes of it: the other one would keep the products."""
    function = flat(lambda s, x, q, k, v: (lambda y: y + y.view(-1, H, T, D).flatten(0, 1) * 2)((q @ k.mT).softmax(-1) @ v))
    g = graph(Net(function, **parts()), X)
    (site,) = detect(g)
    assert isinstance(site.form, Attention) and site.region is not None and site.region.outputs[0] is not None, site.reason
    assert g.op(g.producer(site.region.outputs[0].value)) == "matmul"
    before = g.run(FEEDS)
    g.splice(site, site.form)
    for name, value in g.run(FEEDS).items():
        close(value, before[name])


def test_lengths_that_vary() -> None:
    """Batch and both lengths; the mask is computed from sizes alone, so that it is seen to hide no whole row."""
    from rewriter.backends.files.load import open_source
    from rewriter.options import Options

    def attend(s: Any, x: Tensor) -> Tensor:
        time = torch.arange(x.shape[1])
        return plain(*map(heads, linears(s, x)), lambda z: z.masked_fill(time[:, None] < time, -1e9))

    g = open_source(Net(attend, **parts()).eval(), Options(inputs=(f"x:float32[batch,time,{E}]",))).graph
    (site,) = detect(g)
    assert site.form == Attention(**BASE, mask=(1, 1, "time", "keys"), boolean=True), site.reason
    before = g.run(FEEDS)
    g.splice(site, site.form)
    for name, value in g.run({"x": normal(2, 9, E)}).items():
        assert value.shape == (2, 9, E)
        close(g.run(FEEDS)[name], before[name])


def test_what_cannot_be_computed_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    g = graph(Net(SPELLINGS["plain"][0], **parts()), X)

    def refuse(*_: Any) -> list[Tensor]:
        raise RewriteError("no such operation")

    monkeypatch.setattr(g, "compute", refuse)
    (site,) = detect(g)
    assert site.form is None and site.reason == "what it computes could not be checked: no such operation"
