"""Caches of other sizes: which inputs changed, which outputs follow them, and what each model is fed."""

from __future__ import annotations

import pytest
import torch

from rewriter.caches import changes, fitted, follows, said, whole
from rewriter.calibrate import Samples
from rewriter.errors import RewriteError
from rewriter.inputs import parse_input
from rewriter.verify import certify

IDS, MASK = parse_input("ids:int64[batch,seq]"), parse_input("mask:int64[batch,past+seq]")
WIDE, THIN = parse_input("k:float32[batch,4,past,8]"), parse_input("k:float32[batch,2,past,5]")
CHANGED = changes([IDS, MASK, WIDE], [IDS, MASK, THIN])


def test_a_change_is_of_fixed_sizes() -> None:
    assert [str(change) for change in CHANGED] == ["k [batch,4,past,8] is [batch,2,past,5]"]
    assert not changes([IDS, WIDE], [IDS, parse_input("k:float32[rows,4,length,8]")])
    assert "128 bytes a token are 40 now" in said(CHANGED) and not said([])


def test_caches_are_as_long_as_they_were() -> None:
    feeds = {"ids": torch.zeros(3, 2, dtype=torch.int64), "k": torch.zeros(3, 4, 0, 8)}
    assert fitted(feeds, [THIN])["k"].shape == (3, 2, 0, 5) and fitted(feeds, [])["k"] is feeds["k"]
    full = {**feeds, "k": torch.ones(3, 4, 7, 8)}
    assert fitted(full, [THIN], drawn=True)["k"].shape == (3, 2, 7, 5) and fitted(full, [WIDE])["k"] is full["k"]
    with pytest.raises(RewriteError, match="input 'k' holds a cache of 7 tokens, and this model has other sizes"):
        fitted(full, [THIN])


def test_samples_are_whole_sequences() -> None:
    assert whole([IDS, MASK, WIDE], {"batch": 1, "past": 30, "seq": 2}) == {"batch": 1, "past": 0, "seq": 32}
    assert whole([IDS], {"batch": 1, "seq": 2}) == {"batch": 1, "seq": 2}


def test_only_what_changed_as_a_cache_did_is_not_compared() -> None:
    a, b, other = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 5), torch.ones(1, 2, 4, 5)
    assert follows(a, b, CHANGED) and not follows(a, other, CHANGED) and not follows(a, b, [])
    samples = Samples([{"ids": torch.zeros(1, 3), "k": torch.zeros(1, 4, 0, 8)}], "data: test", "k")
    found = certify(lambda _: {"y": a, "present": a}, lambda f: {"y": a, "present": f["k"].new_ones(1, 2, 3, 5)}, samples, resized=CHANGED)
    assert (found.output, found.estimate) == ("y", 0.0)
    with pytest.raises(RewriteError, match="output 'present' changed its shape"):
        certify(lambda _: {"y": a, "present": a}, lambda _: {"y": a, "present": other}, samples, resized=CHANGED)
