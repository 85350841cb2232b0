"""pre-merge: what is multiplied ahead of time is what is fastest, slow forms go back to the ORIGINAL weight, outputs stay as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import registry
from rewriter.algebra import ByTokens, Compose, Dense
from rewriter.backends.onnx.target import OnnxRuntimeTarget
from rewriter.graph import Graph, load_weight
from rewriter.passes.planning.chains import chains, link
from rewriter.passes.pre_merge import PreMerge
from rewriter.passes.structures.low_rank import LowRank
from rewriter.passes.structures.siblings import Siblings
from rewriter.quantised import Quantised
from rewriter.registry import parse_passes
from rewriter.rule import Context, Decision, given_up
from rewriter.tolerances import EQUAL
from tests.engine.nets import FakeTarget, Mlp, Net, as_onnx, context, graph, linear, normal, planted, sites

CHAIN = "x:float32[batch,seq,24]"
X = {"x": normal(3, 5, 24, seed=5)}
formats = pytest.mark.parametrize("convert", [lambda g: g, as_onnx], ids=["torch", "onnx"])


class ByCount(FakeTarget):
    """Seconds by a rule that sees the number of tokens; of two forms those of the one that runs, and a little more."""

    def __init__(self, seconds: Callable[[Any, int], float], dispatch: float = 1.0) -> None:
        self.by_count, self.factor = seconds, dispatch
        super().__init__(lambda form: 0.0)

    def measure(self, forms: Sequence[Any], tokens: int, threads: int) -> list[float]:
        return [self._one(form, tokens) for form in forms]

    def _one(self, form: Any, tokens: int) -> float:
        if isinstance(form, ByTokens):
            return self.factor * self.by_count(form.few if tokens <= form.most else form.many, tokens)
        return self.by_count(form, tokens)


def crossing(form: Any, tokens: int) -> float:
    """Dense takes as long whatever comes, factored forms as long as there are tokens."""
    return 16.0 if isinstance(form, Dense) else float(tokens)


def chained(bias: bool = False, between: Any = lambda x: x) -> Graph:
    """24 -> 4 -> 6 -> 20."""
    parts = {"down": linear(normal(4, 24)), "mid": linear(normal(6, 4, seed=1)), "up": linear(normal(20, 6, seed=2))}
    if bias:
        parts = {name: linear(part.weight.detach(), normal(len(part.weight), seed=i)) for i, (name, part) in enumerate(parts.items())}
    return graph(Net(lambda n, x: torch.relu(n.up(n.mid(between(n.down(x))))), **parts), CHAIN)


def decide(g: Graph, c: Context) -> dict[str, Decision]:
    return {d.site.name: d for d in PreMerge().run(g, c)}


def everything(g: Graph, tmp_path: Path, **changes: Any) -> Context:
    """A context that selects every site, adapters too."""
    return context(g, tmp_path, selected=registry.sites(g), **changes)


def after(g: Graph, c: Context, spelling: str) -> Context:
    """The same after a pass was run."""
    (step,) = parse_passes(spelling)
    for decision in step.run(g, c):
        c.decisions[decision.site.id] = decision
    return c


def numbers(operator: Any) -> float:
    return float(operator.cost().params)


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    rtol, atol = EQUAL[torch.float32]
    for name, y in expected.items():
        torch.testing.assert_close(found[name], y, rtol=rtol, atol=atol * float(y.abs().max()))


def runs(g: Graph) -> list[list[str]]:
    links = [found for s in sites(g) if (found := link(g, s, None)) is not None]
    return [[each.site.name for each in chain] for chain in chains(g, links)]


def test_a_chain_merges_where_that_is_faster(tmp_path: Path) -> None:
    g = chained()
    before = g.run(X)
    found = decide(g, context(g, tmp_path, target=FakeTarget(numbers)))
    assert {name: d.structure for name, d in found.items()} == dict.fromkeys(("down", "mid", "up"), "merged")
    assert found["down"].part_of == "up" and found["mid"].part_of == "up" and found["up"].part_of == ""
    operator = found["up"].operator
    assert isinstance(operator, Compose) and [f.shape for f in operator.factors] == [(4, 24), (20, 4)]  # 4*24 + 20*4 is the least
    assert sum(d.after.params for d in found.values()) == 176 and sum(d.before.params for d in found.values()) == 96 + 24 + 120
    assert found["up"].reason == "chain down . mid . up merged ahead: 1.4x as fast at T=1, 1.4x at T=256"
    same(g.run(X), before)


def test_a_chain_stays_where_nothing_is_faster(tmp_path: Path) -> None:
    g = chained()
    slow = FakeTarget(lambda operator: -float(len(operator.factors)) if isinstance(operator, Compose) else 0.0)  # type: ignore[attr-defined]
    found = decide(g, context(g, tmp_path, target=slow))
    assert all(not d.rewritten and d.reason == "chain down . mid . up: no merged form is faster" for d in found.values())


@formats
def test_a_bias_goes_through_what_follows_it(tmp_path: Path, convert: Any) -> None:
    g = convert(chained(bias=True))
    before = g.run(X)
    found = decide(g, context(g, tmp_path, target=FakeTarget(numbers)))
    assert [d.part_of for d in found.values()] == ["up", "up", ""] and found["up"].shift is not None
    same(g.run(X), before)
    for decision in given_up(found, found["up"], "enough"):
        assert decision.reason == ("enough" if decision.site.name == "up" else "up, which it was part of, was given up: enough")
        assert not decision.rewritten and decision.after == decision.before
    g.restore(found["up"].site)
    assert all(torch.equal(y, before[name]) for name, y in g.run(X).items())


def test_a_bias_that_varies_ends_a_chain() -> None:
    def both(n: Any, x: Tensor) -> Any:
        return n.up(torch.addmm(x[0] @ n.side, x[0], n.down))

    g = graph(Net(both, down=normal(24, 4), side=normal(24, 4, seed=3), up=linear(normal(20, 4))), CHAIN)
    assert runs(g) == []


@pytest.mark.parametrize("between", [torch.relu, lambda x: 2 * x], ids=["relu", "scale"])
def test_what_stands_between_ends_a_chain(between: Any) -> None:
    assert runs(chained(between=between)) == [["mid", "up"]]


def test_a_middle_result_that_is_used_elsewhere_ends_a_chain() -> None:
    def both(n: Any, x: Tensor) -> Any:
        y = n.down(x)
        return n.up(y), y

    g = graph(Net(both, down=linear(normal(4, 24)), up=linear(normal(20, 4))), CHAIN)
    assert runs(g) == []


def test_a_shared_weight_is_in_no_chain() -> None:
    fc = nn.Linear(24, 24, bias=False)
    g = graph(Net(lambda n, x: n.fc(n.fc(x)), fc=fc), CHAIN)
    assert runs(g) == []


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
        assert "is slower than dense (2000.000 ms against 1000.000 ms dense at T=1; 2000.000" in decision.reason
    assert torch.equal(g.run(X)["output"], original.run(X)["output"])
    for site in sites(original):
        assert torch.equal(load_weight(g, next(s for s in sites(g) if s.id == site.id)), load_weight(original, site))


def test_a_fast_form_stays_with_its_figures(tmp_path: Path) -> None:
    _, found = run(tmp_path, lambda operator: 3.0 if isinstance(operator, Dense) else 1.0, "ms")
    assert all(d.rewritten and d.reason.endswith("; 3.0x dense at T=1, 3.0x dense at T=256") for d in found.values())


def test_a_slow_form_stays_where_speed_was_not_asked_for(tmp_path: Path) -> None:
    _, found = run(tmp_path, slow, "params")
    assert all(d.rewritten and d.reason.endswith("; 0.5x dense at T=1, 0.5x dense at T=256") for d in found.values())


@formats
def test_neighbours_that_were_factored_share_their_middle(tmp_path: Path, convert: Any) -> None:
    """Two low ranks in a row: U_1 and D_2 become one small matrix; no fit is merged into a dense-sized one."""
    net = Net(lambda n, x: n.b(n.a(x)), a=linear(planted(48, 24, 3), normal(48)), b=linear(planted(40, 48, 5, seed=4)))
    g = convert(graph(net, CHAIN))
    original = g.run(X)
    c = after(g, context(g, tmp_path, target=FakeTarget(numbers)), "low-rank:rank=2")
    before = g.run(X)
    c.objective = "ms"
    found = decide(g, c)
    operator = found["b"].operator
    assert isinstance(operator, Compose) and [f.shape for f in operator.factors] == [(2, 24), (40, 2)]
    assert not found["b"].exact and (found["b"].error or 0) > 0 and found["a"].part_of == "b"
    same(g.run(X), before)
    g.restore(found["b"].site)
    assert all(torch.equal(y, original[name]) for name, y in g.run(X).items())


def crossed(tmp_path: Path, target: FakeTarget, objective: str = "ms", **changes: Any) -> tuple[Graph, dict[str, Decision]]:
    g = graph(Mlp())
    c = after(g, context(g, tmp_path, target=target, **changes), "low-rank:rank=4")
    c.objective = objective
    return g, decide(g, c)


@formats
def test_two_forms_where_each_wins_somewhere(tmp_path: Path, convert: Any) -> None:
    g = convert(graph(Mlp()))
    c = after(g, context(g, tmp_path, target=ByCount(crossing)), "low-rank:rank=4")
    before = g.run(X)
    c.objective = "ms"
    found = decide(g, c)
    for decision in found.values():
        operator = decision.operator
        assert (
            isinstance(operator, ByTokens)
            and operator.most == 16
            and isinstance(operator.few, LowRank)
            and isinstance(operator.many, Dense)
        )
        few, many = operator.few.cost().nbytes, operator.many.cost().nbytes
        assert f"two forms, one up to 16 tokens and one beyond, which store {few:,} and {many:,} bytes" in decision.reason
        assert decision.reason.endswith("16.0x dense at T=1, 1.0x dense at T=256") and decision.after.nbytes == few + many
        same({"": operator.many.weight.T}, {"": operator.few.dense()})  # the fit, not the original weight: one function for all calls
    same(g.run(X), before)
    same(g.run({"x": X["x"].repeat(4, 1, 1)}), {name: y.repeat(4, 1, 1) for name, y in before.items()})


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        (ByCount(crossing, dispatch=20.0), {}),  # what tells them apart takes longer than it saves
        (ByCount(crossing), {"objective": "params"}),
        (ByCount(crossing), {"tokens": (1, 2, 8)}),  # one form wins at all of them
    ],
    ids=["dear", "params", "alike"],
)
def test_one_form_where_two_do_not_pay(tmp_path: Path, target: FakeTarget, changes: dict[str, Any]) -> None:
    _, found = crossed(tmp_path, target, **changes)
    assert not any(isinstance(d.operator, ByTokens) for d in found.values())


def test_a_fit_that_wins_somewhere_is_made_where_two_forms_may_stay(tmp_path: Path) -> None:
    """At 256 tokens it loses more than it gains at one; alone it would not pay."""
    for two in (False, True):
        g = graph(Mlp())
        c = after(g, context(g, tmp_path / str(two), target=ByCount(crossing), objective="ms", two_forms=two), "low-rank:rank=4")
        assert all(d.rewritten == two for d in c.decisions.values())


def adapted(**more: Any) -> Graph:
    parts = {"base": linear(normal(24, 24), normal(24, seed=3)), "a": linear(normal(3, 24, seed=1)), "b": linear(normal(24, 3, seed=2))}
    return graph(Net(lambda n, x: torch.relu(n.base(x) + 0.5 * n.b(n.a(x))), **parts, **more), CHAIN)


@formats
def test_an_adapter_goes_into_its_base_where_that_is_faster(tmp_path: Path, convert: Any) -> None:
    g = convert(adapted())
    before = g.run(X)
    found = decide(g, everything(g, tmp_path, target=FakeTarget(numbers)))
    assert {d.site.name: (d.part_of, d.final) for d in found.values() if d.rewritten} == {
        "base (adapter)": ("base", True),
        "a": ("base (adapter)", True),
        "b": ("base (adapter)", True),
    }
    assert found["base"].reason.startswith("nothing stands in a row with it")
    assert "|UD| =" in found["base (adapter)"].reason and found["base (adapter)"].reason.endswith("; 1.2x as fast at T=1, 1.2x at T=256")
    same(g.run(X), before)
    g.prune()
    assert len(sites(g)) == 1


def test_an_adapter_stays_where_merging_is_no_faster(tmp_path: Path) -> None:
    g = adapted()
    found = decide(g, everything(g, tmp_path, target=FakeTarget(lambda form: 1.0)))
    assert found["base (adapter)"].reason == "merged it would be no faster: 1.0x as fast at T=1, 1.0x at T=256"
    assert not any(d.rewritten for d in found.values())


@formats
def test_an_adapter_joins_the_factors_of_its_base(tmp_path: Path, convert: Any) -> None:
    g = convert(adapted())
    original = g.run(X)
    c = after(g, everything(g, tmp_path, target=FakeTarget(numbers)), "low-rank:rank=4")
    before = g.run(X)
    steps = FakeTarget(lambda form: numbers(form) + 100 * (type(form).__name__ == "Sum"))
    found = decide(g, replace(c, target=steps))
    operator = found["base"].operator
    assert isinstance(operator, Compose) and [f.shape for f in operator.factors] == [(7, 24), (24, 7)]
    assert {name: d.part_of for name, d in found.items()} == {
        "base (adapter)": "base",
        "a": "base (adapter)",
        "b": "base (adapter)",
        "base": "",
    }
    same(g.run(X), before)
    back = {d.site.name: d for d in given_up(c.decisions, found["base"], "enough")}
    assert set(back) == {"base", "base (adapter)", "a", "b"} and not any(d.rewritten for d in back.values())
    g.restore(found["base"].site)
    assert all(torch.equal(y, original[name]) for name, y in g.run(X).items())


def test_a_reduced_adapter_joins_too(tmp_path: Path) -> None:
    g = adapted()
    original, reduced = g.run(X), parse_passes("block-lora:blocks=3,low-rank:rank=4")
    c = everything(g, tmp_path, target=FakeTarget(lambda form: numbers(form) + 100 * (type(form).__name__ == "Sum")))
    for step in reduced:
        for decision in step.run(g, c):
            c.decisions[decision.site.id] = decision
    before = g.run(X)
    found = decide(g, c)
    operator = found["base"].operator
    assert isinstance(operator, Compose) and [f.shape for f in operator.factors] == [(5, 24), (24, 5)] and not found["base"].exact
    assert "rank 1 instead of 3" in found["base (adapter)"].reason and "part of base: " in found["base (adapter)"].reason
    same(g.run(X), before)
    g.restore(found["base"].site)
    assert all(torch.equal(y, original[name]) for name, y in g.run(X).items())


def siblings(**parts: nn.Module) -> Graph:
    return graph(Net(lambda n, x: tuple(torch.relu(getattr(n, name)(x)) for name in parts), **parts), CHAIN)


@formats
@pytest.mark.parametrize("spelling", ["", "low-rank:rank=2"], ids=["dense", "thin"])
def test_siblings_become_one_product_where_that_is_faster(tmp_path: Path, convert: Any, spelling: str) -> None:
    q, k, v = linear(normal(20, 24), normal(20)), linear(normal(10, 24, seed=1)), linear(normal(12, 24, seed=2), normal(12))
    g = convert(siblings(q=q, k=k, v=v))
    original, c = g.run(X), context(g, tmp_path, target=FakeTarget(numbers))
    c = after(g, c, spelling) if spelling else c
    before = g.run(X)
    found = decide(g, replace(c, target=FakeTarget(lambda form: 1.0 if isinstance(form, Siblings) and form.first else 2.0)))
    held = found["v"].operator
    assert isinstance(held, Siblings) and len(held.first) == 1 and len(held.each) == (3 if spelling else 0) and len(held.biases) == 3
    assert found["q"].part_of == found["k"].part_of == "v" and found["v"].exact == (not spelling)
    assert "q, k, v as one product" in found["v"].reason
    same(g.run(X), before)
    g.restore(found["v"].site)
    assert all(torch.equal(y, original[name]) for name, y in g.run(X).items())


def test_siblings_stay_where_one_product_gains_little(tmp_path: Path) -> None:
    g = siblings(q=linear(normal(20, 24)), k=linear(normal(10, 24, seed=1)))
    found = decide(g, context(g, tmp_path, target=FakeTarget(lambda form: 1.05 if isinstance(form, Siblings) and form.each else 1.0)))
    assert {d.reason for d in found.values()} == {"q, k as one product: they would be no faster, 1.1x as fast at T=1, 1.1x at T=256"}
    assert [type(g.operator(node)) for node in g.nodes() if g.op(node) == "structured"] == []


def test_a_chain_is_given_up_whole_under_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was part of it is kept as well, with the reason."""
    monkeypatch.setattr(OnnxRuntimeTarget, "measure", lambda self, forms, tokens, threads: [numbers(form) for form in forms])
    net = Net(lambda n, x: torch.relu(n.b(n.a(x))), a=linear(planted(48, 24, 3), normal(48)), b=linear(planted(40, 48, 5, seed=4)))
    options: dict[str, Any] = {"inputs": [CHAIN], "target": "onnxruntime", "samples": 16, "tokens": (1, 256)}
    merged = rewriter.plan(net.eval(), "low-rank:rank=2,pre-merge", objective="ms", **options)
    assert [(row.name, row.status, row.structure) for row in merged.report.sites] == [(n, "planned", "merged") for n in ("a", "b")]
    lost = rewriter.plan(net, "low-rank:rank=2,pre-merge", objective="ms", max_error=1e-9, **options)
    first, second = lost.report.sites
    assert (first.status, second.status) == ("kept", "kept") and second.reason.startswith("given up for --max-error 1e-09: merged had")
    assert first.reason.startswith("b, which it was part of, was given up: ")
    assert lost.graph is not None and not any(lost.graph.op(node) == "structured" for node in lost.graph.nodes())


