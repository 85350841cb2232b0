"""A LoRA adapter is a branch: y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ, beside a base weight that keeps its name.

Only what that equation says is taken (`lora_A`, `lora_B` in safetensors, alpha/r or rank-stabilised alpha/√r); anything else that
peft can train is refused by name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.errors import RewriteError

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])\.(?:\w+\.)?weight")
REFUSED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")


def attach(model: nn.Module, folder: Path, scale: float = 1.0) -> str:
    """Add the adapter's branches to the model's linears; returns one line for the report."""
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise RewriteError(f"--adapter {folder} holds no {file.name}; expected a LoRA adapter as peft saves it")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise RewriteError(f"--adapter {folder} is of type {config.get('peft_type')}; only LORA can be read, merge others with peft first")
    unread = [name for name in REFUSED if config.get(name)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if unread:
        raise RewriteError(f"--adapter {folder} uses {unread[0]}, which is not read; merge it into the model with peft first")
    pairs = _read_pairs(weights_file)
    rank = float(config["r"])
    strength = scale * float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)
    modules = dict(model.named_modules())
    for path, pair in pairs.items():
        target = _find(modules, path)
        if target is None or set(pair) != {"A", "B"}:
            name = type(model).__name__
            raise RewriteError(f"--adapter {folder}: {path} is no linear of {name} with both lora_A and lora_B; is it its adapter?")
        _branch(target, pair["A"], pair["B"], strength)
    return f"adapter {folder} on {len(pairs)} linears at scale {scale:g}"


def _read_pairs(file: Path) -> dict[str, dict[str, Tensor]]:
    from safetensors.torch import load_file

    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(str(file)).items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise RewriteError(f"{file} holds {key}, which is no LoRA factor; merge it into the model with peft first")
        pairs.setdefault(found["path"], {})[found["side"]] = value
    return pairs


def _find(modules: dict[str, nn.Module], path: str) -> nn.Module | None:
    """By its full path, or by its tail where the adapter was trained under another head's prefix."""
    tails = [path.split(".", cut)[-1] for cut in range(path.count(".") + 1)]
    found = next((modules[tail] for tail in tails if tail in modules), None)
    return found if isinstance(found, nn.Linear) or type(found).__name__ == "Conv1D" else None


def _branch(target: nn.Module, a: Tensor, b: Tensor, strength: float) -> None:
    """The class is swapped for one with the branch, so `weight` and `bias` stay where they were."""
    weight: Any = target.weight
    plain: Any = type(target)
    n, m = weight.shape if plain.__name__ == "Conv1D" else reversed(weight.shape)
    if a.shape[1] != n or b.shape[0] != m or a.shape[0] != b.shape[1]:
        raise RewriteError(f"an adapter's factors {tuple(b.shape)} x {tuple(a.shape)} do not fit a linear of {n} inputs and {m} outputs")
    count = getattr(target, "_lora_branches", 0)
    target.register_parameter(f"lora_A_{count}", nn.Parameter(a.to(weight.dtype), requires_grad=False))
    target.register_parameter(f"lora_B_{count}", nn.Parameter(b.to(weight.dtype), requires_grad=False))

    def forward(self: Any, x: Tensor) -> Tensor:
        down = F.linear(x, getattr(self, f"lora_A_{count}"))
        out: Tensor = plain.forward(self, x) + strength * F.linear(down, getattr(self, f"lora_B_{count}"))
        return out

    body = {"forward": forward, "_lora_branches": count + 1, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    target.__class__ = type(plain.__name__, (plain,), body)
