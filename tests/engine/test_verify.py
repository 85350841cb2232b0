"""The certificate against planted errors."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewriter import cubature
from rewriter.algebra import Dense
from rewriter.calibrate import Samples
from rewriter.errors import RewriteError
from rewriter.moments import layer_norm
from rewriter.report import OutputError
from rewriter.sampling import REPLICATIONS, Replicated
from rewriter.site_certificate import certify_site
from rewriter.tolerances import EQUAL
from rewriter.verify import beside, certify, interval, student_t
from tests.engine.nets import decaying, normal, samples

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


def test_tallies_do_not_hang_on_how_many_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    masked = normal(3, 4, 2, 6, dtype=torch.float64)
    batches = [{"x": masked, "attention_mask": mask}, {"x": normal(3, 6, seed=2)}, {"x": normal(3, seed=3)}]
    whole = [certified(noisy_tail, samples(batch)) for batch in batches]
    monkeypatch.setattr("rewriter.verify.ELEMENTS", 1)
    assert [certified(noisy_tail, samples(batch)) for batch in batches] == whole
    x, y, kept = masked, noisy_tail(masked), mask.bool()
    cosines = [float(torch.nn.functional.cosine_similarity(a[m], b[m], -1).mean()) for a, b, m in zip(x, y, kept, strict=True)]
    assert whole[0].cosine is not None
    rtol, atol = EQUAL[torch.float64]
    torch.testing.assert_close(whole[0].cosine, sum(cosines) / 3, rtol=rtol, atol=atol)
    torch.testing.assert_close(whole[0].estimate, float((x - y)[kept].norm() / x[kept].norm()), rtol=rtol, atol=atol)


def noisy_tail(x: Tensor) -> Tensor:
    return x + 0.3 * x.abs()


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


def noisy(x: Tensor) -> Tensor:
    """x with an error that differs from sample to sample: sqrt(E|x u|^2 / E|x|^2) is found by sampling alone."""
    return x * (1 + 0.1 * x[:, :1])


def replications(first: int = 2, cap: int = 1 << 12, law: str = "invented: normals") -> tuple[Replicated, list[tuple[int, int, int]]]:
    """Normals of width 6, random ones, and what was asked of them."""
    asked: list[tuple[int, int, int]] = []

    def draw(replication: int, start: int, count: int) -> list[dict[str, Tensor]]:
        asked.append((replication, start, count))
        return [{"x": normal(count, 6, seed=1000 * start + replication)}]

    return Replicated(draw, law, first, cap), asked


def drawn(points: Replicated, change: Any = noisy, **options: Any) -> OutputError:
    return certify(lambda feeds: {"y": feeds["x"]}, lambda feeds: {"y": change(feeds["x"])}, points, **options)


def test_the_jackknife_of_a_mean_is_its_t_interval() -> None:
    """Where the denominators are equal and all errors alike but for small changes, delta method and jackknife agree to first order."""
    lost = (1 + 1e-6 * normal(16, dtype=torch.float64)).tolist()
    estimate, half = interval(lost, [4.0] * 16)
    mean, spread = student_t([math.sqrt(value / 4) for value in lost])
    rtol, atol = EQUAL[torch.float32]
    torch.testing.assert_close(torch.tensor([estimate, half]), torch.tensor([mean, spread]), rtol=rtol, atol=atol * spread)


def test_all_samples_count_alike() -> None:
    """sqrt(sum lost / sum norm), not the mean of ratios, however they are dealt."""
    assert interval([1.0, 9.0], [1.0, 99.0])[0] == math.sqrt(10 / 100)
    x = torch.cat([normal(40, 6, dtype=torch.float64), 100 * normal(3, 6, seed=1, dtype=torch.float64)])
    expected, (rtol, atol) = float((noisy(x) - x).norm() / x.norm()), EQUAL[torch.float64]
    torch.testing.assert_close(certified(noisy, samples({"x": x})).estimate, expected, rtol=rtol, atol=atol)


def coverage(repetitions: int, share: float = 1.0) -> int:
    """How many intervals, their width times `share`, hold a site's error, which is known in closed form."""
    weight, moments = decaying(8, 6, power=0.5).double(), layer_norm(1 + normal(6, seed=5).abs(), normal(6, seed=6), rms=False)
    other = weight + 0.2 * normal(8, 6, seed=7, dtype=torch.float64)
    truth = moments.error(weight, other)
    found = [certify_site(weight, Dense(other.T), moments, precision=0.5, seed=seed) for seed in range(repetitions)]
    assert all(f.samples == 4 * REPLICATIONS for f in found)
    return sum(abs(f.estimate - truth) <= share * f.half_width for f in found)