def test_later_passes_know_that_no_stored_weight_is_a_merged_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntimeTarget, "measure", lambda self, forms, tokens, threads: [numbers(form) for form in forms])
    net = Net(lambda n, x: torch.relu(n.b(n.a(x))), a=linear(planted(48, 24, 3), normal(48)), b=linear(planted(40, 48, 5, seed=4)))
    options: dict[str, Any] = {"inputs": [CHAIN], "target": "onnxruntime", "objective": "nbytes", "data": {"x": normal(24, 5, 24)}}
    passes = "low-rank:rank=2,pre-merge,correct,heal:steps=2:guided=true"
    lossy = rewriter.plan(net.eval(), passes, **options).report.sites[1]
    assert lossy.structure == "merged" and lossy.error is not None and not lossy.exact
    rounded = rewriter.plan(net, "low-rank:rank=2,pre-merge,quantize", **options).report.sites[1]
    assert rounded.structure == "merged in 8 bits" and rounded.error is not None and rounded.error > lossy.error


def test_two_forms_are_neither_trained_nor_rounded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would become a function of its own."""
    monkeypatch.setattr(OnnxRuntimeTarget, "measure", ByCount(crossing).measure)
    options: dict[str, Any] = {"inputs": [CHAIN], "target": "onnxruntime", "objective": "ms", "data": {"x": normal(24, 5, 24)}}
    made = rewriter.plan(Mlp().eval(), "low-rank:rank=4,pre-merge,correct,heal:steps=2", **options)
    assert made.graph is not None
    held = [made.graph.operator(node) for node in made.graph.nodes() if made.graph.op(node) == "structured"]
    assert held and all(isinstance(operator, ByTokens) for operator in held)
    for operator in held:
        assert isinstance(operator, ByTokens)
        same({"": operator.many.dense()}, {"": operator.few.dense()})
    monkeypatch.setattr(
        OnnxRuntimeTarget, "measure", ByCount(lambda form, t: 0.1 if isinstance(form, Quantised) else crossing(form, t)).measure
    )
    rounded = rewriter.plan(Mlp().eval(), "low-rank:rank=4,pre-merge,quantize", **options)
    assert {row.structure for row in rounded.report.sites} == {"low-rank:rank=4 in 8 bits"}
