"""Calibration: whose moments, over which rows, and from where when there is no data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import calibrate
from rewriter.calibrate import Calibration, Samples
from rewriter.errors import RewriteError
from rewriter.graph import Graph
from rewriter.moments import Moments, layer_norm
from rewriter.passes.structures.low_rank import LowRank
from rewriter.progress import Progress
from tests.engine.nets import MLP, Mlp, Net, as_onnx, decaying, graph, linear, normal, samples, sites

MASKED = (MLP, "attention_mask:int64[batch,seq]")


def found(g: Graph, data: Samples | None) -> dict[str, Moments | None]:
    calibration = Calibration(g, data, Progress(True))
    return {site.name: moments for group in calibration.moments(sites(g)) for site, moments in group}


def same(a: Moments | None, b: Moments | None) -> None:
    assert a is not None and b is not None and a.count == b.count
    torch.testing.assert_close(a.second.float(), b.second.float())
    torch.testing.assert_close(a.mean.float(), b.mean.float())


class Masked(nn.Module):
    """Reads the mask only so that it stays an input; `flat` joins batch and sequence first, as Conv1D does."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.inner, self.flat = Mlp(), flat

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        if self.flat:
            return self.inner(x.reshape(-1, 24)).reshape(x.shape[0], x.shape[1], 20) + attention_mask[..., None]
        return self.inner(x) + attention_mask[..., None]


@pytest.mark.parametrize("flat", [False, True])
def test_padding_never_counts(flat: bool) -> None:
    x, mask = normal(3, 5, 24), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    poisoned = torch.where(mask[..., None] == 0, 1e3 * normal(3, 5, 24, seed=7), x)
    g = graph(Masked(flat), *MASKED)
    padded = found(g, samples({"x": poisoned, "attention_mask": mask}))
    real = x[mask != 0][None]
    plain = found(g, samples({"x": real, "attention_mask": torch.ones(real.shape[:2], dtype=torch.int64)}))
    assert len(padded) == 2
    for name, moments in padded.items():
        assert moments is not None and moments.count == 8
        same(moments, plain[name])


def test_a_mask_of_ones_hides_nothing() -> None:
    x = normal(3, 5, 24)
    g = graph(Masked(False), *MASKED)
    for moments in found(g, samples({"x": x, "attention_mask": torch.ones(3, 5, dtype=torch.int64)})).values():
        assert moments is not None and moments.count == 15


def test_groups_are_bounded_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    g, data = graph(Mlp()), samples({"x": normal(6, 5, 24)}, {"x": normal(4, 5, 24, seed=1)})
    runs: list[int] = []
    whole = type(g).run

    def counted(self: Any, feeds: Any, taps: Any = None) -> Any:
        runs.append(len(taps))
        return whole(self, feeds, taps)

    monkeypatch.setattr(type(g), "run", counted)
    monkeypatch.setattr(calibrate, "SHARE", 1e9)
    together = found(g, data)
    assert runs == [2, 2]  # one pass over two batches, two values tapped
    runs.clear()
    monkeypatch.setattr(calibrate, "SHARE", 0.0)
    monkeypatch.setattr(calibrate, "LEAST", 0)
    apart = found(g, data)
    assert runs == [1, 1, 1, 1]
    assert list(together) == list(apart) == ["first", "second"]
    for name in together:
        same(together[name], apart[name])


def test_groups_hold_at_most_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"part_{i}": linear(normal(24, 24, seed=i)) for i in range(8)}

    def chain(net: Any, x: Tensor) -> Tensor:
        for i in range(8):
            x = torch.relu(net.get_submodule(f"part_{i}")(x))
        return x

    g = graph(Net(chain, **parts))
    calibration = Calibration(g, samples({"x": normal(2, 3, 24)}), Progress(True))
    assert [len(group) for group in calibration.moments(sites(g))] == [8]  # few bytes: one run over the samples
    monkeypatch.setattr(calibrate, "LEAST", 0)
    groups = [len(group) for group in calibration.moments(sites(g))]
    assert sum(groups) == 8
    assert max(groups) * 8 * 24 * 24 <= calibrate.SHARE * g.nbytes() < (max(groups) + 1) * 8 * 24 * 24


