"""Deciding a site: reasons to keep, what pays, and decisions that do not depend on order."""

from __future__ import annotations

import math
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import cache
from rewriter.algebra import Dense
from rewriter.allocate import Budget
from rewriter.cache import FITTING, sources
from rewriter.decide import decide_all
from rewriter.errors import RewriteError
from rewriter.graph import Graph, load_weight
from rewriter.operator import flatten
from rewriter.parallel import in_parallel
from rewriter.registry import parse_passes
from rewriter.rule import Context, Decision
from rewriter.tolerances import EXACT
from tests.engine.nets import FakeTarget, Mlp, Net, context, decaying, graph, linear, normal, planted, samples


def decide(g: Graph, c: Context, spelled: str = "low-rank:rank=4") -> dict[str, Decision]:
    (step,) = parse_passes(spelled)
    return {d.site.name: d for d in step.run(g, c)}


def one(weight: Tensor, tmp_path: Path, spelled: str = "low-rank:rank=2", **changes: Any) -> Decision:
    fc = linear(weight)
    fc.requires_grad_(False)
    g = graph(Net(lambda n, x: n.fc(torch.sin(x)), fc=fc), f"x:{str(weight.dtype).removeprefix('torch.')}[batch,seq,{weight.shape[1]}]")
    data = samples({"x": normal(40, 3, weight.shape[1], dtype=weight.dtype)})
    (decision,) = decide(g, context(g, tmp_path, data=data, **changes), spelled).values()
    return decision


def poisoned(value: float) -> Tensor:
    weight = normal(20, 24)
    weight[3, 4] = value
    return weight


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (poisoned(math.nan), "its weight holds NaN or inf"),
        (poisoned(math.inf), "its weight holds NaN or inf"),
        (torch.zeros(20, 24), "its weight is all zeros"),
        (normal(1, 24), "its weight is a single vector, [1, 24]: nothing smaller does the same"),
        (normal(20, 1), "its weight is a single vector, [20, 1]: nothing smaller does the same"),
    ],
)
def test_weights_that_are_kept(weight: Tensor, reason: str, tmp_path: Path) -> None:
    decision = one(weight, tmp_path)
    assert decision.reason == reason
    assert not decision.rewritten and decision.before == decision.after


def test_integer_weights_are_kept(tmp_path: Path) -> None:
    net = Net(lambda n, x: x @ n.w, w=nn.Parameter(torch.arange(24 * 20).reshape(24, 20), requires_grad=False))
    g = graph(net, "x:int64[batch,24]")
    c = context(g, tmp_path, data=samples({"x": torch.ones(8, 24, dtype=torch.int64)}))
    reasons = {d.reason for d in decide(g, c).values()}
    assert reasons == {"its weight is int64, not a float"}


def test_tied_weights_are_kept(tmp_path: Path) -> None:
    table = nn.Embedding(30, 24)
    net = Net(lambda n, x: n.table(x) @ n.table.weight.T, table=table)
    g = graph(net, "x:int64[batch,seq]")
    c = context(g, tmp_path, data=samples({"x": torch.arange(24).reshape(3, 8)}))
    (decision,) = decide(g, c).values()
    assert not decision.rewritten and "table" in decision.reason


def test_a_blind_fit_is_refused(tmp_path: Path) -> None:
    g = graph(Mlp())
    c = context(g, tmp_path)
    c.calibration.samples = None
    for decision in decide(g, c).values():
        assert not decision.rewritten and "a fit would be blind" in decision.reason


def test_a_fit_that_does_not_pay_is_kept_with_both_numbers(tmp_path: Path) -> None:
    decision = one(decaying(20, 24), tmp_path, "low-rank:rank=11")  # 11 * 44 = 484 > 480
    assert not decision.rewritten and decision.before == decision.after
    assert "484" in decision.reason and "480" in decision.reason


def test_bytes_are_counted_where_bytes_are_the_objective(tmp_path: Path) -> None:
    decision = one(decaying(20, 24), tmp_path, "low-rank:rank=2", objective="nbytes")
    assert decision.rewritten and decision.after.nbytes == 4 * 2 * 44


def test_objectives_differ_by_what_they_count(tmp_path: Path) -> None:
    """A form that stores less and runs slower: params takes it, ms keeps the dense weight, with both figures."""
    slow = FakeTarget(lambda form: 0.001 if isinstance(form, Dense) else 0.003)
    assert one(decaying(20, 24), tmp_path / "a", target=slow).rewritten
    assert slow.asked == []
    decision = one(decaying(20, 24), tmp_path / "b", target=slow, objective="ms")
    assert not decision.rewritten
    assert "6.000 ms against 2.000 ms dense at T=1, 256" in decision.reason
    assert slow.asked == [["Dense", "LowRank"]] * 2
    fast = FakeTarget(lambda form: 0.003 if isinstance(form, Dense) else 0.001)
    assert one(decaying(20, 24), tmp_path / "c", target=fast, objective="ms").rewritten


