"""The pass: lossy sites come out better, everything else as it was, and the wall clock is kept."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.calibrate import Feeds
from rewriter.errors import RewriteError
from rewriter.graph import Graph
from rewriter.operator import flatten
from rewriter.passes.heal import Heal
from rewriter.passes.healing import session, training
from rewriter.passes.healing.blockwise import Chain
from rewriter.registry import parse_passes
from rewriter.structure import spell
from rewriter.tolerances import EQUAL
from tests.engine.nets import context, graph, normal, samples
from tests.passes.blocks import TAPE, WIDTH, Blocks, after_two, data, error, made, spliced


@pytest.mark.parametrize(
    "options", ["steps=80", "steps=240:guided=true", "steps=80:weighted=true", "steps=80:average=0.9", "steps=80:blockwise=0.5"]
)
@pytest.mark.parametrize("first", ["low-rank:params=0.5", "monarch:params=0.5", "armor:params=0.9:block=4"])
def test_every_family_gets_better(options: str, first: str, tmp_path: Path) -> None:
    module = Blocks()
    g, before, after = after_two(tmp_path, module, f"heal:{options}", first)
    assert error(g, module) < error(spliced(module, before), module)
    for key, d in after.items():
        assert "healed: loss on held-back samples" in d.reason and f"in {re.findall(r'[0-9]+', options)[0]} steps" in d.reason
        assert d.operator is not None and type(d.operator) is type(before[key].operator)
        assert (d.structure, d.after, d.before) == (before[key].structure, before[key].after, before[key].before)


def test_the_graph_holds_what_the_decisions_say(tmp_path: Path) -> None:
    module = Blocks()
    g, _, after = after_two(tmp_path, module, "heal:steps=30:guided=true")
    (name,) = g.output_names()
    x = {"x": normal(2, 3, WIDTH, seed=7)}
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(g.run(x)[name], spliced(module, after).run(x)[name], rtol=rtol, atol=atol)
    assert not any(t.requires_grad for d in after.values() if d.operator for t in flatten(d.operator)[0])


def test_biases_train_where_there_are_some(tmp_path: Path) -> None:
    for bias in (True, False):
        _, before, after = after_two(tmp_path / str(bias), Blocks(bias), "heal:steps=20")
        for key, d in after.items():
            if d.site.name.startswith("b") and not bias:
                assert d.shift is None
            else:
                assert d.shift is not None and before[key].shift is not None and not torch.equal(d.shift, before[key].shift)


def test_exact_sites_and_kept_ones_are_left_alone(tmp_path: Path) -> None:
    _, before, after = after_two(tmp_path, Blocks(exact=True), "heal:steps=10", "auto:params=0.5", ("a.0", "b.0", "a.1"))
    by_name = {d.site.name: (before[d.site.id], d) for d in after.values()}
    assert set(by_name) == {"a.0", "b.0", "a.1"}
    was, now = by_name["a.0"]
    assert was.exact and now is was
    assert by_name["b.0"][1] is not by_name["b.0"][0]


def test_a_site_that_nothing_rewrote_has_its_reason(tmp_path: Path) -> None:
    g = graph(Blocks(), TAPE)
    decisions = list(Heal(steps=1).run(g, context(g, tmp_path, data=data())))
    assert len(decisions) == 6 and all("none rewrote this one" in d.reason and not d.rewritten for d in decisions)


def test_half_precision_is_left_as_it_was(tmp_path: Path) -> None:
    g = graph(Blocks().to(torch.bfloat16), TAPE.replace("float32", "bfloat16"))
    c = context(g, tmp_path, data=samples(*[{"x": b["x"].bfloat16()} for b in data().batches]))
    (fit,) = parse_passes("low-rank:params=0.5")
    c.decisions.update({d.site.id: d for d in fit.run(g, c)})
    assert all(d is c.decisions[d.site.id] for d in Heal(steps=1).run(g, c))


def test_training_that_does_not_help_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rising = iter(range(1, 1000))
    monkeypatch.setattr(session.Session, "_of", lambda self, i, loss, grad: self._probe(grad), raising=True)
    weights: list[Tensor] = []

    def probe(self: session.Session, grad: bool) -> Tensor:
        if not grad:
            return torch.tensor(float(next(rising)))
        if not weights:
            weights.extend(t for names in self.graph._trained.values() for t in (self.graph.program.state_dict[n] for n in names))  # type: ignore[attr-defined]
        return sum((t.square().sum() for t in weights if t.requires_grad), torch.zeros(()))

    monkeypatch.setattr(session.Session, "_probe", probe, raising=False)
    _, before, after = after_two(tmp_path, Blocks(), "heal:steps=12")
    for key, d in after.items():
        assert "healing did not help" in d.reason
        assert d.operator is before[key].operator and d.shift is before[key].shift


def test_a_failure_leaves_the_graph_as_it_was(tmp_path: Path) -> None:
    def fails(outputs: Mapping[str, Tensor], feeds: Feeds) -> Tensor:
        raise ZeroDivisionError("mine")

    module = Blocks()
    g = graph(module, TAPE)
    c = context(g, tmp_path, data=data())
    (fit,) = parse_passes("low-rank:params=0.5")
    c.decisions.update({d.site.id: d for d in fit.run(g, c)})
    with pytest.raises(ZeroDivisionError, match="mine"):
        list(Heal(steps=3, loss=fails).run(g, c))
    (name,) = g.output_names()
    x = {"x": normal(2, 3, WIDTH, seed=7)}
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(g.run(x)[name], spliced(module, c.decisions).run(x)[name], rtol=rtol, atol=atol)


def test_steps_are_reproducible(tmp_path: Path) -> None:
    found = [after_two(tmp_path / str(i), Blocks(), "heal:steps=12")[2] for i in range(2)]
    for key, d in found[0].items():
        other = found[1][key].operator
        assert d.operator is not None and other is not None
        assert all(torch.equal(a, b) for a, b in zip(flatten(d.operator)[0], flatten(other)[0], strict=True))


@pytest.mark.parametrize("heal", ["heal:minutes=1", "heal:minutes=1:blockwise=0.5"])
def test_the_minutes_are_a_promise(heal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that every look moves by an eighth of a second: the dense model's states and the training end within a minute."""
    ticks = itertools.count()
    now = [0.0]

    def tick() -> float:
        now[0] = next(ticks) / 8
        return now[0]

    monkeypatch.setattr(training.time, "monotonic", tick)
    _, _, after = after_two(tmp_path, Blocks(), heal)
    assert now[0] <= 60.0
    assert all("healed" in d.reason for d in after.values())


