"""Where samples come from, what is held out, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rewriter import sampling
from rewriter.calibrate import Samples, rows
from rewriter.errors import RewriteError
from rewriter.inputs import parse_input
from rewriter.select import select
from tests.engine.nets import MLP, Mlp, Net, graph, normal, sites

WIDTH = 24


def source(spec: str = MLP, encode: Callable[[Any], Any] | None = None) -> Any:
    return SimpleNamespace(graph=graph(Mlp()), specs=[parse_input(spec)], sizes={"batch": 1, "seq": 6}, encode=encode)


def seen(samples: Samples | sampling.Replicated) -> Tensor:
    assert isinstance(samples, Samples)
    return torch.cat([batch["x"] for batch in samples.batches])


def test_arrays_are_split_and_every_sample_is_in_one_part() -> None:
    x = normal(200, 5, WIDTH)
    split = sampling.collect(source(), {"x": x}, 0, 0)
    fit, held = seen(split.calibration), seen(split.held_out)
    assert len(fit) + len(held) == 200 and 16 <= len(held) <= 50
    found = {tuple(row.flatten().tolist()) for row in torch.cat([fit, held])}
    assert found == {tuple(row.flatten().tolist()) for row in x}
    assert split.calibration.law == "data: given in memory" and split.held_out.law == "data: given in memory, held out"
    assert split.calibration.key != split.held_out.key


def test_few_arrays_are_used_twice_and_that_is_said() -> None:
    split = sampling.collect(source(), {"x": normal(20, 5, WIDTH)}, 0, 0)
    assert split.calibration is split.held_out and "the calibration samples themselves" in split.held_out.law


def test_lines_are_split_before_they_are_sorted() -> None:
    def encode(lines: list[str]) -> dict[str, Tensor]:
        return {"x": torch.tensor([[float(line.split()[0])] for line in lines])}

    lines = [f"{i} {'word ' * (i % 7)}" for i in range(64)]
    split = sampling.collect(source("x:float32[batch,1]", encode), lines, 0, 0)
    assert sorted(seen(split.held_out).flatten().tolist()) == [float(i) for i in range(7, 64, 8)]
    assert len(seen(split.calibration)) == 56
    few = sampling.collect(source("x:float32[batch,1]", encode), lines[:9], 0, 0)
    assert few.calibration is few.held_out


def drawn(split: sampling.Split, replication: int, count: int) -> Tensor:
    assert isinstance(split.held_out, sampling.Replicated)
    return torch.cat([batch["x"] for batch in split.held_out.draw(replication, 0, count)])


def test_invented_samples_are_drawn_afresh_for_judging() -> None:
    """No replication that judges is the scrambling that calibrated."""
    split, again, other = (sampling.collect(source(), None, 64, seed) for seed in (0, 0, 1))
    assert split.calibration.invented and split.calibration.count == 64
    sets = [seen(split.calibration), *(drawn(split, r, 64) for r in range(sampling.REPLICATIONS))]
    assert all(not torch.equal(a, b) for i, a in enumerate(sets) for b in sets[:i])
    assert again.calibration.key == split.calibration.key and torch.equal(seen(again.calibration), seen(split.calibration))
    assert torch.equal(drawn(again, 3, 8), drawn(split, 3, 8)) and not torch.equal(drawn(other, 3, 8), drawn(split, 3, 8))
    assert other.calibration.key != split.calibration.key
    assert split.held_out.law == "invented: standard normals; scrambled Sobol' points" == split.calibration.law


@pytest.mark.parametrize(
    ("spec", "count", "precise", "first", "cap"),
    [
        (MLP, 256, False, 4, 256),
        (MLP, 64, False, 4, 64),
        (MLP, 3, False, 1, 3),
        (MLP, 100, False, 4, 100),
        (MLP, 256, True, 16, 256 * 64),
        ("x:float32[8,seq,24]", 256, False, 8, 256),
        ("x:float32[3,seq,24]", 256, True, 12, 256 * 64),
    ],
)
def test_rounds_begin_with_a_power_of_two(spec: str, count: int, precise: bool, first: int, cap: int) -> None:
    """Times a fixed first dimension, so that every batch is whole."""
    found = sampling.replicated(source(spec), count, 0, precise)
    assert (found.first, found.cap) == (first, cap)
    assert sum(len(batch["x"]) for batch in found.draw(0, 0, found.first)) == found.first


def test_everything_keeps_all() -> None:
    assert isinstance(sampling.everything(source(), None, 64, 0), sampling.Replicated)
    every = sampling.everything(source(), {"x": normal(200, 5, WIDTH)}, 0, 0)
    assert isinstance(every, Samples) and sum(rows(b) for b in every.batches) == 200


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"z": normal(40, 5, WIDTH)}, "--data lacks input 'x'; it has z and the model takes x"),
        ({"x": normal(40, 5, WIDTH + 1)}, r"'x' has shape \[40, 5, 25\] and the model takes x:float32\[batch,seq,24\]"),
        ({"x": normal(40, WIDTH)}, r"'x' has shape \[40, 24\]"),
        ({"x": normal(0, 5, WIDTH)}, "--data holds no samples"),
        (normal(40, 5, WIDTH), "data is a Tensor; give a path, a mapping of arrays"),
        (["a line"], "--data is text, and this model has no tokenizer"),
    ],
)
def test_data_that_does_not_fit_is_refused(data: Any, said: str) -> None:
    with pytest.raises(RewriteError, match=said):
        sampling.collect(source(), data, 0, 0)


def test_fractions_are_no_ids() -> None:
    with pytest.raises(RewriteError, match=r"'x' is float32 and the model takes x:int64\[batch,seq\]; give whole numbers"):
        sampling.collect(source("x:int64[batch,seq]"), {"x": normal(40, 5)}, 0, 0)


def test_what_the_model_does_not_take_is_said() -> None:
    split = sampling.collect(source(), {"x": normal(40, 5, WIDTH), "labels": torch.ones(40)}, 0, 0)
    assert split.calibration.law == "data: given in memory (without labels, which the model does not take)"


def test_a_scalar_is_the_same_for_all() -> None:
    both = SimpleNamespace(graph=None, specs=[parse_input(MLP), parse_input("t:float32[]")], sizes={}, encode=None)
    split = sampling.collect(both, {"x": normal(40, 5, WIDTH), "t": torch.tensor(3.0)}, 0, 0)
    assert all(batch["t"].shape == () and float(batch["t"]) == 3.0 for batch in split.calibration.batches)


def test_files_are_told_by_content(tmp_path: Path) -> None:
    with (tmp_path / "data.txt").open("wb") as file:
        np.savez(file, x=normal(40, 5, WIDTH).numpy())
    assert sampling.collect(source(), str(tmp_path / "data.txt"), 0, 0).calibration.count + 8 == 40
    for path, said in ((tmp_path, "is a folder; give a .npz"), (tmp_path / "no.npz", "does not exist; give a .npz")):
        with pytest.raises(RewriteError, match=said):
            sampling.collect(source(), str(path), 0, 0)


def test_ids_are_bounded_by_the_smallest_table_that_they_index() -> None:
    net = Net(lambda n, x: n.a(x) + n.b((x + 0).clamp(0, 20)), a=nn.Embedding(50, 8), b=nn.Embedding(30, 8))
    g = graph(net, "x:int64[batch,seq]")
    assert sampling.index_bounds(g, g.specs()) == {"x": 30}


def test_globs_choose_sites() -> None:
    found = sites(graph(Mlp()))

    def names(include: tuple[str, ...], exclude: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
        kept, out = select(found, include, exclude)
        return [s.name for s in kept], {s.name: why for s, why in out}

    assert names((), ()) == (["first", "second"], {})
    assert names(("f*",), ()) == (["first"], {"second": "not named by --include"})
    assert names((), ("f*",)) == (["second"], {"first": "left out by --exclude f*"})
    assert names(("*",), ("second",)) == (["first"], {"second": "left out by --exclude second"})
    for option, globs in (("--include", ("nope",)), ("--exclude", ("first", "third"))):
        with pytest.raises(RewriteError, match=f"{option} '{globs[-1]}' matches no site; sites are named like first, second"):
            select(found, *((globs, ()) if option == "--include" else ((), globs)))