def test_an_explicit_rank_beyond_params_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match=r"fc: low-rank: low-rank:rank=8 stores 352 numbers, the limit is 48"):
        one(decaying(20, 24), tmp_path, "low-rank:rank=8:params=0.1")
    assert one(decaying(20, 24), tmp_path, "low-rank:rank=1:params=0.1").structure == "low-rank:rank=1"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_planted_rank_is_discovered_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = planted(48, 40, 3).to(dtype)
    decision = one(weight, tmp_path, "auto")
    assert decision.exact and decision.structure == "pivoted-low-rank:rank=3", decision.reason  # the fewest numbers at this rank
    assert decision.operator is not None and {t.dtype for t in flatten(decision.operator)[0]} == {dtype, torch.int64}
    dense, found = weight.double(), decision.operator.to(torch.float64).dense()
    assert float((dense - found).norm() / dense.norm()) <= 2 * EXACT[dtype]  # the factors are rounded too
    assert decision.after.params == 3 * 88 - 9 and decision.before.params == 48 * 40


def test_auto_alone_takes_no_lossy_form(tmp_path: Path) -> None:
    decision = one(decaying(20, 24), tmp_path, "auto")
    assert not decision.rewritten and "a lossy form needs a bound" in decision.reason
    assert one(decaying(20, 24), tmp_path, "auto", consent=True).rewritten
    assert one(decaying(20, 24), tmp_path, "auto", budget=Budget("params", 0.4)).rewritten


def same(a: Decision, b: Decision) -> None:
    assert (a.structure, a.reason, a.error, a.before, a.after, a.exact) == (b.structure, b.reason, b.error, b.before, b.after, b.exact)
    assert a.operator is not None and b.operator is not None
    (ours, spec), (theirs, other) = flatten(a.operator), flatten(b.operator)
    assert spec == other and all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert (a.shift is None) == (b.shift is None)
    assert a.shift is None or (b.shift is not None and torch.equal(a.shift, b.shift))


def run(folder: Path, module: nn.Module | None = None, spelled: str = "low-rank:rank=4", **changes: Any) -> tuple[dict[str, Decision], int]:
    """The decisions, and how many sites calibration was asked for."""
    g = graph(module or Mlp())
    c = context(g, folder, **changes)
    asked = []
    whole = c.calibration.moments
    c.calibration.moments = lambda found: (asked.extend(found), whole(found))[1]  # type: ignore[method-assign]
    return decide(g, c, spelled), len(asked)


def test_a_hit_gives_the_identical_decision_without_calibration(tmp_path: Path) -> None:
    first, asked = run(tmp_path)
    assert asked == 2 and all(d.rewritten and d.shift is not None for d in first.values())
    again, asked = run(tmp_path)
    assert asked == 0
    for name in first:
        same(first[name], again[name])


def test_a_kept_reason_is_remembered(tmp_path: Path) -> None:
    first, asked = run(tmp_path, spelled="low-rank:rank=14", objective="params")
    again, none = run(tmp_path, spelled="low-rank:rank=14", objective="params")
    assert (asked, none) == (2, 0)
    assert {d.reason for d in first.values()} == {d.reason for d in again.values()}
    assert not any(d.rewritten for d in again.values())


