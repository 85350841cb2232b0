"""The parts of healing: states on disk, the loss, the loop and its promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewriter.passes.healing import training
from rewriter.passes.healing.guided import Guided
from rewriter.passes.healing.loss import DECIBELS, OUTPUT, SMOOTHED, Loss, distance
from rewriter.passes.healing.targets import LARGEST, Targets, states
from rewriter.passes.healing.training import CHECKS, PATIENCE, Clock, Trained, train
from rewriter.passes.structures.low_rank import LowRank
from tests.engine.nets import Mlp, graph, normal, sites
from tests.passes.blocks import close

STEPS = 60


def test_states_are_kept_to_three_digits_and_large_and_small_ones_whole(tmp_path: Path) -> None:
    targets = Targets(tmp_path)
    small, large = normal(5, 3), normal(5, 3, seed=1) * 4 * LARGEST
    tiny = normal(5, 3, seed=2) * 1e-9
    targets.put(3, {"0": small, "1": tiny, ":y": large, ":none": torch.zeros(0, 3)})
    found = targets[3]
    close(found["0"], small, torch.float16)
    assert torch.equal(found[":y"], large) and torch.equal(found["1"], tiny) and found[":none"].shape == (0, 3)


def test_states_leave_padding_out() -> None:
    g = graph(Mlp(), "x:float32[batch,seq,24]")
    first = next(s for s in sites(g) if s.name == "first")
    x, mask = normal(3, 5, 24), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    found, outputs = states(g, [first.places[0].y], {"x": x, "attention_mask": mask})
    (name,) = outputs
    real = mask.bool()
    close(found[f":{name}"], outputs[name][real])
    assert found["0"].shape == (9, 32)
    close(found[f":{name} mean"], torch.stack([outputs[name][i, real[i]].mean(0) for i in range(3)]))


def test_distances_and_logits() -> None:
    found, wanted = normal(6, 5), normal(6, 5, seed=1)
    close(distance(found, wanted), ((found - wanted) ** 2).sum() / (wanted**2).sum())
    loss = Loss(logits=frozenset({"logits"}))
    kl = torch.nn.functional.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
    close(loss.output(":logits", found, wanted), kl)
    total = loss({"0": found, ":logits": found, ":y": found}, {"0": wanted, ":logits": wanted, ":y": wanted})
    close(total, distance(found, wanted) + OUTPUT * (kl + distance(found, wanted)))


def test_block_weights_by_their_signal_to_noise() -> None:
    wanted = {"0": normal(8, 4), "1": normal(8, 4, seed=1)}
    noises = {"0": 0.1, "1": 0.4}
    loss, smooth = Loss(weighted=True), dict[str, float]()
    for step in range(3):
        found = {k: w + noises[k] * normal(8, 4, seed=step + 5) for k, w in wanted.items()}
        errors = {k: float(distance(found[k], wanted[k])) for k in wanted}
        for k, e in errors.items():
            now = -10 * math.log10(e)
            smooth[k] = SMOOTHED * smooth.get(k, now) + (1 - SMOOTHED) * now
        lag = smooth["0"] - smooth["1"]
        weights = {"0": 1.0, "1": 2 - math.exp(-(lag**2) / (2 * DECIBELS**2))}
        assert lag > 0 and 1 < weights["1"] < 2
        close(loss(found, wanted), torch.tensor(sum(weights[k] * errors[k] for k in errors) / 2))


def test_a_guided_weight_goes_from_dense_to_factors() -> None:
    student, weight = LowRank(normal(7, 2), normal(2, 5)), normal(5, 7)
    guided = Guided.of(student, weight)
    close(guided.dense(), weight)
    for share in (0.25, 0.0):
        guided.mix(share)
        close(guided.dense(), share * weight + (1 - share) * student.dense())


def run(tensors: Sequence[Tensor], goal: Tensor, steps: int = STEPS, rate: float = 0.05, average: float = 0.0, seed: int = 0) -> Trained:
    """Towards a goal, in the first tensor."""
    for t in tensors:
        t.requires_grad_()

    def loss(index: int) -> Tensor:
        return (tensors[0] - goal).square().sum() * (1 + index)

    rng = torch.Generator().manual_seed(seed)
    clock = Clock(0.0, 1.0, steps)
    *_, came = train(tensors, loss, lambda: float(loss(0)), [0, 1, 2], clock, rate, average, rng, lambda progress: None)
    return came


@given(rate=st.floats(1e-3, 1.0), scale=st.floats(1e-4, 1e3), average=st.sampled_from([0.0, 0.9]))
def test_it_is_never_worse_than_its_start(rate: float, scale: float, average: float) -> None:
    start, goal = scale * normal(3, 4), scale * normal(3, 4, seed=1)
    tensor = start.clone()
    came = run([tensor], goal, 20, rate, average)
    now = float((tensor.detach() - goal).square().sum())
    assert came.after <= came.before and now == came.after


def test_what_only_gets_worse_is_taken_back_and_ended() -> None:
    tensor = normal(3, 4).requires_grad_()
    start = tensor.detach().clone()
    worse = iter(range(1000))
    rng = torch.Generator().manual_seed(0)
    steps = train(
        [tensor], lambda i: tensor.square().sum(), lambda: float(next(worse)), [0], Clock(0.0, 1.0, 480), 0.05, 0.0, rng, lambda p: None
    )
    *_, came = steps
    assert torch.equal(tensor.detach(), start) and came.after == came.before == 0
    assert PATIENCE * (480 // CHECKS) <= came.steps <= PATIENCE * (480 // CHECKS + 1)


def test_a_rate_that_is_far_too_large_is_halved_until_it_helps() -> None:
    """Each check without a gain goes back to the best weights; at the full rate, a step always overshoots."""
    tensor, goal = torch.ones(3, 4), torch.full((3, 4), 1.001)
    came = run([tensor], goal, 600, rate=0.02)
    assert came.after < 0.1 * came.before


def test_the_schedule_begins_with_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the teacher took is over: the first step is small, however late it comes, and the first check is not at once."""
    now, moved, checks = [70.0], list[float](), list[int]()
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    tensor, rate = torch.ones(3, 4, requires_grad=True), 0.05

    def loss(index: int) -> Tensor:
        now[0] += 1.0
        moved.append(float((tensor.detach() - 1).abs().max()))
        return tensor.sum()

    def validate() -> float:
        checks.append(len(moved))
        return float(tensor.detach().sum())

    *_, _came = train([tensor], loss, validate, [0], Clock(0.0, 170.0), rate, 0.0, torch.Generator(), lambda p: None)
    assert moved[1] < 0.1 * rate
    assert checks[:2] == [0, math.ceil(100 / CHECKS)]