def test_the_dense_model_takes_only_a_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has not said by then is neither trained on nor a judge; there are one of each at least."""
    now, seen = [0.0], list[int]()
    put = session.Targets.put

    def slow(self: session.Targets, index: int, found: Mapping[str, Tensor]) -> None:
        seen.append(index)
        now[0] += 5.0
        put(self, index, found)

    monkeypatch.setattr(session.Targets, "put", slow)
    monkeypatch.setattr(training.time, "monotonic", lambda: now.__setitem__(0, now[0] + 0.1) or now[0])
    _, _, after = after_two(tmp_path, Blocks(), "heal:minutes=1")
    assert seen[0] == 0 and all(i % session.HELD_OUT for i in seen[1:]) and 3 <= len(seen) <= 5
    assert all("healed: loss" in d.reason for d in after.values())


@pytest.mark.parametrize(
    ("heal", "batch"),
    [
        *itertools.product(["heal:minutes=5", "heal:minutes=5:blockwise=0.25"], [0.5, 4.0, 12.0, 30.0]),
        ("heal:minutes=5", 100.0),
    ],
)
def test_slow_models_keep_the_minutes_too(heal: str, batch: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of the model over a batch moves the clock, three times as far where it learns."""
    now = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])

    def slow(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            now[0] += 3 * batch if given[-1] is True else batch
            return inner(*given)

        return call

    monkeypatch.setattr(session, "states", slow(session.states))
    monkeypatch.setattr(Chain, "values", slow(Chain.values))
    _, _, after = after_two(tmp_path, Blocks(), heal)
    assert now[0] <= 300.0
    said = {
        0.5: "; healed: loss",
        4.0: "; healed: loss",
        12.0: " steps",
        30.0: " steps): left as it was",
        100.0: "0 steps): left as it was",
    }[batch]
    assert all(said in d.reason for d in after.values())


def test_own_data_and_loss(tmp_path: Path) -> None:
    """Labels come with the feeds, and the outputs go where they say, away from the dense model's."""
    goal = normal(WIDTH, seed=77)
    feeds = [{**batch, "label": goal.expand(*batch["x"].shape)} for batch in data(2).batches]

    def loss(outputs: Mapping[str, Tensor], given: Feeds) -> Tensor:
        (y,) = outputs.values()
        return (y - given["label"]).square().mean()

    module = Blocks()
    g, before, after = after_two(tmp_path, module, Heal(steps=150, data=iter(feeds), loss=loss))

    def far(one: Graph) -> float:
        return sum(float(loss(one.run(batch), {"label": goal})) for batch in data(1).batches)

    assert all("healed" in d.reason for d in after.values())
    assert far(g) < 0.8 * far(spliced(module, before))


@pytest.mark.parametrize(
    ("heal", "said"),
    [
        ("heal:minutes=0", "heal:minutes=0.0 is out of range"),
        ("heal:minutes=20000", "heal:minutes=20000.0 is out of range"),
        ("heal:rate=0", "heal:rate=0.0 is out of range"),
        ("heal:rate=1.5", "heal:rate=1.5 is out of range"),
        ("heal:average=1", "heal:average=1.0 is out of range"),
        ("heal:blockwise=1", "heal:blockwise=1.0 is out of range"),
        ("heal:data=x.npz", "heal takes data and loss from Python only"),
        ("heal:loss=mine", "heal takes data and loss from Python only"),
        ("heal:steps=0", "heal:steps=0 is out of range"),
    ],
)
def test_bad_options(heal: str, said: str) -> None:
    with pytest.raises(RewriteError, match=said):
        parse_passes(heal)


def test_it_refuses_invented_samples_and_too_few(tmp_path: Path) -> None:
    g = graph(Blocks(), TAPE)
    c = context(g, tmp_path, data=data())
    (fit,) = parse_passes("low-rank:params=0.5")
    c.decisions.update({d.site.id: d for d in fit.run(g, c)})
    assert c.calibration.samples is not None
    c.calibration.samples.invented = True
    with pytest.raises(RewriteError, match=r"invented inputs are not that; give --data"):
        list(Heal(steps=1).run(g, c))
    with pytest.raises(RewriteError, match="heal needs two batches"):
        list(Heal(steps=1, data=data().batches[:1]).run(g, c))


def test_it_refuses_onnx() -> None:
    g = made(Blocks(), onnx=True)
    with pytest.raises(RewriteError, match=r"an ONNX model does not; give the torch model"):
        Heal().requires(g)


def test_it_prints_as_it_is_written() -> None:
    assert spell(Heal(minutes=15.0)) == "heal:minutes=15.0"
    assert Heal(steps=10, data=data().batches, loss=print, guided=True).spelling() == "heal:steps=10:guided=True"