def test_sites_that_share_an_input_share_moments() -> None:
    net = Net(lambda n, x: (n.a(x), n.b(x), n.c(torch.tanh(x))), **{k: linear(normal(7, 24, seed=i)) for i, k in enumerate("abc")})
    moments = found(graph(net), samples({"x": normal(9, 2, 24)}))
    assert moments["a"] is moments["b"] is not None
    assert moments["c"] is not moments["a"]


def test_moments_are_those_of_the_sites_own_input() -> None:
    x, net = normal(50, 4, 24), Mlp()
    moments = found(graph(net), samples({"x": x}))
    hidden = torch.relu(net.first(x)).detach().reshape(-1, 32).double()
    second = moments["second"]
    assert second is not None and second.count == 200 and second.law == "data: test"
    torch.testing.assert_close(second.mean.float(), hidden.mean(0).float())
    away = 32 / (10 * 200)
    expected = torch.cov(hidden.T, correction=0)
    expected = (1 - away) * expected + away * torch.diag(expected.diagonal())
    torch.testing.assert_close(second.covariance().float(), expected.float())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_inside_the_model_is_said(poison: float) -> None:
    x = normal(3, 5, 24)
    x[1, 2, 3] = poison
    with pytest.raises(RewriteError, match="calibration met NaN or inf in 'x'; check the samples and the weights"):
        found(graph(Mlp()), samples({"x": x}))


def normed(rms: bool, between: Any = lambda x: x) -> nn.Module:
    gamma, beta = normal(24, seed=5), normal(24, seed=6)

    def forward(net: Any, x: Tensor) -> Tensor:
        if rms:
            return net.fc(between(torch.nn.functional.rms_norm(x, (24,), net.gamma)))
        return net.fc(between(torch.nn.functional.layer_norm(x, (24,), net.gamma, net.beta)))

    return Net(forward, gamma=gamma, beta=beta, fc=linear(decaying(20, 24)))


@pytest.mark.parametrize("rms", [False, True])
def test_the_norms_affine_is_used_where_there_is_no_data(rms: bool) -> None:
    (moments,) = found(graph(normed(rms)), None).values()
    assert moments is not None and moments.count == 0
    expected = layer_norm(normal(24, seed=5), None if rms else normal(24, seed=6), rms)
    torch.testing.assert_close(moments.second, expected.second)
    torch.testing.assert_close(moments.mean, expected.mean)


def test_data_wins_over_the_norms_affine_and_the_affine_over_invention() -> None:
    g, batch = graph(normed(False)), {"x": normal(3, 5, 24)}
    (seen,) = found(g, samples(batch)).values()
    (assumed,) = found(g, Samples([batch], "invented", "k", invented=True)).values()
    assert seen is not None and assumed is not None
    assert (seen.count, assumed.count) == (15, 0)
    for name, count in (("attention_mask", 0), ("positions", 15)):  # a mask says nothing of what floats are like, other whole numbers do
        (beside,) = found(g, Samples([batch | {name: torch.ones(3, 5, dtype=torch.int64)}], "invented", "k", invented=True)).values()
        assert beside is not None and beside.count == count


def test_without_data_and_norm_nothing_is_known() -> None:
    assert list(found(graph(Mlp()), None).values()) == [None, None]
    assert list(found(graph(normed(False, torch.relu)), None).values()) == [None]


@pytest.mark.parametrize("onnx", [False, True], ids=["torch", "onnx"])
def test_a_site_behind_a_rewritten_one_sees_what_that_one_gives(onnx: bool) -> None:
    """Its input is the other's output, whose node stays in the graph, unused."""
    g = graph(Net(lambda n, x: n.second(n.first(x)), first=linear(normal(6, 6)), second=linear(normal(5, 6))), "x:float32[batch,6]")
    g = as_onnx(g) if onnx else g
    first, second = sites(g)
    data, form = samples({"x": normal(9, 6, seed=1)}), LowRank(normal(6, 2, seed=2), normal(2, 6, seed=3))
    g.splice(first, form)
    ((_, found),) = next(Calibration(g, data, Progress(True)).moments([second]))
    rows = data.batches[0]["x"] @ form.dense().T
    assert found is not None
    torch.testing.assert_close(found.mean.float(), rows.mean(0))
