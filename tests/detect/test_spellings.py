"""Every way in which torch spells y = W x is one site: its name, its shape, its law, and a dense form that can stand in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.backends.fx.graph import FxGraph
from rewriter.graph import Site
from tests.fx.models import BATCH, OTHER, Net, Together, graph, normal, obeys_law, sites, splices

W, V, SQUARE = normal(6, 8), normal(4, 6, seed=1), normal(8, 8, seed=2)
B, ROWS = normal(6, seed=3), normal(1, 6, seed=4)
HEADS, JOINED = normal(8, 3, 5, seed=5), normal(2, 4, 7, seed=6)  # "bsd,dhe->bshe" and "bshe,hed->bsd"
Spell = Callable[[Any, Tensor], Any]


def autocast(s: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y: Tensor = s.l(x)
    return y


def no_grad(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = s.l(x)
    return torch.relu(h)


def repeated(s: Any, x: Tensor) -> Tensor:
    return s.w.T.unsqueeze(0).expand(x.shape[0], -1, -1)


SPELLINGS: dict[str, tuple[Spell, dict[str, Any], str, tuple[int, int]]] = {
    "linear": (lambda s, x: F.linear(x, s.w), {"w": W}, "w", (6, 8)),
    "linear with bias": (lambda s, x: F.linear(x, s.w, s.b), {"w": W, "b": B}, "w", (6, 8)),
    "module": (lambda s, x: s.fc(x), {"fc": nn.Linear(8, 6)}, "fc", (6, 8)),
    "one output": (lambda s, x: s.fc(x), {"fc": nn.Linear(8, 1)}, "fc", (1, 8)),
    "one input": (lambda s, x: s.fc(x[..., :1]), {"fc": nn.Linear(1, 5)}, "fc", (5, 1)),
    "matmul": (lambda s, x: x @ s.w, {"w": W.T.contiguous()}, "w", (6, 8)),
    "x @ w.T": (lambda s, x: x @ s.w.T, {"w": W}, "w", (6, 8)),
    "x @ w.mT": (lambda s, x: x @ s.w.mT, {"w": W}, "w", (6, 8)),
    "matmul then bias": (lambda s, x: x @ s.w.T + s.b, {"w": W, "b": B}, "w", (6, 8)),
    "bias then matmul": (lambda s, x: s.b + x @ s.w.T, {"w": W, "b": B}, "w", (6, 8)),
    "matmul minus bias": (lambda s, x: x @ s.w.T - s.b, {"w": W, "b": B}, "w", (6, 8)),
    "scaled bias": (lambda s, x: torch.add(x @ s.w.T, s.b, alpha=3), {"w": W, "b": B}, "w", (6, 8)),
    "w @ x": (lambda s, x: s.w @ x.transpose(1, 2), {"w": W}, "w", (6, 8)),
    "w @ vector": (lambda s, x: s.w @ x.sum((0, 1)), {"w": W}, "w", (6, 8)),
    "mv": (lambda s, x: torch.mv(s.w, x.sum((0, 1))), {"w": W}, "w", (6, 8)),
    "vector @ w": (lambda s, x: x.sum((0, 1)) @ s.w.T, {"w": W}, "w", (6, 8)),
    "mm": (lambda s, x: torch.mm(x.flatten(0, 1), s.w.T), {"w": W}, "w", (6, 8)),
    "mm from the left": (lambda s, x: torch.mm(s.w, x.flatten(0, 1).T), {"w": W}, "w", (6, 8)),
    "bmm, repeated": (lambda s, x: torch.bmm(x, repeated(s, x)), {"w": W}, "w", (6, 8)),
    "repeated from the left": (lambda s, x: s.w.expand(x.shape[0], -1, -1) @ x.mT, {"w": W}, "w", (6, 8)),
    "baddbmm, repeated": (lambda s, x: torch.baddbmm(s.b, x, repeated(s, x), beta=2, alpha=0.5), {"w": W, "b": B}, "w", (6, 8)),
    "leading ones": (lambda s, x: x @ s.w, {"w": W.T.contiguous()[None]}, "w", (6, 8)),
    "addmm": (lambda s, x: torch.addmm(s.b, x.flatten(0, 1), s.w.T), {"w": W, "b": B}, "w", (6, 8)),
    "addmm, scaled": (lambda s, x: torch.addmm(s.b, x.flatten(0, 1), s.w.T, alpha=0.5, beta=2), {"w": W, "b": B}, "w", (6, 8)),
    "addmm, row": (lambda s, x: torch.addmm(s.b, x.flatten(0, 1), s.w.T, beta=2), {"w": W, "b": ROWS}, "w", (6, 8)),
    "addmm, residual": (lambda s, x: torch.addmm(x[:, 0], x[:, 1], s.w, alpha=0.5, beta=2), {"w": SQUARE}, "w", (8, 8)),
    "addmm, no term": (lambda s, x: torch.addmm(x[:, 0], x[:, 1], s.w, beta=0), {"w": SQUARE}, "w", (8, 8)),
    "inner": (lambda s, x: torch.inner(x, s.w), {"w": W}, "w", (6, 8)),
    "tensordot": (lambda s, x: torch.tensordot(x, s.w, dims=([2], [1])), {"w": W}, "w", (6, 8)),
    "tensordot, number": (lambda s, x: torch.tensordot(x, s.w.T, dims=1), {"w": W}, "w", (6, 8)),
    "tensordot, left": (lambda s, x: torch.tensordot(s.w, x, dims=([1], [2])), {"w": W}, "w", (6, 8)),
    "tensordot, two axes": (lambda s, x: torch.tensordot(x.unflatten(-1, (2, 4)), s.w, dims=2), {"w": JOINED}, "w", (7, 8)),
    "einsum": (lambda s, x: torch.einsum("bsd,ed->bse", x, s.w), {"w": W}, "w", (6, 8)),
    "einsum, ellipsis": (lambda s, x: torch.einsum("...d,ed->...e", x, s.w), {"w": W}, "w", (6, 8)),
    "einsum, implicit": (lambda s, x: torch.einsum("bsd,de", x, s.w), {"w": SQUARE}, "w", (8, 8)),
    "einsum, weight first": (lambda s, x: torch.einsum("ed, bsd -> bse", s.w, x), {"w": W}, "w", (6, 8)),
    "einsum, output turned": (lambda s, x: torch.einsum("bsd,ed->ebs", x, s.w), {"w": W}, "w", (6, 8)),
    "einsum, heads": (lambda s, x: torch.einsum("bsd,dhe->bshe", x, s.w), {"w": HEADS}, "w", (15, 8)),
    "einsum, heads first": (lambda s, x: torch.einsum("bsd,dhe->bhse", x, s.w), {"w": HEADS}, "w", (15, 8)),
    "einsum, joined": (lambda s, x: torch.einsum("bshe,hed->bsd", x.unflatten(-1, (2, 4)), s.w), {"w": JOINED}, "w", (7, 8)),
    "conv1d": (lambda s, x: s.fc(x.mT), {"fc": nn.Conv1d(8, 6, 1)}, "fc", (6, 8)),
    "conv1d, no bias": (lambda s, x: s.fc(x.mT), {"fc": nn.Conv1d(8, 6, 1, bias=False)}, "fc", (6, 8)),
    "conv1d, same": (lambda s, x: s.fc(x.mT), {"fc": nn.Conv1d(8, 6, 1, padding="same")}, "fc", (6, 8)),
    "conv1d, one item": (lambda s, x: s.fc(x.sum(0).mT), {"fc": nn.Conv1d(8, 6, 1)}, "fc", (6, 8)),
    "conv2d": (lambda s, x: s.fc(x.mT[..., None]), {"fc": nn.Conv2d(8, 6, 1)}, "fc", (6, 8)),
    "conv3d": (lambda s, x: s.fc(x.mT[..., None, None]), {"fc": nn.Conv3d(8, 6, 1)}, "fc", (6, 8)),
    "transposed buffer": (lambda s, x: x @ s.kept.t(), {"kept": nn.Buffer(W)}, "kept", (6, 8)),
    "no_grad": (no_grad, {"l": nn.Linear(8, 6)}, "l", (6, 8)),
    "autocast": (autocast, {"l": nn.Linear(8, 6)}, "l", (6, 8)),
    "weight norm": (lambda s, x: s.l(x), {"l": nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))}, "l", (6, 8)),
    "old weight norm": (lambda s, x: s.l(x), {"l": nn.utils.weight_norm(nn.Linear(8, 6))}, "l", (6, 8)),
    "spectral norm": (lambda s, x: s.l(x), {"l": nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6))}, "l", (6, 8)),
    "masked weight": (lambda s, x: F.linear(x, s.c * s.w * s.mask), {"w": W, "c": normal(1), "mask": nn.Buffer(W > 0)}, "w", (6, 8)),
    "dropped weight": (lambda s, x: F.linear(x, F.dropout(s.w, 0.5, s.training)), {"w": W}, "w", (6, 8)),
    "cast weight": (lambda s, x: F.linear(x, s.w.float()), {"w": W.half()}, "w", (6, 8)),
}  # fmt: skip


FEEDS = {"x": normal(OTHER, 5, 8, seed=9)}


def together(table: dict[str, tuple[Any, ...]]) -> FxGraph:
    torch.manual_seed(0)
    return graph(Together(Net(function, **parts) for function, parts, *_ in table.values()), normal(BATCH, 5, 8))


def by_net(g: FxGraph, table: dict[str, tuple[Any, ...]]) -> dict[str, list[Site]]:
    """The sites of each entry, under the names that they have without the others."""
    found: dict[str, list[Site]] = {name: [] for name in table}
    for site in sites(g):
        _, number, called = site.name.split(" ")[0].split(".", 2)
        found[list(table)[int(number)]].append(replace(site, name=called))
    return found


@pytest.fixture(scope="module")
def spelled() -> FxGraph:
    return together(SPELLINGS)


@pytest.fixture(scope="module")
def found(spelled: FxGraph) -> dict[str, list[Site]]:
    return by_net(spelled, SPELLINGS)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name: str, spelled: FxGraph, found: dict[str, list[Site]]) -> None:
    _, _, called, shape = SPELLINGS[name]
    (site,) = found[name]
    assert (site.name, site.kind, site.shape, site.reason, len(site.places)) == (called, "linear", shape, "", 1)
    obeys_law(spelled, site, FEEDS)


def test_dense_forms_stand_in_for_all_of_them(spelled: FxGraph) -> None:
    g = spelled.clone()
    splices(g, sites(g), FEEDS)


def strided(s: Any, x: Tensor) -> Tensor:
    return s.l(x.mT)


KEPT: dict[str, tuple[Spell, dict[str, Any], str]] = {
    "strided conv": (strided, {"l": nn.Conv1d(8, 6, 1, stride=2)}, "1x1 convolution with strides [2]"),
    "padded conv": (strided, {"l": nn.Conv1d(8, 6, 1, padding=1)}, "1x1 convolution with padding"),
    "experts": (lambda s, x: x[:, None] @ s.w, {"w": normal(3, 8, 6)}, "batched weights [3, 8, 6]"),
    "experts from the left": (lambda s, x: s.w @ x[:, None].mT, {"w": normal(3, 6, 8)}, "batched weights [3, 6, 8]"),
    "experts by einsum": (lambda s, x: torch.einsum("bed,edf->bef", x, s.w), {"w": normal(5, 8, 6)}, "batched weights [5, 8, 6]"),
    "three operands": (lambda s, x: torch.einsum("bsd,de,ef->bsf", x, s.w, s.v), {"w": SQUARE, "v": W.T}, "einsum of 3 operands"),
    "multi_dot": (lambda s, x: torch.linalg.multi_dot([x[0], s.w, s.w]), {"w": SQUARE}, "einsum of 3 operands"),
    "summed axis": (lambda s, x: torch.einsum("bsd,de->be", x, s.w), {"w": SQUARE}, "sums over an axis"),
    "summed weight": (lambda s, x: torch.einsum("bsd,dhe->bse", x, s.w), {"w": HEADS}, "sums over an axis"),
    "diagonal": (lambda s, x: torch.einsum("bdd,de->be", x[:, :, :5], s.w), {"w": normal(5, 6)}, "takes a diagonal"),
    "left addmm": (lambda s, x: torch.addmm(x[0, 0, 0], s.w, x[0].T), {"w": W}, "weight stands on the left"),
    "more axes": (lambda s, x: x.flatten(0, 1) @ s.w, {"w": W.T[None].contiguous()}, "more axes than its input"),
}


def test_listed_with_a_reason() -> None:
    found = by_net(together(KEPT), KEPT)
    for name, (_, _, said) in KEPT.items():
        (site,) = found[name]
        assert site.kind == "linear", name
        assert said in site.reason, name


def outer(s: Any, x: Tensor) -> Tensor:
    angles = x.mean((1, 2))[:, None] @ s.frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], -1)


NO_SITE: dict[str, tuple[Spell, dict[str, Any]]] = {
    "scores": (lambda s, x: x @ x.mT, {}),
    "scores by einsum": (lambda s, x: torch.einsum("bsd,btd->bst", x, x), {}),
    "depthwise conv": (lambda s, x: s.c(x.mT), {"c": nn.Conv1d(8, 8, 3, groups=8)}),
    "grouped 1x1 conv": (lambda s, x: s.c(x.mT), {"c": nn.Conv1d(8, 8, 1, groups=2)}),
    "3x3 conv": (lambda s, x: s.c(x[:, None]), {"c": nn.Conv2d(1, 4, 3)}),
    "transposed conv": (lambda s, x: s.c(x.mT), {"c": nn.ConvTranspose1d(8, 4, 3)}),
    "constant times constant": (lambda s, x: x + (s.w @ s.v).sum(), {"w": V, "v": W}),
    "constants by einsum": (lambda s, x: x + torch.einsum("ab,bc->ac", s.w, s.v).sum(), {"w": V, "v": W}),
    "rotary": (outer, {"frequencies": nn.Buffer(normal(4))}),
    "outer einsum": (lambda s, x: torch.einsum("b,d->bd", x.mean((1, 2)), s.w), {"w": B}),
    "scaling einsum": (lambda s, x: torch.einsum("bsd,d->bsd", x, s.w), {"w": normal(8)}),
    "dot": (lambda s, x: x @ s.w, {"w": normal(8)}),
    "embedding": (lambda s, x: F.embedding(x[..., 0].abs().long(), s.w), {"w": W}),
    "weight that changes": (lambda s, x: F.linear(x, s.w * x.mean()), {"w": W}),
    "random weight": (lambda s, x: F.linear(x, torch.rand_like(s.w)), {"w": W}),
}


def test_no_linear() -> None:
    found = by_net(together(NO_SITE), NO_SITE)
    assert {name: [s.name for s in some] for name, some in found.items() if any(s.kind == "linear" for s in some)} == {}


def test_conv1d_of_gpt2() -> None:
    from transformers.pytorch_utils import Conv1D

    g, feeds = graph(Net(lambda s, x: s.l(x), l=Conv1D(6, 8)), normal(BATCH, 5, 8)), {"x": normal(OTHER, 5, 8)}
    (site,) = sites(g)
    assert (site.name, site.shape, site.places[0].bias is not None) == ("l", (6, 8), True)
    obeys_law(g, site, feeds)
    splices(g, [site], feeds)


def test_packed_projections() -> None:
    """One linear where q, k and v read one value; one for each where they do not."""
    mha = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    feeds = {"x": normal(OTHER, 5, 8)}
    g = graph(Net(lambda s, x: s.mha(x, x, x)[0], mha=mha), normal(BATCH, 5, 8))
    assert [(s.name, s.shape) for s in sites(g, "linear")] == [("mha.in_proj", (24, 8)), ("mha.out_proj", (8, 8))]
    _both(g, sites(g, "linear"), feeds)
    g = graph(Net(lambda s, x: s.mha(x, x.sin(), x.cos())[0], mha=mha), normal(BATCH, 5, 8))
    names = [(s.name, s.shape, s.reason) for s in sites(g, "linear")]
    assert names == [(n, (8, 8), "") for n in ("mha.in_proj", "mha.in_proj[2]", "mha.in_proj[3]", "mha.out_proj")]
    clean = _both(g, sites(g, "linear"), feeds)
    assert "mha.in_proj_weight" not in clean.program.state_dict


def _both(g: Any, found: list[Site], feeds: dict[str, Tensor]) -> Any:
    for site in found:
        obeys_law(g, site, feeds)
    return splices(g, found, feeds)
