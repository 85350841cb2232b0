"""Sequential correction: its closed form against least squares, better outputs in both formats, and everything else as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.graph import Graph, Value
from rewriter.moments import Moments
from rewriter.operator import flatten
from rewriter.output_error import OutputErrors
from rewriter.passes import correct
from rewriter.passes.correct import Correct
from rewriter.passes.healing.blockwise import Chain
from rewriter.structure import NoMatch
from tests.engine.nets import Net, context, decaying, graph, linear, normal, samples
from tests.passes.blocks import TAPE, WIDTH, Blocks, after_one, after_two, close, data, error, made, spliced

BOTH = pytest.mark.parametrize("onnx", [False, True], ids=["torch", "onnx"])


def joint(now: Tensor, dense: Tensor) -> Moments:
    z = torch.cat([now, dense - now], 1)
    return Moments(z.T @ z / len(z), z.mean(0), len(z), "test")


def test_the_target_is_the_least_squares_of_the_dense_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correct, "RIDGE", 0.0)
    dense, weight = normal(200, 7, dtype=torch.float64), normal(5, 7, seed=1, dtype=torch.float64)
    now = torch.tanh(dense) + 0.3 * normal(200, 7, seed=2, dtype=torch.float64)
    oracle = torch.linalg.lstsq(now, dense @ weight.T).solution.T
    close(correct.target(weight, joint(now, dense)), oracle, torch.float64)


def test_what_no_sample_shows_is_not_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead input, and one that the rewrite left as it was, keep their columns."""
    monkeypatch.setattr(correct, "RIDGE", torch.finfo(torch.float64).eps)
    dense = normal(200, 4, dtype=torch.float64) * torch.tensor([1.0, 1.0, 0.0, 1.0])
    now = dense * torch.tensor([0.5, 1.0, 1.0, 1.0])
    found = correct.target(torch.ones(3, 4, dtype=torch.float64), joint(now, dense))
    assert torch.equal(found[:, 2], torch.ones(3, dtype=torch.float64))
    close(found, torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64).expand(3, 4), torch.float64)


@BOTH
@pytest.mark.parametrize("first", ["low-rank:params=0.5", "monarch:params=0.5", "nm-sparse:n=2:m=4"])
def test_outputs_come_out_better(first: str, onnx: bool, tmp_path: Path) -> None:
    module = Blocks()
    g, before, after = after_two(tmp_path, module, "correct", first, onnx=onnx)
    assert error(g, module) < error(spliced(module, before, onnx), module)
    for key, d in after.items():
        if d.site.name.startswith("b"):  # behind a nonlinearity, which bends what was lost before it
            assert "; corrected: the error of its product on held-back samples" in d.reason
        assert d.operator is not None and d.after.params <= before[key].after.params


@BOTH
def test_the_graph_holds_what_the_decisions_say(onnx: bool, tmp_path: Path) -> None:
    module = Blocks()
    g, _, after = after_two(tmp_path, module, "correct", onnx=onnx)
    (name,) = g.output_names()
    x = {"x": normal(2, 3, WIDTH, seed=7)}
    close(g.run(x)[name], spliced(module, after, onnx).run(x)[name])


def test_a_site_right_behind_another_reads_what_that_one_gives(tmp_path: Path) -> None:
    """Nothing between them, and inputs that say of each other what was taken out of the first."""
    first, second = (linear(decaying(WIDTH, WIDTH, seed, 0.3), normal(WIDTH, seed=seed)) for seed in (1, 2))
    net = Net(lambda n, x: n.second(n.first(n.mix(x))), mix=linear(decaying(WIDTH, WIDTH, 3, 0.7)), first=first, second=second)
    g, before, after = after_two(tmp_path, net, "correct", "nm-sparse:n=1:m=4", ("first", "second"))
    assert error(g, net) < error(spliced(net, before), net)
    assert any("; corrected" in d.reason for d in after.values() if d.site.name == "second")


