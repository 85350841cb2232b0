"""The certificate against planted errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter.calibrate import Samples
from rewriter.errors import RewriteError
from rewriter.report import OutputError
from rewriter.verify import certify, student_t
from tests.engine.nets import normal, samples

BATCHES = [{"x": normal(8, 6, seed=i)} for i in range(8)]


def certified(change: Any, data: Samples | None = None, **options: Any) -> OutputError:
    def same(feeds: Any) -> dict[str, Tensor]:
        return {"y": feeds["x"]}

    return certify(same, lambda feeds: {"y": change(feeds["x"])}, data or samples(*BATCHES), **options)


def test_planted_factor() -> None:
    found = certified(lambda x: 1.1 * x, bound=0.2)
    torch.testing.assert_close(torch.tensor([found.estimate, found.p99, found.max]), torch.full((3,), 0.1))
    torch.testing.assert_close(torch.tensor([found.half_width, found.cosine]), torch.tensor([0.0, 1.0]))
    assert (found.samples, found.replications, found.bound, found.output, found.norm) == (64, 16, 0.2, "y", "relative_l2")
    assert found.law == "data: test"


def test_equal_outputs_have_no_error_and_no_width() -> None:
    found = certified(lambda x: x)
    assert found.upper == found.max == 0


def test_noise_within_the_interval() -> None:
    """|noise| / |x| for unit normals scaled by 0.3 is 0.3, up to the interval tenfold."""
    found = certified(lambda x: x + 0.3 * normal(*x.shape, seed=int(x[0, 0] * 1e6) % 1000))
    assert abs(found.estimate - 0.3) < 3 * found.half_width < 0.3
    assert found.max > found.estimate


def test_intervals_cover_at_their_confidence() -> None:
    """Of 1000 intervals for the mean of normals about 950 hold it: within four binomial standard deviations, and not by being wide."""
    draws = normal(1000, 16, dtype=torch.float64).tolist()
    covered = sum(abs(mean) <= half for mean, half in map(student_t, draws))
    assert abs(covered - 950) <= 4 * math.sqrt(1000 * 0.95 * 0.05)
    for confidence in (0.5, 0.99):
        held = sum(abs(mean) <= half for mean, half in (student_t(d, confidence) for d in draws))
        assert abs(held - 1000 * confidence) <= 4 * math.sqrt(1000 * confidence * (1 - confidence))


def test_one_replication_has_no_interval() -> None:
    found = certified(lambda x: 1.1 * x, samples({"x": normal(1, 6)}))
    assert found.half_width == math.inf and found.upper == math.inf
    assert certified(lambda x: x, samples({"x": normal(1, 6)})).upper == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [1, 8])
def test_poison_anywhere_gives_an_infinite_upper_end(poison: float, rows: int) -> None:
    def change(x: Tensor) -> Tensor:
        y = x.clone()
        y[:rows, 2] = poison
        return y

    found = certified(change)
    assert found.upper == math.inf
    assert found.max == math.inf and found.p99 > 0  # p99 is a number or inf, never NaN


def test_something_out_of_nothing_is_infinite() -> None:
    assert certified(lambda x: x + 1, samples({"x": torch.zeros(4, 6)})).upper == math.inf
    assert certified(lambda x: x, samples({"x": torch.zeros(4, 6)})).upper == 0


def test_changed_shape_is_refused() -> None:
    with pytest.raises(RewriteError, match=r"output 'y' changed its shape: \[8, 6\] became \[8, 5\]"):
        certified(lambda x: x[:, :5])


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(RewriteError, match="no float output"):
        certify(lambda f: {"y": f["x"].long()}, lambda f: {"y": f["x"].long()}, samples(*BATCHES))


def test_padding_does_not_count() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = {"x": normal(2, 4, 6), "attention_mask": mask}

    def at(hidden: int) -> float:
        return certified(lambda x: torch.where((mask == hidden)[..., None], 2 * x, x), samples(batch)).estimate

    assert at(0) == 0  # only padding was changed
    torch.testing.assert_close(at(1), 1.0)


def test_the_worst_output_is_certified() -> None:
    def dense(feeds: Any) -> dict[str, Tensor]:
        return {name: feeds["x"] for name in "abc"}

    def other(feeds: Any) -> dict[str, Tensor]:
        return {"a": 1.1 * feeds["x"], "b": 1.5 * feeds["x"], "c": feeds["x"]}

    found = certify(dense, other, samples(*BATCHES))
    assert found.output == "b"
    torch.testing.assert_close(found.estimate, 0.5)


def test_an_output_of_nan_is_the_worst() -> None:
    def other(feeds: Any) -> dict[str, Tensor]:
        return {"a": 9 * feeds["x"], "b": torch.full_like(feeds["x"], math.nan)}

    found = certify(lambda f: {"a": f["x"], "b": f["x"]}, other, samples(*BATCHES))
    assert found.output == "b" and found.upper == math.inf


def test_metric_is_scored_on_every_batch() -> None:
    def metric(dense: Any, other: Any, feeds: Any) -> float:
        assert dense["y"] is feeds["x"]
        return float((other["y"] / dense["y"]).mean())

    found = certified(lambda x: 1.5 * x, metric=("m:f", metric))
    assert found.metric is not None
    assert found.metric["name"] == "m:f"
    torch.testing.assert_close(torch.tensor([found.metric["estimate"], found.metric["half_width"]]), torch.tensor([1.5, 0.0]))