class Rectified(Mlp):
    """The same weights behind another activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(
    ("changes", "misses"),
    [
        ({"data": samples({"x": normal(64, 5, 24, seed=8)}, key="other")}, 2),
        ({"seed": 1}, 2),
        ({"spelled": "low-rank:rank=3"}, 2),
        ({"spelled": "low-rank:rank=4:params=0.9"}, 2),
        ({"objective": "nbytes"}, 2),
        ({"objective": "ms"}, 2),
        ({"module": Mlp(second=decaying(20, 32, 6))}, 2),
        ({"module": Mlp(bias=False)}, 2),
        ({"module": Mlp(first=decaying(32, 24, 7))}, 2),  # the second site's weight is as it was, its input is not
        ({"module": Rectified()}, 2),
        ({}, 0),
    ],
)
def test_what_a_fit_depends_on_is_in_its_key(changes: dict[str, Any], misses: int, tmp_path: Path) -> None:
    run(tmp_path)
    assert run(tmp_path, **changes)[1] == misses


def test_timings_of_another_machine_decide_nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, objective="ms")
    assert run(tmp_path, objective="ms")[1] == 0
    monkeypatch.setattr("rewriter.fit.hardware", lambda: "another machine")
    assert run(tmp_path, objective="ms")[1] == 2


def test_fits_of_other_code_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    monkeypatch.setattr("rewriter.fit.sources", lambda patterns=(): "changed")
    assert run(tmp_path)[1] == 2


def test_the_code_of_fits_is_all_of_it() -> None:
    package = Path(cache.__file__).parent
    files = {file.relative_to(package).as_posix() for pattern in FITTING for file in package.glob(pattern)}
    assert files >= {"moments.py", "budgeted.py", "passes/auto.py", "passes/structures/armor.py", "passes/solvers/armor.py"}
    assert "passes/solvers/bcd/engine.py" in files
    assert sources(FITTING) != sources()


def test_a_fit_after_another_pass_is_not_the_one_before_it(tmp_path: Path) -> None:
    """The second pass sees what the first one left, so its fits are other ones."""
    run(tmp_path)
    g = graph(Mlp())
    c = context(g, tmp_path)
    first, second = c.selected
    g.splice(first, Dense((0.1 * load_weight(g, first)).T.contiguous()))
    c.selected = [second]
    expected = one_of(g, c, tmp_path / "fresh")
    found = decide(g, c)["second"]
    same(found, expected)


def one_of(g: Graph, c: Context, folder: Path) -> Decision:
    clone_context = context(g, folder, selected=list(c.selected))
    decision = decide(g, clone_context)["second"]
    g.restore(decision.site)
    return decision


def test_in_parallel_keeps_order() -> None:
    def slow_first(i: int) -> int:
        time.sleep(0.02 if i == 0 else 0)
        return i * i

    assert list(in_parallel(slow_first, range(9), workers=4)) == [(i, i * i) for i in range(9)]
    assert list(in_parallel(slow_first, [], workers=4)) == []


def test_in_parallel_uses_its_workers() -> None:
    meeting = threading.Barrier(3, timeout=20)
    list(in_parallel(lambda i: meeting.wait(), range(3), workers=3))  # one worker alone would wait for ever


def test_in_parallel_hands_exceptions_on() -> None:
    def fail(i: int) -> int:
        if i == 5:
            raise ZeroDivisionError("five")
        return i

    seen: list[int] = []
    with pytest.raises(ZeroDivisionError, match="five"):
        seen.extend(i for i, _ in in_parallel(fail, range(100), workers=2))
    assert seen == [0, 1, 2, 3, 4]


def test_decisions_do_not_depend_on_the_order_of_sites(tmp_path: Path) -> None:
    parts = {f"part_{i}": linear(decaying(24, 24, i, 1.0), normal(24, seed=i)) for i in range(4)}

    def chain(net: Any, x: Tensor) -> Tensor:
        for i in range(4):
            x = torch.tanh(net.get_submodule(f"part_{i}")(x))
        return x

    found = []
    for seed in (1, 2):
        g = graph(Net(chain, **parts))
        c = context(g, tmp_path / str(seed))
        order = list(c.selected)
        random.Random(seed).shuffle(order)
        c.selected = order
        found.append(decide(g, c, "auto:params=0.5"))
    assert list(found[0]) != list(found[1])
    for name in found[0]:
        same(found[0][name], found[1][name])


def test_every_selected_site_has_one_decision_and_others_are_untouched(tmp_path: Path) -> None:
    g = graph(Mlp())
    c = context(g, tmp_path)
    c.selected = c.selected[:1]
    (step,) = parse_passes("low-rank:rank=4")
    assert [d.site.name for d in decide_all(g, c, _plan(step))] == ["first"]
    spliced = [n for n in g.clone().nodes() if g.op(n) == "structured"]
    assert len(spliced) == 1


def _plan(step: Any) -> Any:
    from rewriter.fit import Plan

    return Plan([step.structure], True, 1.0, True)


def test_a_structure_says_what_it_may_store_where_nobody_else_does(tmp_path: Path) -> None:
    """2:4 alone is half: ARMOR's wrappers have a sixteenth on top, and an option that sets no size asks for no more."""
    assert one(decaying(128, 128), tmp_path, "armor").after.params == 128 * 128 * 9 // 16
    assert not one(decaying(128, 128), tmp_path, "armor:params=0.5").rewritten
    for spelled, limit in (("armor", 270), ("armor:n=1", 150)):
        kept = one(decaying(20, 24), tmp_path, spelled)  # its smallest wrappers are too large
        assert not kept.rewritten and f"the limit is {limit}" in kept.reason
    with pytest.raises(RewriteError, match="the limit is 240"):
        one(decaying(20, 24), tmp_path, "armor:n=1:params=0.5")