@pytest.mark.parametrize("changed", ["parse_passes", "structures"], ids=["no member fits", "no structure made it"])
def test_the_bias_alone_where_no_refit_is_found(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost before a relu lowers the mean behind it; on the samples that are fitted the output's mean comes back."""
    refuses = SimpleNamespace(structure=SimpleNamespace(fit=lambda *given: NoMatch("planted")))
    monkeypatch.setattr(correct, changed, {"parse_passes": lambda spelled: [refuses], "structures": dict}[changed])
    first, second = (linear(normal(WIDTH, WIDTH, seed=seed), torch.zeros(WIDTH)) for seed in (1, 2))
    module = Net(lambda n, x: n.second(torch.relu(n.first(x))), first=first, second=second)
    g, before, after = after_two(tmp_path, module, "correct", "low-rank:params=0.25")
    fitted = [b for i, b in enumerate(data().batches) if i % correct.HELD_OUT]

    def mean(one: Graph) -> Tensor:
        return torch.cat([next(iter(one.run(b).values())) for b in fitted]).mean((0, 1))

    dense = mean(made(module))
    assert float((mean(g) - dense).norm()) < 0.5 * float((mean(spliced(module, before)) - dense).norm())
    assert all(d.operator is before[key].operator for key, d in after.items())


def test_without_a_bias_nothing_is_added(tmp_path: Path) -> None:
    _, _, after = after_two(tmp_path, Blocks(bias=False), "correct")
    assert all((d.shift is None) == d.site.name.startswith("b") for d in after.values())


def test_exact_sites_and_kept_ones_are_left_alone(tmp_path: Path) -> None:
    _, before, after = after_two(tmp_path, Blocks(exact=True), "correct", "auto:params=0.5", ("a.0", "b.0", "a.1"))
    by_name = {d.site.name: (before[d.site.id], d) for d in after.values()}
    assert by_name["a.0"][0].exact and by_name["a.0"][1] is by_name["a.0"][0]
    assert by_name["a.1"][1] is not by_name["a.1"][0]


def test_a_site_that_nothing_rewrote_has_its_reason(tmp_path: Path) -> None:
    g = graph(Blocks(), TAPE)
    decisions = list(Correct().run(g, context(g, tmp_path, data=data())))
    assert len(decisions) == 6 and all(d.reason == "no earlier pass rewrote this one" and not d.rewritten for d in decisions)


def test_what_makes_the_output_worse_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worse = iter([0.1, 0.2])
    monkeypatch.setattr(OutputErrors, "now", lambda self: next(worse))
    g, before, after = after_two(tmp_path, Blocks(), "correct")
    for key, d in after.items():
        assert "correction did not help (output error 0.1 to 0.2 on held-back samples): left as it was" in d.reason
        assert d.operator is before[key].operator and d.shift is before[key].shift
    monkeypatch.undo()
    assert error(g, Blocks()) == error(spliced(Blocks(), before), Blocks())


def test_a_failure_leaves_the_graph_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, fail = Blocks(), RewriteError("planted")
    g = graph(module, TAPE)
    c = context(g, tmp_path, data=data())
    before = after_one(g, c)
    calls = iter([None, None, fail])
    inner = correct.target

    def fails(weight: Tensor, fed: Moments) -> Tensor:
        if (problem := next(calls)) is not None:
            raise problem
        return inner(weight, fed)

    monkeypatch.setattr(correct, "target", fails)
    with pytest.raises(RewriteError, match="planted"):
        list(Correct().run(g, c))
    assert error(g, module) == error(spliced(module, before), module)


def test_a_site_that_gets_other_rows_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the rewritten model routes a token elsewhere."""
    inner = Chain.values

    def routed(self: Chain, block: int, index: int, wanted: Sequence[Value], grad: bool = False) -> list[Tensor]:
        return [value[1:] for value in inner(self, block, index, wanted, grad)]

    monkeypatch.setattr(Chain, "values", routed)
    monkeypatch.setattr(Chain, "advance", lambda self, block, indices: None)
    monkeypatch.setattr(correct, "cuts", lambda graph, sites: [])
    _, _, after = after_two(tmp_path, Blocks(), "correct")
    assert all("not corrected: the rewritten model gives it other rows than the dense one" in d.reason for d in after.values())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = (after_two(tmp_path / str(i), Blocks(), "correct", "monarch:params=0.5")[2] for i in range(2))
    for key, d in one.items():
        other = two[key].operator
        assert d.operator is not None and other is not None and d.reason == two[key].reason
        assert all(torch.equal(a, b) for a, b in zip(flatten(d.operator)[0], flatten(other)[0], strict=True))


def test_it_refuses_invented_samples_and_too_few(tmp_path: Path) -> None:
    g = graph(Blocks(), TAPE)
    for given, said in (
        (data(), "invented inputs are not that; give --data"),
        (samples({"x": normal(8, 4, WIDTH)}), "needs two batches of samples at least"),
    ):
        c = context(g, tmp_path, data=given)
        given.invented = len(given.batches) > 1
        after_one(g, c)
        with pytest.raises(RewriteError, match=said):
            list(Correct().run(g, c))


def branching(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x))
    out: Tensor = torch.cond(h.sum() > 1e9, lambda h: h.cos(), lambda h: net.no(h).sin(), (h,))
    return h + out


def test_sites_inside_branches_are_left_as_they_were(tmp_path: Path) -> None:
    """Behind a site that has its part; a branch has no inputs of its own that a part of the model could be run to."""
    parts = {name: linear(decaying(WIDTH, WIDTH, seed, 0.4), normal(WIDTH, seed=seed)) for seed, name in enumerate(("first", "no"))}
    _, _, after = after_two(tmp_path, Net(branching, **parts), "correct")
    by_name = {d.site.name: d.reason for d in after.values()}
    assert "not corrected: it stands inside a branch or loop" not in by_name["first"]
    assert by_name["no"].endswith("not corrected: it stands inside a branch or loop")
