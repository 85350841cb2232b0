"""What a user types for an input, and what is invented where nothing was given."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.inputs import InputLaw, InputSpec, batches, dim_names, fill_sizes, invent, parse_dims, parse_input

NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True)
DTYPES = st.sampled_from(["float32", "float16", "bfloat16", "int64", "int32", "bool"])


@given(NAMES, DTYPES, st.lists(st.integers(1, 99) | NAMES | st.just("past+seq"), max_size=4))
def test_a_specification_reads_back(name: str, dtype: str, dims: list[int | str]) -> None:
    spec = InputSpec(name, dtype, tuple(dims))
    assert parse_input(str(spec)) == spec


@pytest.mark.parametrize("text", ["x", "x:float32", "x:floaty[2]", "x:int64[a b]", "x:int64[0]", "x:int64[2,]", "x:int64[-1]", ":int64[2]"])
def test_bad_specifications(text: str) -> None:
    with pytest.raises(RewriteError, match="--input") as caught:
        parse_input(text)
    assert "\n" not in str(caught.value)


def test_dims() -> None:
    assert parse_dims("batch=4, seq=64") == {"batch": 4, "seq": 64}
    for text in ("batch", "batch=x", "", "a=1,a=2"):
        with pytest.raises(RewriteError, match="--dim"):
            parse_dims(text)


def test_sizes() -> None:
    specs = [parse_input("ids:long[batch,seq]"), parse_input("mask:int64[batch,past+seq]")]
    assert specs[0].dtype == "int64"
    assert dim_names(specs) == ("batch", "seq", "past")
    assert fill_sizes(specs, {"seq": 7}) == {"batch": 1, "seq": 7, "past": 32}
    with pytest.raises(RewriteError, match="no input has that dimension"):
        fill_sizes(specs, {"sequence": 7})


def test_invented_values() -> None:
    names = ["ids", "attention_mask", "position_ids", "token_type_ids", "flags"]
    specs = [InputSpec(name, "int64", ("batch", "past+seq" if name == "attention_mask" else "seq")) for name in names[:4]]
    specs.append(InputSpec("flags", "bool", ("batch",)))
    bounds = {"ids": 11, "token_type_ids": 2}
    drawn = invent(specs, {"seq": 50, "past": 3}, bounds, 20, 0)
    assert int(drawn["ids"].max()) == 10
    assert int(drawn["ids"].min()) == 0
    assert set(drawn["token_type_ids"].flatten().tolist()) == {0, 1}
    assert drawn["attention_mask"].shape == (20, 53)
    assert bool((drawn["attention_mask"] == 1).all())
    assert bool(drawn["flags"].all())
    assert drawn["position_ids"][0].tolist() == list(range(3, 53))
    again = invent(specs, {"seq": 50, "past": 3}, bounds, 20, 0)
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert str(InputLaw.invented(specs[:2], bounds)) == "invented: uniform token ids below 11, masks of ones; scrambled Sobol' points"


def test_what_cannot_be_invented() -> None:
    for text in ("ids:int64[batch]", "scale:float32[]", "z:complex64[batch]"):
        with pytest.raises(RewriteError, match="--data"):
            invent([parse_input(text)], {"batch": 2}, {}, 4, 0)


def test_fixed_first_dimension_rounds_up() -> None:
    drawn = invent([parse_input("x:float32[4,3]")], {}, {}, 6, 0)
    assert drawn["x"].shape == (8, 3)


def test_ids_are_balanced_over_their_table() -> None:
    """64 points over 16 ids: every column has each four times, which chance would hardly do once."""
    drawn = invent([parse_input("ids:int64[batch,seq]")], {"batch": 1, "seq": 12}, {"ids": 16}, 64, 0)["ids"]
    for column in drawn.T:
        assert torch.bincount(column, minlength=16).tolist() == [4] * 16


def test_replications_are_drawn_apart_and_on() -> None:
    """All inputs are columns of one net; a replication goes on where it stopped, and another one is another scrambling."""
    specs = [parse_input("x:float32[batch,3]"), parse_input("y:float32[batch,3]"), parse_input("ids:int64[batch,2]")]

    def drawn(count: int, replication: int, start: int = 0) -> dict[str, Tensor]:
        return invent(specs, {"batch": 1}, {"ids": 999}, count, 4, replication, start)

    whole, first, rest, other = drawn(8, 1), drawn(4, 1), drawn(4, 1, 4), drawn(8, 2)
    for name in whole:
        assert torch.equal(whole[name], torch.cat([first[name], rest[name]]))
        assert not torch.equal(whole[name], other[name])
    assert not torch.equal(whole["x"], whole["y"])


def test_batches() -> None:
    samples = {"a": torch.arange(7), "b": torch.arange(14).reshape(7, 2)}
    parts = list(batches(samples, 3))
    assert [part["a"].shape[0] for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part["b"] for part in parts]), samples["b"])
    with pytest.raises(RewriteError, match="different numbers of samples"):
        list(batches({"a": torch.zeros(2), "b": torch.zeros(3)}, 1))
    with pytest.raises(RewriteError, match="empty"):
        list(batches(samples, 0))