def test_intervals_of_nets_cover_at_their_confidence() -> None:
    """Of 60, at least 57 less four binomial standard deviations; intervals of half the width would not."""
    least = 60 * 0.95 - 4 * math.sqrt(60 * 0.95 * 0.05)
    assert coverage(60) >= least > coverage(60, share=0.5)


def test_data_in_order_are_dealt_by_chance() -> None:
    """Samples that lie by their size u. Dealt in turn, all replications have the same sizes, and their spread misses what sizes do."""
    law = 0.1 * math.sqrt(((1.5**5 - 0.5**5) / 5) / ((1.5**3 - 0.5**3) / 3))  # u in [1/2, 3/2]: |0.1 u * u e| against |u e|
    by_chance = in_turn = 0
    for seed in range(60):
        size = 0.5 + torch.rand(256, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(0).values
        x = size * torch.nn.functional.normalize(normal(256, 6, seed=seed, dtype=torch.float64), dim=1)
        found = certified(lambda x: x * (1 + 0.1 * x.norm(dim=1, keepdim=True)), samples({"x": x}))
        by_chance += abs(found.estimate - law) <= found.half_width
        estimate, half = interval(*((size**power).reshape(-1, 16).sum(0).mul(share).tolist() for power, share in ((4, 0.01), (2, 1))))
        in_turn += abs(estimate - law) <= half
    assert by_chance >= 60 * 0.95 - 4 * math.sqrt(60 * 0.95 * 0.05) > in_turn


def test_replications_are_doubled_until_the_precision_is_reached() -> None:
    points, asked = replications()
    loose = drawn(points, precision=0.5)
    assert (loose.samples, loose.replications, loose.precision, loose.reached) == (2 * REPLICATIONS, REPLICATIONS, 0.5, True)
    assert asked == [(r, 0, 2) for r in range(REPLICATIONS)]
    asked.clear()
    fine = drawn(points, precision=0.05)
    rounds = [asked[i : i + REPLICATIONS] for i in range(0, len(asked), REPLICATIONS)]
    starts = [0, *(2 << i for i in range(len(rounds) - 1))]
    assert rounds == [[(r, start, max(start, 2)) for r in range(REPLICATIONS)] for start in starts] and len(rounds) > 1
    assert fine.reached and fine.half_width <= 0.05 * fine.estimate and fine.samples == 2 * starts[-1] * REPLICATIONS
    assert drawn(points, precision=0.05) == fine


def test_a_precision_out_of_reach_is_said() -> None:
    points, _ = replications(cap=100)
    found = drawn(points, precision=1e-6)
    assert (found.samples, found.reached) == (4 * REPLICATIONS, False)  # 8 * 16 would be above the cap
    assert drawn(points).precision == 0.05


@pytest.mark.parametrize("change", [lambda x: x, lambda x: math.nan * x])
def test_nothing_is_doubled_for_an_exact_or_a_broken_model(change: Any) -> None:
    points, asked = replications()
    found = drawn(points, change)
    assert len(asked) == REPLICATIONS and found.reached is (found.estimate == 0)


def test_a_bound_inside_the_interval_asks_for_more() -> None:
    """Both a bound just above the estimate and one below it; a bound outside is decided by the first round."""
    points, _ = replications()
    first = drawn(points, precision=0.9)
    assert first.samples == 2 * REPLICATIONS
    for factor in (0.5, -0.5):
        bound = first.estimate + factor * first.half_width
        more = drawn(points, precision=0.9, bound=bound)
        assert more.samples > first.samples
        assert not more.estimate - more.half_width <= bound < more.upper or more.samples == points.cap
    for factor in (1.5, -1.5):
        assert drawn(points, precision=0.9, bound=first.estimate + factor * first.half_width).samples == first.samples


def test_given_samples_are_all_used_whatever_is_asked() -> None:
    found, coarse, free = (certified(noisy, precision=p, bound=b) for p, b in ((1e-6, None), (0.9, None), (None, 0.1)))
    assert found.samples == coarse.samples == free.samples == 64
    assert (found.reached, coarse.reached, free.reached, free.precision) == (False, True, None, None)


def test_metric_is_averaged_within_replications() -> None:
    points, _ = replications()
    found = drawn(points, precision=0.5, metric=("m:f", lambda dense, other, feeds: float(feeds["x"].mean())))
    means = [float(normal(2, 6, seed=r).mean()) for r in range(REPLICATIONS)]
    assert found.metric is not None
    torch.testing.assert_close((found.metric["estimate"], found.metric["half_width"]), student_t(means))


def test_the_second_law_takes_one_round_of_the_same_output() -> None:
    points, asked = replications()
    found = beside(lambda f: {"a": f["x"], "b": f["x"]}, lambda f: {"a": 1.1 * f["x"], "b": 1.5 * f["x"]}, points, "a")
    assert len(asked) == REPLICATIONS and (found.samples, found.replications, found.note) == (32, REPLICATIONS, "")
    assert found.estimate is not None and found.max is not None and found.half_width is not None
    torch.testing.assert_close(torch.tensor([found.estimate, found.max, found.half_width]), torch.tensor([0.1, 0.1, 0.0]))
    assert found.law == "invented: normals"


@pytest.mark.parametrize("problem", [RewriteError("input 'n' is a scalar"), RuntimeError("index out of range\nin self"), KeyError("x")])
def test_a_model_that_refuses_invented_inputs_is_not_broken_by_them(problem: Exception) -> None:
    def refuse(feeds: Any) -> Any:
        raise problem

    found = beside(refuse, refuse, replications()[0], "y")
    assert (found.estimate, found.half_width, found.p99, found.max, found.samples) == (None, None, None, None, 0)
    assert type(problem).__name__ in found.note and "\n" not in found.note


def test_a_model_that_is_unbounded_on_invented_inputs_has_null_there() -> None:
    found = beside(lambda f: {"y": f["x"]}, lambda f: {"y": math.nan * f["x"]}, replications()[0], "y")
    assert (found.estimate, found.max, found.note) == (None, None, "unbounded there")


def test_a_site_is_certified_under_its_own_law() -> None:
    """The closed form is the oracle; a narrower interval takes more points; the seed names them."""
    weight, moments = decaying(20, 24).double(), layer_norm(1 + normal(24, seed=5).abs(), normal(24, seed=6), rms=False)
    other = decaying(20, 24, power=3.0).double()
    found, again, narrow = (certify_site(weight, Dense(other.T), moments, precision=p) for p in (0.01, 0.01, 0.002))
    truth = moments.error(weight, other)
    assert found == again and found.reached and found.half_width <= 0.01 * found.estimate
    assert narrow.samples > found.samples
    for f in (found, narrow):
        assert abs(f.estimate - truth) <= 2 * f.half_width
    assert found.max >= found.p99 > found.estimate
    assert found.law == "N(mean, covariance) of: upstream LayerNorm affine; scrambled Sobol' points"


@pytest.mark.parametrize("rule", cubature.RULES)
def test_a_site_is_certified_by_qmcpys_rules(rule: str) -> None:
    """With a mean and a covariance, against the closed form; the seed names the points."""
    weight, moments = decaying(20, 24).double(), layer_norm(1 + normal(24, seed=5).abs(), normal(24, seed=6), rms=False)
    other = decaying(20, 24, power=3.0).double()
    found, again, *more = (certify_site(weight, Dense(other.T), moments, 0.01, seed, rule) for seed in (0, 0, *range(1, 20)))
    truth = moments.error(weight, other)
    assert found == again and found.reached and found.half_width <= 0.01 * found.estimate
    assert len({f.estimate for f in (found, *more)}) == 20
    assert sum(abs(f.estimate - truth) <= f.half_width for f in (found, *more)) >= 15
    assert found.max >= found.p99 > found.estimate and found.samples >= 1024
    assert found.law.startswith("N(mean, covariance) of: upstream LayerNorm affine; ")


def test_points_that_qmcpy_does_not_have_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = decaying(20, 24), layer_norm(torch.ones(24), None, rms=True)
    with pytest.raises(RewriteError, match="rule 'halton' is unknown; give one of sobol, lattice, net, cone"):
        certify_site(weight, Dense(weight.T), moments, rule="halton")
    monkeypatch.setitem(cubature.RULES, "net", replace(cubature.RULES["net"], most=23))
    with pytest.raises(RewriteError, match="24 inputs are beyond the 23 dimensions of QMCPy's DigitalNetB2; give the rule sobol"):
        certify_site(weight, Dense(weight.T), moments, rule="net")
    monkeypatch.setitem(sys.modules, "qmcpy", None)
    with pytest.raises(RewriteError, match=r"need QMCPy \(.*\); pip install 'rewriter\[qmc\]', or give the rule sobol"):
        certify_site(weight, Dense(weight.T), moments, rule="lattice")


def test_a_site_of_another_shape_is_refused() -> None:
    with pytest.raises(RewriteError, match=r"are of \[20, 24\], \[24, 20\] and 24 inputs; give two"):
        certify_site(decaying(20, 24), Dense(decaying(20, 24)), layer_norm(torch.ones(24), None, rms=True))
