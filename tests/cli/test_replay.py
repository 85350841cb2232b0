"""A report's recipe runs again on the same model, and on no other unless --force is given."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewriter.options import Options
from tests.cli.conftest import Asked, Said
from tests.cli.samples import full_report

Rewrite = Callable[..., Said]
RECIPE = Options(budget="params=0.25", include=("a.*",), out="x.pt2", force=True, seed=3)


@pytest.fixture
def stored(folder: Path) -> Callable[..., None]:
    def save(sha256: str | None = None, path: str | None = "m.pt2", **recipe: Any) -> None:
        model = {"path": path, "sha256": sha256 or hashlib.sha256(b"a model").hexdigest(), "format": "pt2"}
        options = dataclasses.replace(RECIPE, **recipe)
        dataclasses.replace(full_report(), model=model, recipe=options.to_recipe()).save(folder / "r.json")

    return save


def test_the_recipe_is_run_again_but_for_consent(rewrite: Rewrite, asked: Asked, stored: Callable[..., None]) -> None:
    stored()
    assert rewrite("replay", "r.json").code == 0
    assert asked.calls == [("rewrite", "m.pt2", dataclasses.replace(RECIPE, force=False))]


def test_out_report_and_exit_code(rewrite: Rewrite, asked: Asked, stored: Callable[..., None], folder: Path) -> None:
    stored()
    asked.exit_code = 3
    assert rewrite("replay", "r.json", "-o", "y.pt2", "--report", "again.json", "--quiet").code == 3
    assert asked.options == dataclasses.replace(RECIPE, out="y.pt2", force=False, quiet=True)
    assert (folder / "again.json").exists()


def test_another_model_is_refused_unless_forced(rewrite: Rewrite, asked: Asked, stored: Callable[..., None]) -> None:
    stored(sha256="0" * 64)
    said = rewrite("replay", "r.json")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "m.pt2 changed since r.json was written" in said.err
    assert rewrite("replay", "r.json", "--force").code == 0
    assert asked.options.force


@pytest.mark.parametrize(("path", "words"), [(None, "from memory"), ("gone.pt2", "no such file")])
def test_a_model_that_is_not_there(rewrite: Rewrite, asked: Asked, stored: Callable[..., None], path: str | None, words: str) -> None:
    stored(path=path)
    said = rewrite("replay", "r.json")
    assert said.code == 2
    assert words in said.err


@pytest.mark.parametrize("option", ["arch", "metric"])
def test_code_that_a_report_names_is_asked_for_again(rewrite: Rewrite, asked: Asked, stored: Callable[..., None], option: str) -> None:
    stored(**{option: "evil:make"})
    for words in ([], [f"--{option}", "other:make"]):
        said = rewrite("replay", "r.json", *words)
        assert (said.code, said.err.count("\n")) == (2, 1)
        assert f"that run imported evil:make; give --{option} evil:make to import it again" in said.err
    assert not asked.calls
    assert rewrite("replay", "r.json", f"--{option}", "evil:make").code == 0
    assert getattr(asked.options, option) == "evil:make"
    stored()
    assert f"was without --{option}" in rewrite("replay", "r.json", f"--{option}", "a:b").err


def test_trust_in_a_pickle_is_asked_for_again(rewrite: Rewrite, asked: Asked, stored: Callable[..., None]) -> None:
    stored(trust_pickle=True)
    said = rewrite("replay", "r.json")
    assert said.code == 2
    assert "--trust-pickle" in said.err
    assert not asked.calls
    assert rewrite("replay", "r.json", "--trust-pickle").code == 0
    assert asked.options.trust_pickle
