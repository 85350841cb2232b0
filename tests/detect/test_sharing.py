"""One stored matrix is one site with all its places; a matrix that something else needs is listed and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.backends.fx.constants import Constants
from rewriter.backends.fx.graph import FxGraph
from tests.fx.models import BATCH, OTHER, Net, graph, normal, obeys_law, sites, splices

W = normal(8, 8)
FEEDS = {"x": normal(OTHER, 5, 8, seed=9)}
X = normal(BATCH, 5, 8)


def tied(a: nn.Linear, b: nn.Linear) -> dict[str, Any]:
    b.weight = a.weight
    return {"a": a, "b": b}


def several(s: Any, x: Tensor) -> Tensor:
    """Three passes through one layer, as in ALBERT."""
    for _ in range(3):
        x = torch.tanh(s.l(x))
    return x


def mixed(s: Any, x: Tensor) -> Tensor:
    """One matrix, spelled five ways."""
    x = torch.tanh(F.linear(x, s.w))
    x = torch.tanh(x @ s.w.T)
    x = torch.tanh(x @ s.w.transpose(0, 1))
    x = torch.tanh(torch.einsum("bsd,ed->bse", x, s.w))
    return torch.addmm(s.b, x[0], s.w.t())


ONE_SITE: dict[str, tuple[Any, dict[str, Any], int]] = {
    "tied parameters": (lambda s, x: s.b(torch.relu(s.a(x))), tied(nn.Linear(8, 8), nn.Linear(8, 8)), 2),
    "tied, one without bias": (lambda s, x: s.b(torch.relu(s.a(x))), tied(nn.Linear(8, 8), nn.Linear(8, 8, bias=False)), 2),
    "tied, nothing between": (lambda s, x: s.b(s.a(x)), tied(nn.Linear(8, 8), nn.Linear(8, 8)), 2),
    "shared layer": (several, {"l": nn.Linear(8, 8)}, 3),
    "shared layer with weight norm": (several, {"l": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))}, 3),
    "spelled several ways": (mixed, {"w": W, "b": normal(8)}, 5),
}


@pytest.mark.parametrize("name", ONE_SITE)
def test_one_site(name: str) -> None:
    function, parts, places = ONE_SITE[name]
    g = graph(Net(function, **parts), X)
    (site,) = sites(g)
    assert (site.reason, len(site.places)) == ("", places)
    obeys_law(g, site, FEEDS)
    splices(g, [site], FEEDS)


def whole_and_part(s: Any, x: Tensor) -> Tensor:
    return F.linear(x, s.w).sum(-1) + F.linear(x, s.w[2:5]).sum(-1)


class Head(nn.Module):
    """A language model's table and head on one storage, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(self.table(x)))
        return out


