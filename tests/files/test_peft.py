"""A folder of peft's: what the equations say is read, everything else is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rewriter.adapters import Adapter
from rewriter.backends.files.peft import REFUSED, load_adapter
from rewriter.errors import RewriteError

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
KEY = "base_model.model.part.lora_{}.weight"


def factors() -> dict[str, Tensor]:
    return {KEY.format("A"): torch.ones(2, 5), KEY.format("B"): torch.ones(3, 2)}


def write(folder: Path, config: Any = GOOD, weights: dict[str, Tensor] | None = None) -> Path:
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(factors() if weights is None else weights, folder / "adapter_model.safetensors")
    return folder


def refused(folder: Path, match: str) -> None:
    with pytest.raises(RewriteError, match=match) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def read(folder: Path, weights: dict[str, Tensor] | None = None, scale: float = 1.0, **config: Any) -> Adapter:
    return load_adapter(write(folder, GOOD | config, weights), scale)


@pytest.mark.parametrize(("stable", "strength"), [(False, 4 / 2), (True, 4 / 2**0.5)])
def test_the_branch_is_the_equation(stable: bool, strength: float, tmp_path: Path) -> None:
    (update,) = read(tmp_path, scale=0.5, use_rslora=stable).updates.values()
    assert update.down.equal(torch.ones(2, 5)) and update.shift is None and update.magnitude is None
    torch.testing.assert_close(update.up, 0.5 * strength * torch.ones(3, 2))


PATTERNS = [
    ({"part": 8}, 8),
    ({"^part": 8}, 8),
    ({"pa.t": 8}, 8),
    ({"(part|other)": 8}, 8),
    ({".*art": 8}, 8),
    ({"art": 8}, 4),
    ({"par": 8}, 4),
    ({"other": 8, "part": 6}, 6),
    ({"part": 8, "pa.t": 6}, 8),
]


@pytest.mark.parametrize(("patterns", "alpha"), PATTERNS)
def test_scales_by_module(patterns: dict[str, int], alpha: float, tmp_path: Path) -> None:
    (update,) = read(tmp_path, alpha_pattern=patterns).updates.values()
    torch.testing.assert_close(update.up, alpha / 2 * torch.ones(3, 2))


def test_ranks_by_module(tmp_path: Path) -> None:
    (update,) = read(tmp_path, r=7, rank_pattern={"part": 2}).updates.values()
    torch.testing.assert_close(update.up, 2 * torch.ones(3, 2))


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|b)*", "a*b*c*", "a{2}b+c+", "("])
def test_patterns_that_could_take_forever_are_refused(pattern: str, tmp_path: Path) -> None:
    refused(write(tmp_path, GOOD | {"alpha_pattern": {pattern: 1}}), "alpha_pattern")


def test_all_that_a_linear_may_gain(tmp_path: Path) -> None:
    more = {"base_model.model.part.lora_B.bias": torch.ones(3), "base_model.model.part.lora_magnitude_vector": torch.ones(3)}
    whole = {"base_model.model.head.weight": torch.ones(4, 3), "base_model.model.part.base_layer.bias": torch.ones(3)}
    found = read(tmp_path, {**factors(), **more, **whole}, use_dora=True, lora_bias=True, bias="all", modules_to_save=["head"])
    assert found.updates["part"].magnitude is not None
    assert found.updates["part"].shift is not None and found.updates["part"].shift.equal(2 * torch.ones(3))
    assert set(found.saved) == {"head.weight", "part.bias"}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("not JSON", "is no JSON"),
        ("[]", "holds no object but list"),
        ("null", "holds no object"),
        ('{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        *((GOOD | {"r": rank}, r"r of 'part' is") for rank in (0, None, "x", -2, 1.5, True, [4])),
        ({key: GOOD[key] for key in ("peft_type", "lora_alpha")}, "r of 'part' is None"),
        *((GOOD | {"lora_alpha": alpha}, "lora_alpha of 'part' is") for alpha in (None, "x", True, float("nan"), float("inf"))),
        (GOOD | {"r": 3}, "says rank 3"),
        (GOOD | {"rank_pattern": {"part": 3}}, "says rank 3"),
        (GOOD | {"rank_pattern": {"part": "x"}}, "r of 'part' is 'x'"),
        (GOOD | {"rank_pattern": [1]}, "rank_pattern is list"),
        (GOOD | {"use_dora": True}, "use_dora is True, and 'part' says otherwise"),
        (GOOD | {"peft_type": "IA3"}, "only LORA"),
        (GOOD | {"peft_type": "a\nb"}, "only LORA"),
        ({"r": 2}, "only LORA"),
        (GOOD | {"bias": "some"}, "uses bias"),
        (GOOD | {"init_lora_weights": "pissa"}, "uses init_lora_weights"),
        (GOOD | {"init_lora_weights": ["x"]}, "uses init_lora_weights"),
        *((GOOD | {name: {"a": 1}}, f"uses {name}") for name in REFUSED),
    ],
)
def test_configurations_that_are_not_read(config: Any, match: str, tmp_path: Path) -> None:
    refused(write(tmp_path, config), match)


@pytest.mark.parametrize("start", [True, False, None, "gaussian"])
def test_starts_that_leave_the_base_alone_are_read(start: Any, tmp_path: Path) -> None:
    assert read(tmp_path, init_lora_weights=start, rank_pattern={}, modules_to_save=None).updates


A, B = KEY.format("A"), KEY.format("B")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({A: torch.ones(10)}, "down of 'part' is torch.float32 \\[10\\], not floats with 2 axes"),
        ({B: torch.ones(6)}, "up of 'part'"),
        ({B: torch.ones(4, 1)}, "says rank 2"),
        ({A: torch.ones(1, 5)}, "says rank 2"),
        ({A: torch.ones(2, 5, dtype=torch.int64)}, "not floats"),
        ({A: None}, "'part' lacks lora_A"),
        ({B: None}, "'part' lacks lora_B"),
        ({A: None, B: None}, "holds nothing"),
        ({"base_model.model.part.lora_embedding_A": torch.ones(3)}, "is no part of a LoRA adapter"),
        ({"base_model.model.part.lora_magnitude_vector": torch.ones(3)}, "use_dora is None"),
        ({KEY.format("A").replace(".weight", ".other.weight"): torch.ones(2, 5)}, "twice"),
    ],
)
def test_factors_that_do_not_belong(changes: dict[str, Tensor | None], match: str, tmp_path: Path) -> None:
    merged = {**factors(), **changes}
    held = {name: value for name, value in merged.items() if value is not None}
    refused(write(tmp_path, GOOD, held), match)


BLOCKS = {"nblocks": 2, "target_modules_bd_a": ["pa"], "target_modules_bd_b": ["other"]}


@pytest.mark.parametrize(
    ("options", "weights", "match"),
    [
        ({}, {A: torch.ones(2, 3)}, None),
        ({"target_modules_bd_a": [], "target_modules_bd_b": ["art"]}, {A: torch.ones(2, 6), B: torch.ones(4, 1)}, None),
        ({"nblocks": 3}, {A: torch.ones(2, 2)}, r"the down of 'part' is \[2, 2\], which is not 3 blocks"),
        ({"target_modules_bd_b": ["part"]}, {A: torch.ones(2, 3)}, "which is not 2 blocks"),
        ({"target_modules_bd_a": None, "target_modules_bd_b": ["part"]}, {B: torch.ones(4, 2)}, "says rank 2"),
        ({"nblocks": 0}, {}, "use_bdlora has nblocks 0; it must be a whole number from 1 to 128"),
        ({"nblocks": 129}, {}, "nblocks 129"),
        ({"nblocks": "2"}, {}, "nblocks '2'"),
    ],
)
def test_block_diagonal_factors(options: dict[str, Any], weights: dict[str, Tensor], match: str | None, tmp_path: Path) -> None:
    held, config = {**factors(), **weights}, GOOD | {"use_bdlora": BLOCKS | options}
    if match is not None:
        refused(write(tmp_path, config, held), match)
        return
    (update,) = read(tmp_path, held, **config).updates.values()
    if options:
        assert update.up.equal(torch.block_diag(torch.full((2, 1), 2.0), torch.full((2, 1), 2.0))) and update.down.equal(held[A])
    else:
        assert update.down.equal(torch.block_diag(torch.ones(1, 3), torch.ones(1, 3))) and update.up.equal(2 * held[B])


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    file = write(tmp_path) / "adapter_model.safetensors"
    content = file.read_bytes()
    for damaged in (content[:-4], content[:20], b"", b"hello", content + b"more"):
        file.write_bytes(damaged)
        refused(tmp_path, "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_both_files_are_needed(name: str, tmp_path: Path) -> None:
    (write(tmp_path) / name).unlink()
    refused(tmp_path, f"holds no {name}")
