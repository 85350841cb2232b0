"""`rewrite passes` lists what there is, plug-ins among it, and explains each in its own words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from rewriter import catalogue, registry
from rewriter.moments import Moments
from rewriter.structure import AbstractStructure, Fitted, NoMatch
from tests.cli.conftest import Said

Rewrite = Callable[..., Said]


def test_all_are_listed(rewrite: Rewrite) -> None:
    said = rewrite("passes")
    assert said.code == 0
    names = {line.split()[0] for line in said.out.splitlines() if line.startswith("  ") and line[2] != " "}
    assert names == {*registry.passes(), *registry.structures()}


@pytest.mark.parametrize("name", [*registry.passes(), *registry.structures()])
def test_each_in_detail(rewrite: Rewrite, name: str) -> None:
    said = rewrite("passes", name)
    assert said.code == 0
    assert said.out.startswith(f"{name} (")
    assert "Options:" in said.out or "It has no options." in said.out


def test_options_with_types_defaults_and_meanings(rewrite: Rewrite) -> None:
    lines = rewrite("passes", "low-rank:rank=3").out.splitlines()
    row = next(line for line in lines if line.split()[:1] == ["rank"])
    assert row.split()[1:4] == ["whole", "number", "chosen"]
    assert "the width of the bottleneck" in row
    assert any(line.split()[:1] == ["params"] for line in lines)


def test_a_third_party_structure_appears(rewrite: Rewrite, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.load_structures()
    monkeypatch.setattr(AbstractStructure, "kinds", dict(AbstractStructure.kinds))

    @dataclass(frozen=True)
    class Toy(AbstractStructure):
        """size: how big the toy is."""

        name: ClassVar[str] = "toy"
        size: int = 3

        def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
            """Refuses every weight."""
            return NoMatch("a toy")

    assert catalogue.options(Toy, structure=True)[0] == ("size", "whole number", "3", "how big the toy is")
    assert f"toy (structure, a pass of its own)  [from {__name__}]" in rewrite("passes", "toy").out
    assert f"[from {__name__}]" in " ".join(rewrite("passes").out.split())