def test_checks_take_a_tenth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now, spent = [0.0], [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    tensor = torch.ones(3, 4, requires_grad=True)

    def loss(index: int) -> Tensor:
        now[0] += 0.25
        return tensor.square().sum()

    def validate() -> float:
        now[0] += 4.0
        spent[0] += 4.0
        return float(tensor.detach().square().sum())

    *_, came = train([tensor], loss, validate, [0], Clock(0.0, 200.0), 0.05, 0.0, torch.Generator(), lambda p: None)
    # besides those before the first step and after the last one
    assert 8 < spent[0] <= 0.1 * 200 + 2 * 4 and came.steps > 0


def test_tensors_of_every_size_arrive() -> None:
    """Steps are relative: a factor a thousand times smaller than another needs no other rate."""
    for scale in (1e-2, 1.0, 1e3):
        tensor = scale * normal(3, 4)
        came = run([tensor], scale * normal(3, 4, seed=1), 300)
        assert came.after < 1e-2 * came.before


def test_the_same_seed_gives_the_same_tensors() -> None:
    found = []
    for seed in (0, 0, 1):
        tensor = normal(3, 4)
        run([tensor], normal(3, 4, seed=1), 7, seed=seed)
        found.append(tensor.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_an_average_is_what_is_judged_and_kept() -> None:
    tensor, goal, average = normal(3, 4).requires_grad_(), normal(3, 4, seed=1), 0.8
    mean, seen, judged = tensor.detach().clone(), [], list[Tensor]()

    def loss(index: int) -> Tensor:
        seen.append(tensor.detach().clone())
        return (tensor - goal).square().sum()

    def validate() -> float:
        judged.append(tensor.detach().clone())
        return float((tensor.detach() - goal).square().sum())

    rng = torch.Generator().manual_seed(0)
    *_, came = train([tensor], loss, validate, [0], Clock(0.0, 1.0, 10), 0.02, average, rng, lambda p: None)
    # the weights after step i are those that step i + 1 saw; a warm average: 1 - min(average, i / (i + 9)) of each
    for i, weights in enumerate(seen[1:], 1):
        mean.lerp_(weights, 1 - min(average, i / (i + 9)))
    assert any(torch.equal(mean, j) for j in judged)
    assert torch.equal(tensor.detach(), judged[[float((j - goal).square().sum()) for j in judged].index(came.after)])


@pytest.mark.parametrize(("step", "check"), [(0.5, 0.2), (3.0, 0.1), (0.1, 2.0)])
def test_the_time_is_kept(step: float, check: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that the steps and checks themselves move."""
    now = [100.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    tensor = normal(3, 4).requires_grad_()

    def loss(index: int) -> Tensor:
        now[0] += step
        return tensor.square().sum()

    def validate() -> float:
        now[0] += check
        return float(tensor.detach().square().sum())

    rng = torch.Generator().manual_seed(0)
    *_, came = train([tensor], loss, validate, [0], Clock(100.0, 60.0), 0.05, 0.0, rng, lambda p: None)
    assert now[0] <= 160.0
    assert now[0] >= 160.0 - 4 * (step + check) and came.steps > 0 and came.after < came.before


@pytest.mark.parametrize("check", [0.0, 12.0, 40.0, 70.0])
def test_without_time_for_a_step_nothing_is_done(check: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check takes so much of the minute that a step might not fit, or the clock has stopped before."""
    now = [100.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    tensor = normal(3, 4).requires_grad_()

    def validate() -> float:
        now[0] += check
        return 1.0

    def loss(index: int) -> Tensor:
        raise AssertionError("a step")

    clock = Clock(100.0, 60.0) if check else Clock(0.0, 90.0).part(0, 1.0, 3)
    *_, came = train([tensor], loss, validate, [0], clock, 0.05, 0.0, torch.Generator(), lambda p: None)
    assert came == Trained(1.0, 1.0, 0) and now[0] == 100.0 + check