def repeated(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    many = s.w.expand(x.shape[0], -1, -1)
    return x @ many, many.sin()


CROSSING, TIED = "reads the same numbers in another way", "its weight is tied to "
KEPT: dict[str, tuple[Any, str]] = {
    "autoencoder": (lambda s, x: F.linear(torch.tanh(F.linear(x, s.w)), s.w.T), f"w[2] {CROSSING}"),
    "two spellings of a transpose": (lambda s, x: torch.tanh(x @ s.w) @ s.w.T, CROSSING),
    "another scale": (lambda s, x: torch.addmm(x[0], torch.mm(x[0], s.w), s.w, alpha=0.5), CROSSING),
    "whole and part": (whole_and_part, CROSSING),
    "added as well": (lambda s, x: F.linear(x, s.w) + s.w.sum(), TIED),
    "an output as well": (lambda s, x: (F.linear(x, s.w), s.w), f"{TIED}output"),
    "repeated and used": (lambda s, x: sum(repeated(s, x)), TIED),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    function, said = KEPT[name]
    found = sites(graph(Net(function, w=W), normal(BATCH, 8, 8)))
    assert said in found[0].reason
    assert all(s.reason for s in found)


def test_head_tied_to_the_embedding() -> None:
    g = graph(Head(), torch.arange(BATCH))
    inner, head = sites(g)
    assert (inner.name, inner.reason) == ("inner", "")
    assert head.name in ("head", "table")
    assert head.reason.startswith("its weight is tied to table")
    assert head.weights["weight"].shared_by == ("table",)


def chunks(s: Any, x: Tensor) -> Tensor:
    q, k, v = s.w.chunk(3)
    return F.linear(x, q) + F.linear(x.sin(), k) + F.linear(x.cos(), v)


def test_slices_of_a_packed_weight() -> None:
    for function, weight in ((chunks, normal(18, 8)), (lambda s, x: sum(x @ s.w[i] for i in range(3)), normal(3, 8, 6))):
        g = graph(Net(function, w=weight), X)
        found = sites(g)
        assert [(s.name, s.shape, s.reason) for s in found] == [("w", (6, 8), ""), ("w[2]", (6, 8), ""), ("w[3]", (6, 8), "")]
        for site in found:
            obeys_law(g, site, FEEDS)
        clean = splices(g, found, FEEDS)
        assert "w" not in clean.program.state_dict


def test_one_slice_rewritten_leaves_the_others() -> None:
    g = graph(Net(chunks, w=normal(18, 8)), X)
    clean = splices(g, sites(g)[1:2], FEEDS)
    assert [s.name for s in sites(clean)][:2] == ["w", "w[2]"]


def conditional(s: Any, x: Tensor) -> Tensor:
    def yes(x: Tensor) -> Tensor:
        inner: Tensor = torch.cond(x.mean() > 1, lambda x: s.a(x), lambda x: s.b(x).sin(), (x,))
        return inner

    def no(x: Tensor) -> Tensor:
        return torch.relu(s.a(x)) @ s.c.T

    out: Tensor = torch.cond(x.sum() > 0, yes, no, (x,))
    return out


def test_places_in_conditional_branches() -> None:
    """Both branches and a nested one; `a` is used in two bodies and is one site."""
    net = Net(conditional, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=normal(8, 8, seed=4))
    g = graph(net, X)
    found = {s.name: s for s in sites(g)}
    assert {name: (len(s.places), s.reason) for name, s in found.items()} == {"a": (2, ""), "b": (1, ""), "c": (1, "")}
    low, middle, high = ({"x": FEEDS["x"].abs() * scale} for scale in (-1, 1, 20))
    clean = splices(g, list(found.values()), low)
    for feeds in (low, middle, high):
        with torch.no_grad():
            torch.testing.assert_close(clean.run(feeds)["output"], net(feeds["x"]))
    assert not {"a.weight", "b.weight", "c"} & set(clean.program.state_dict)


def scanned(s: Any, x: Tensor) -> Any:
    from torch._higher_order_ops.scan import scan

    def step(carry: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        carry = torch.tanh(F.linear(carry, s.w) + row)
        return carry, carry.clone()

    return scan(step, x.new_zeros(BATCH, 8), x.transpose(0, 1))[1]


def looped(s: Any, x: Tensor) -> Any:
    from torch._higher_order_ops.while_loop import while_loop

    return while_loop(lambda i, a: i < 3, lambda i, a: (i + 1, torch.tanh(F.linear(a, s.w))), (torch.tensor(0), x))[1]


def mapped(s: Any, x: Tensor) -> Any:
    from torch._higher_order_ops.map import map as over

    return over(lambda row, w: row @ w.T, x, s.w)


@pytest.mark.parametrize(("function", "body"), [(scanned, "scan"), (looped, "while_loop"), (mapped, "map_impl")])
def test_inside_a_loop(function: Any, body: str) -> None:
    found = sites(graph(Net(function, w=W), X, dynamic=False), "linear")
    assert [(s.name, s.shape, s.reason) for s in found] == [("w", (8, 8), f"inside a {body} body: weights cannot be added there yet")]


def test_detection_reads_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the same computed weight is met again."""

    def refuse(*_: object) -> Tensor:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(Constants, "load", refuse)
    for name in ("tied parameters", "shared layer with weight norm"):
        function, parts, _ = ONE_SITE[name]
        assert len(sites(graph(Net(function, **parts), X))) == 1


def test_a_mutated_buffer_is_no_constant() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", W.clone())

        def forward(self, x: Tensor) -> Tensor:
            self.kept.mul_(2)
            return F.linear(x, self.kept)

    g = graph(Counting(), X)
    assert isinstance(g, FxGraph)
    assert sites(g) == []
