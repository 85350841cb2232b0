"""A LoRA adapter's folder: what the one equation says is added, everything else is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rewriter.backends.files.lora import REFUSED, attach
from safetensors.torch import save_file
from torch import Tensor, nn

from rewriter.errors import RewriteError

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
KEY = "base_model.model.part.lora_{}.weight"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = nn.Linear(5, 3)
        self.table = nn.Embedding(5, 3)


def factors() -> dict[str, Tensor]:
    return {KEY.format("A"): torch.ones(2, 5), KEY.format("B"): torch.ones(3, 2)}


def write(folder: Path, config: Any = GOOD, weights: dict[str, Tensor] | None = None) -> Path:
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(factors() if weights is None else weights, folder / "adapter_model.safetensors")
    return folder


def refused(folder: Path, match: str) -> None:
    net = Net()
    with pytest.raises(RewriteError, match=match) as caught:
        attach(net, folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert type(net.part) is nn.Linear


@pytest.mark.parametrize(("stable", "strength"), [(False, 4 / 2), (True, 4 / 2**0.5)])
def test_the_branch_is_the_equation(stable: bool, strength: float, tmp_path: Path) -> None:
    net, x = Net(), torch.randn(4, 5)
    before = net.part(x)
    said = attach(net, write(tmp_path, GOOD | {"use_rslora": stable}), 0.5)
    assert said == f"adapter {tmp_path} on 1 linears at scale 0.5"
    torch.testing.assert_close(net.part(x), before + 0.5 * strength * (x @ torch.ones(5, 2) @ torch.ones(2, 3)))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ("not JSON", "is no JSON"),
        ("[]", "holds no object but list"),
        ("null", "holds no object"),
        ('{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        *((GOOD | {"r": rank}, "the rank r is") for rank in (0, None, "x", -2, 1.5, True, [4])),
        ({key: GOOD[key] for key in ("peft_type", "lora_alpha")}, "the rank r is None"),
        *((GOOD | {"lora_alpha": alpha}, "lora_alpha is") for alpha in (None, "x", True, float("nan"), float("inf"))),
        (GOOD | {"r": 3}, "at rank 3"),
        (GOOD | {"peft_type": "IA3"}, "only LORA"),
        (GOOD | {"peft_type": "a\nb"}, "only LORA"),
        ({"r": 2}, "only LORA"),
        (GOOD | {"bias": "all"}, "uses bias"),
        (GOOD | {"init_lora_weights": "pissa"}, "uses init_lora_weights"),
        (GOOD | {"init_lora_weights": ["x"]}, "uses init_lora_weights"),
        *((GOOD | {name: {"a": 1}}, f"uses {name}") for name in REFUSED),
    ],
)
def test_configurations_that_are_not_read(config: Any, match: str, tmp_path: Path) -> None:
    refused(write(tmp_path, config), match)


@pytest.mark.parametrize("start", [True, False, None, "gaussian"])
def test_starts_that_leave_the_base_alone_are_read(start: Any, tmp_path: Path) -> None:
    attach(Net(), write(tmp_path, GOOD | {"init_lora_weights": start, "rank_pattern": {}, "modules_to_save": None}))


A, B = KEY.format("A"), KEY.format("B")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({A: torch.ones(10)}, "do not fit 'part' of 5 inputs and 3 outputs at rank 2"),
        ({B: torch.ones(6)}, "do not fit"),
        ({A: torch.ones(2, 4)}, "do not fit"),
        ({B: torch.ones(4, 2)}, "do not fit"),
        ({A: torch.ones(1, 5)}, "do not fit"),
        ({A: torch.ones(2, 5, dtype=torch.int64)}, "do not fit"),
        ({A: None}, "is no linear of Net with both"),
        ({B: None}, "is no linear of Net with both"),
        ({"base_model.model.part.weight": torch.ones(3, 5)}, "is no LoRA factor"),
        ({"base_model.model.part.lora_B.bias": torch.ones(3)}, "is no LoRA factor"),
        ({"a\nb": torch.ones(3)}, "is no LoRA factor"),
        ({KEY.format("A").replace(".weight", ".other.weight"): torch.ones(2, 5)}, "twice"),
        ({key.replace("part", "table"): value for key, value in factors().items()}, "'table' is no linear"),
        ({key.replace("part", "none"): value for key, value in factors().items()}, "'none' is no linear"),
    ],
)
def test_factors_that_do_not_belong(changes: dict[str, Tensor | None], match: str, tmp_path: Path) -> None:
    merged = {**factors(), **changes}
    held = {name: value for name, value in merged.items() if value is not None}
    folder = write(tmp_path, GOOD, held)
    net = Net()
    with pytest.raises(RewriteError, match=match) as caught:
        attach(net, folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


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
