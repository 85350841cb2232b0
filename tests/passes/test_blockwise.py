"""Blocks one after another: each sees what the ones before it give now, learns its own end, and leaves the others alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.cuts import cuts
from rewriter.graph import Graph, Value
from rewriter.passes.healing import blockwise, session, training
from rewriter.passes.healing.blockwise import Chain
from rewriter.passes.healing.targets import Targets, states
from rewriter.passes.healing.training import Clock
from rewriter.passes.structures.low_rank import LowRank
from tests.engine.nets import normal, sites
from tests.passes.blocks import WIDTH, Blocks, after_two, close, data, error, made, spliced


def ends(g: Graph) -> list[Value]:
    return [value for value, _ in cuts(g, sites(g))]


@pytest.mark.parametrize("onnx", [False, True], ids=["torch", "onnx"])
def test_a_part_is_what_the_whole_has_there(onnx: bool) -> None:
    """From a given state to the next one, with another state than the model's own as well."""
    g, (feeds, *_) = made(Blocks(), onnx), data().batches
    _, first, second, _ = ends(g)  # the first site alone, then the rest of its block, and two whole blocks
    found = dict[str, Tensor]()
    g.run(feeds, {first: lambda x: found.update(first=x), second: lambda x: found.update(second=x)})
    for given in ({}, {first: found["first"]}):
        for a, b in zip(g.part(feeds, given, [first, second]), (found["first"], found["second"]), strict=True):
            close(a, b)
    (zero,) = g.part(feeds, {first: torch.zeros_like(found["first"])}, [second])
    block = Blocks()
    close(zero, block.b[1](torch.tanh(block.a[1](torch.zeros_like(zero)))).detach())


def test_a_part_goes_through_what_was_rewritten_and_learns_nothing_before_it() -> None:
    g, (feeds, *_) = made(Blocks()), data().batches
    _, first, second, _ = ends(g)
    by_name = {s.name: s for s in sites(g)}
    for name in ("a.0", "a.1"):
        g.splice(by_name[name], LowRank(normal(WIDTH, 2, seed=1), normal(2, 28, seed=2)))
    before, inside = (g.trainable(by_name[name])[0].requires_grad_() for name in ("a.0", "a.1"))
    g.part(feeds, {first: normal(8, 4, WIDTH)}, [second], grad=True)[0].square().sum().backward()
    assert inside.grad is not None and before.grad is None
    assert not g.part(feeds, {first: normal(8, 4, WIDTH)}, [second])[0].requires_grad


def test_a_block_gets_what_the_one_before_it_gives_now(tmp_path: Path) -> None:
    g, feeds = made(Blocks()), data().batches
    targets, values = Targets(tmp_path / "t"), ends(g)
    (tmp_path / "t").mkdir()
    (tmp_path / "x").mkdir()
    for index in (0, 1):
        targets.put(index, states(g, values, feeds[index])[0])
    site = next(s for s in sites(g) if s.name == "a.0")
    g.splice(site, LowRank(normal(WIDTH, 2, seed=1), normal(2, 28, seed=2)))
    chain = Chain(g, values, feeds, targets, tmp_path / "x")
    given = dict[str, Tensor]()
    for block in range(2):
        chain.advance(block, [0, 1])
        g.run(feeds[1], {values[block]: lambda x: given.update(x=x)})
        close(chain.inputs[blockwise._file(block, 1)]["x"], given["x"], torch.float16)
    whole = states(g, values, feeds[1])[0]["2"]
    close(chain.loss(2, 1, False), ((whole - targets[1]["2"]).square().sum() / targets[1]["2"].square().sum()), torch.float16)


def test_blocks_alone_bring_the_output_nearer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the training of all together."""
    monkeypatch.setattr(session.Session, "_train", lambda self, students, taken: session.Trained(1.0, 0.0, 1))
    module = Blocks()
    g, before, after = after_two(tmp_path, module, "heal:steps=120:blockwise=0.9")
    assert error(g, module) < error(spliced(module, before), module)
    assert all(d.operator is not before[key].operator for key, d in after.items())


def test_each_block_has_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the steps, and of the factors."""
    seen = list[tuple[int, int]]()
    inner = session.Session._block

    def spy(self: Any, chain: Any, block: int, tensors: Any, clock: Clock) -> Any:
        assert clock.steps is not None
        seen.append((len(tensors), clock.steps))
        return inner(self, chain, block, tensors, clock)

    monkeypatch.setattr(session.Session, "_block", spy)
    _, _, after = after_two(tmp_path, Blocks(), "heal:steps=40:blockwise=0.75")
    counts, steps = zip(*seen, strict=True)
    assert counts == (3, 3, 6, 6)  # two factors and a bias of each site
    assert steps[0] == 30 // 4 and sum(steps[:3]) < 30
    assert all("healed" in d.reason for d in after.values())


def test_worse_blocks_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the blocks did to the model as a whole counts, not only what came after."""

    def spoils(self: Any, students: Mapping[str, Any]) -> int:
        with torch.no_grad():
            for student in students.values():
                for tensor in student.tensors:
                    tensor.mul_(3)
        return 7

    monkeypatch.setattr(session.Session, "_reconstruct", spoils)
    _, before, after = after_two(tmp_path, Blocks(), "heal:steps=8:blockwise=0.5")
    for key, d in after.items():
        assert "healing did not help" in d.reason and d.operator is before[key].operator


def test_the_time_of_the_blocks_ends_with_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.time, "monotonic", lambda: 130.0)
    clock = Clock(100.0, 60.0)
    part = clock.part(0, 0.75, 3)
    assert (part.begin, part.seconds) == (130.0, 5.0)
    assert clock.part(0, 0.25, 3).seconds == 0.0 and clock.less(7) is clock
    assert Clock(0.0, 1.0, 40).part(10, 0.75, 2).steps == 10 and Clock(0.0, 1.0, 40).less(30).steps == 10
