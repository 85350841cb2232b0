"""A LoRA adapter is a branch: y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ, beside a base weight that keeps its name.

Only what that equation says is taken (`lora_A`, `lora_B` in safetensors, alpha/r or rank-stabilised alpha/√r); anything else that
peft can train is refused by name.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from rewriter.backends.files.arch import load_safetensors
from rewriter.backends.files.archive import read_object
from rewriter.errors import RewriteError

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])\.(?:\w+\.)?weight")
REFUSED = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
)  # fmt: skip
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others take something out of the base weight


def attach(model: nn.Module, folder: Path, scale: float = 1.0) -> str:
    """Add the adapter's branches to the model's linears; returns one line for the report."""
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise RewriteError(f"--adapter {folder} holds no {file.name}; expected a LoRA adapter as peft saves it")
    config = read_object(config_file, "a LoRA adapter's configuration")
    _check_options(folder, config)
    rank, alpha = _rank(config_file, config), _alpha(config_file, config)
    pairs = _read_pairs(weights_file)
    strength = scale * alpha / (rank**0.5 if config.get("use_rslora") else rank)
    modules = dict(model.named_modules())
    for path, pair in pairs.items():
        target = _find(modules, path)
        if target is None or set(pair) != {"A", "B"}:
            name = type(model).__name__
            raise RewriteError(
                f"--adapter {folder}: {path!r} is no linear of {name} with both lora_A and lora_B; give the base model that it was made for"
            )
        _check_fit(folder, path, target, pair, rank)
        _branch(target, pair["A"], pair["B"], strength)
    return f"adapter {folder} on {len(pairs)} linears at scale {scale:g}"


def _check_options(folder: Path, config: dict[str, Any]) -> None:
    """Whatever peft can train beyond y + scale · x Aᵀ Bᵀ beside the untouched base weight."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RewriteError(f"--adapter {folder} is of type {kind!r}; only LORA can be read, merge others with peft first")
    unread = [name for name in REFUSED if config.get(name)]
    unread += ["bias"] if config.get("bias", "none") != "none" else []
    unread += ["init_lora_weights"] if config.get("init_lora_weights") not in _STARTS else []
    if unread:
        raise RewriteError(f"--adapter {folder} uses {unread[0]}, which is not read; merge it into the model with peft first")


def _rank(file: Path, config: dict[str, Any]) -> int:
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise RewriteError(f"{file}: the rank r is {rank!r}; it must be a whole number from 1 on, save the adapter again with peft")
    return rank


def _alpha(file: Path, config: dict[str, Any]) -> float:
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise RewriteError(f"{file}: lora_alpha is {alpha!r}; it must be a finite number, save the adapter again with peft")
    return float(alpha)


def _read_pairs(file: Path) -> dict[str, dict[str, Tensor]]:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in load_safetensors(file).items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise RewriteError(f"{file} holds {key!r}, which is no LoRA factor; merge it into the model with peft first")
        pair = pairs.setdefault(found["path"], {})
        if found["side"] in pair:
            raise RewriteError(f"{file} holds lora_{found['side']} of {found['path']!r} twice; save one adapter to a file")
        pair[found["side"]] = value
    return pairs


def _find(modules: dict[str, nn.Module], path: str) -> nn.Module | None:
    """By its full path, or by its tail where the adapter was trained under another head's prefix."""
    tails = [path.split(".", cut)[-1] for cut in range(path.count(".") + 1)]
    found = next((modules[tail] for tail in tails if tail in modules), None)
    return found if isinstance(found, nn.Linear) or type(found).__name__ == "Conv1D" else None


def _check_fit(folder: Path, path: str, target: Any, pair: dict[str, Tensor], rank: int) -> None:
    """Factors of another model, or of another rank than the one that the scale divides by."""
    n, m = target.weight.shape if type(target).__name__ == "Conv1D" else reversed(target.weight.shape)
    a, b = pair["A"], pair["B"]
    if tuple(a.shape) != (rank, n) or tuple(b.shape) != (m, rank) or not (a.is_floating_point() and b.is_floating_point()):
        raise RewriteError(
            f"--adapter {folder}: the factors {list(b.shape)} {b.dtype} x {list(a.shape)} {a.dtype} do not fit {path!r} of {n} inputs and "
            f"{m} outputs at rank {rank}; give the base model that the adapter was made for"
        )


def _branch(target: nn.Module, a: Tensor, b: Tensor, strength: float) -> None:
    """The class is swapped for one with the branch, so `weight` and `bias` stay where they were."""
    weight: Any = target.weight
    plain: Any = type(target)
    count = getattr(target, "_lora_branches", 0)
    target.register_parameter(f"lora_A_{count}", nn.Parameter(a.to(weight.dtype), requires_grad=False))
    target.register_parameter(f"lora_B_{count}", nn.Parameter(b.to(weight.dtype), requires_grad=False))

    def forward(self: Any, x: Tensor) -> Tensor:
        down = F.linear(x, getattr(self, f"lora_A_{count}"))
        out: Tensor = plain.forward(self, x) + strength * F.linear(down, getattr(self, f"lora_B_{count}"))
        return out

    body = {"forward": forward, "_lora_branches": count + 1, "__module__": plain.__module__, "__qualname__": plain.__qualname__}
    target.__class__ = type(plain.__name__, (plain,), body)
