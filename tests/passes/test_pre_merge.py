"""pre-merge: chains are merged where that is faster, slow forms go back to the ORIGINAL weight, and the outputs stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter.algebra import Compose, Dense
from rewriter.graph import Graph, load_weight
from rewriter.passes.pre_merge import PreMerge, chains, form, groupings
from rewriter.registry import parse_passes
from rewriter.rule import Context, Decision
from rewriter.tolerances import EQUAL
from tests.engine.nets import FakeTarget, Mlp, Net, context, graph, linear, normal, sites

CHAIN = "x:float32[batch,seq,24]"


def chained(bias: bool = False, between: Any = lambda x: x) -> Graph:
    """24 -> 4 -> 6 -> 20."""
    parts = {"down": linear(normal(4, 24)), "mid": linear(normal(6, 4, seed=1)), "up": linear(normal(20, 6, seed=2))}
    parts["down"] = linear(normal(4, 24), normal(4) if bias else None)
    return graph(Net(lambda n, x: torch.relu(n.up(n.mid(between(n.down(x))))), **parts), CHAIN)


def decide(g: Graph, c: Context) -> dict[str, Decision]:
    return {d.site.name: d for d in PreMerge().run(g, c)}


def numbers(operator: Any) -> float:
    return float(operator.cost().params)


def test_groupings_are_all_of_them_as_it_stands_first() -> None:
    assert groupings(3) == [(1, 2), (1,), (2,), ()]
    assert len(groupings(5)) == 2**4


@pytest.mark.parametrize("cuts", groupings(3))
def test_every_grouping_is_the_same_product(cuts: tuple[int, ...]) -> None:
    weights = [normal(4, 24).double(), normal(6, 4, seed=1).double(), normal(20, 6, seed=2).double()]
    merged = form(weights, cuts)
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(merged.dense(), (weights[2] @ weights[1] @ weights[0]).float(), rtol=rtol, atol=atol)
    assert (len(merged.factors) if isinstance(merged, Compose) else 1) == len(cuts) + 1


def test_a_chain_merges_where_that_is_faster(tmp_path: Path) -> None:
    g = chained()
    x = normal(3, 5, 24, seed=5)
    (before,) = g.run({"x": x}).values()
    found = decide(g, context(g, tmp_path, target=FakeTarget(numbers)))
    assert {name: d.structure for name, d in found.items()} == dict.fromkeys(("down", "mid", "up"), "merged")
    assert found["down"].part_of == "up" and found["mid"].part_of == "up" and found["up"].part_of == ""
    operator = found["up"].operator
    assert isinstance(operator, Compose) and [f.shape for f in operator.factors] == [(4, 24), (20, 4)]  # 4*24 + 20*4 is the least
    assert sum(d.after.params for d in found.values()) == 176 and sum(d.before.params for d in found.values()) == 96 + 24 + 120
    assert "merged ahead: 352000.000 ms against 480000.000 ms as it stands, at T=1, 256" in found["up"].reason
    (after,) = g.run({"x": x}).values()
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(after, before, rtol=rtol, atol=atol * float(before.abs().max()))


def test_a_chain_stays_where_nothing_is_faster(tmp_path: Path) -> None:
    g = chained()
    slow = FakeTarget(lambda operator: -float(len(operator.factors)) if isinstance(operator, Compose) else 0.0)  # type: ignore[attr-defined]
    found = decide(g, context(g, tmp_path, target=slow))
    assert all(not d.rewritten and d.reason == "chain down . mid . up: no merged form is faster" for d in found.values())


@pytest.mark.parametrize("how", [{"bias": True}, {"between": torch.relu}, {"between": lambda x: 2 * x}], ids=["bias", "relu", "scale"])
def test_what_stands_between_ends_a_chain(how: dict[str, Any]) -> None:
    g = chained(**how)
    assert [[s.name for s in chain] for chain in chains(g, sites(g))] == [["mid", "up"]]


def test_a_middle_result_that_is_used_elsewhere_ends_a_chain() -> None:
    def both(n: Any, x: Tensor) -> Any:
        y = n.down(x)
        return n.up(y), y

    g = graph(Net(both, down=linear(normal(4, 24)), up=linear(normal(20, 4))), CHAIN)
    assert list(chains(g, sites(g))) == []


def test_a_shared_weight_is_in_no_chain() -> None:
    fc = nn.Linear(24, 24, bias=False)
    g = graph(Net(lambda n, x: n.fc(n.fc(x)), fc=fc), CHAIN)
    assert list(chains(g, sites(g))) == []


def run(tmp_path: Path, seconds: Any, objective: str) -> tuple[Graph, dict[str, Decision]]:
    g = graph(Mlp())
    c = context(g, tmp_path, target=FakeTarget(seconds), objective="params")
    (step,) = parse_passes("low-rank:rank=4")
    for decision in step.run(g, c):
        c.decisions[decision.site.id] = decision
    c.objective = objective
    return g, decide(g, c)


def slow(operator: Any) -> float:
    return 1.0 if isinstance(operator, Dense) else 2.0


def test_a_slow_form_gives_the_original_weight_back(tmp_path: Path) -> None:
    original = graph(Mlp())
    g, found = run(tmp_path, slow, "ms")
    for decision in found.values():
        assert not decision.rewritten and decision.after == decision.before
        assert "is slower than dense at every asked token count" in decision.reason
        assert "2000.000 ms against 1000.000 ms dense at T=1" in decision.reason
    x = normal(3, 5, 24, seed=5)
    assert torch.equal(g.run({"x": x})["output"], original.run({"x": x})["output"])
    for site in sites(original):
        assert torch.equal(load_weight(g, next(s for s in sites(g) if s.id == site.id)), load_weight(original, site))


def test_a_fast_form_stays_with_its_figures(tmp_path: Path) -> None:
    _, found = run(tmp_path, lambda operator: 3.0 if isinstance(operator, Dense) else 1.0, "ms")
    assert all(d.rewritten and d.reason.endswith("; 3.0x dense at T=1, 3.0x dense at T=256") for d in found.values())


def test_a_slow_form_stays_where_speed_was_not_asked_for(tmp_path: Path) -> None:
    _, found = run(tmp_path, slow, "params")
    assert all(d.rewritten and d.reason.endswith("; 0.5x dense at T=1, 0.5x dense at T=256") for d in found.values())
