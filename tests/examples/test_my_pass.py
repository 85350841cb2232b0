"""The example pass: small sites are kept with their reason, the others are decided as the engine decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter import registry


class Net(nn.Module):
    """24 x 16 and 32 x 24: 384 and 768 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(16, 24), nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.large(torch.relu(self.small(x)))
        return out


def plan(passes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    result = rewriter.plan(Net(), passes=passes, inputs=["x:float32[batch,16]"], target="torch", samples=32, objective="params")
    return {row.name: row for row in result.report.sites}


def test_small_sites_are_kept_and_said(my_pass: Any) -> None:
    rows = plan([my_pass.KeepSmall(above=500, params=0.5)])
    assert rows["small"].status == "kept"
    assert rows["small"].reason == "small: 384 numbers, keep-small:above is 500"
    assert rows["large"].status == "planned"
    assert rows["large"].structure.startswith("low-rank:rank=")
    assert rows["large"].cost["params"]["after"] <= 768 // 2


def test_by_name_with_another_structure(my_pass: Any) -> None:
    rows = plan("keep-small:above=500:structure=block-diagonal")
    assert rows["large"].structure.startswith("block-diagonal:")
    assert registry.passes()["keep-small"] is my_pass.KeepSmall


def test_what_an_earlier_pass_rewrote_stays(my_pass: Any) -> None:
    rows = plan(["low-rank:rank=4", my_pass.KeepSmall(above=500)])
    assert {row.structure for row in rows.values()} == {"low-rank:rank=4"}


@pytest.mark.parametrize(("passes", "said"), [("keep-small:params=2", "out of range"), ("keep-small:structure=none", "there are: armor")])
def test_bad_options_are_refused(my_pass: Any, passes: str, said: str) -> None:
    with pytest.raises(rewriter.RewriteError, match=said):
        plan(passes)
