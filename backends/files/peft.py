"""A folder as peft saves LoRA adapters, read as what it adds: s = alpha / r, or alpha / sqrt(r) where it is rank-stabilised, by module.

    y = x W' + b', W' = W + s B A, b' = b + s c        (lora_bias)
    W' = diag(m / |W + s B A|) (W + s B A), row by row   (DoRA)
    A or B block diagonal, stored as its blocks above one another   (BD-LoRA)

`modules_to_save`, and biases that were trained, are whole tensors that replace the model's. Nothing here runs code, and nothing is guessed:
what else peft can train is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rewriter.adapters import Adapter, Update
from rewriter.backends.files.arch import load_safetensors
from rewriter.backends.files.archive import read_object
from rewriter.cache import write_atomically, write_text
from rewriter.errors import RewriteError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WRAPPED = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)")
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias|magnitude_vector(?:\.weight)?)")
_COPY = re.compile(r"\.modules_to_save\.(default\.)?")
_PARTS = {"A.weight": "down", "B.weight": "up", "B.bias": "shift", "magnitude_vector": "magnitude", "magnitude_vector.weight": "magnitude"}
REFUSED = (
    "trainable_token_indices", "layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora",
    "arrow_config", "kasa_config",
)  # fmt: skip
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others take something out of the base weight
_BIASES = ("none", "all", "lora_only")
MOST_BLOCKS = 128  # of a block-diagonal factor: so many times as large it becomes
MOST_REPEATS = 2  # of a pattern: more could take forever on a name


def load_adapter(folder: Path, scale: float = 1.0) -> Adapter:
    """What the folder adds, its factors in the types that they are stored in, `scale` and s folded into the second one.

    RewriteError where a file is missing or damaged, or where it holds what is not read.
    """
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    for file in (config_file, weights_file):
        if not file.is_file():
            raise RewriteError(f"--adapter {folder} holds no {file.name}; expected a LoRA adapter as peft saves it")
    config = read_object(config_file, "a LoRA adapter's configuration")
    _check_options(folder, config)
    parts, saved = _read(weights_file)
    updates = {path: _update(folder, config, path, held, scale) for path, held in parts.items()}
    if not updates and not saved:
        raise RewriteError(f"{weights_file} holds nothing; save the adapter again with peft")
    return Adapter(str(folder), scale, updates, saved)


def _wrong(folder: Path, text: str) -> RewriteError:
    return RewriteError(f"--adapter {folder}: {text}; save the adapter again with peft")


def _check_options(folder: Path, config: dict[str, Any]) -> None:
    """Whatever peft can train beyond the equations above."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RewriteError(f"--adapter {folder} is of type {kind!r}; only LORA can be read, merge others with peft first")
    unread = [name for name in REFUSED if config.get(name)]
    unread += ["bias"] if config.get("bias", "none") not in _BIASES else []
    unread += ["init_lora_weights"] if config.get("init_lora_weights") not in _STARTS else []
    if unread:
        raise RewriteError(f"--adapter {folder} uses {unread[0]}, which is not read; merge it into the model with peft first")


def _read(file: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Factors by module, and whole tensors by name, without the wrappers' prefixes."""
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, value in load_safetensors(file).items():
        found = _WRAPPED.fullmatch(key)
        name = found["path"].replace(".base_layer.", ".") if found is not None else ""
        if ".original_module." in name:
            continue  # a whole module that is saved too runs in its place; peft lists its biases all the same
        name, again = _COPY.subn(".", name)
        factor = _FACTOR.fullmatch(re.sub(r"(\.lora_\w+)\.(?!weight$|bias$)\w+", r"\1", name))
        if not name or ("lora_" in name and factor is None):
            text = f"{file} holds {key!r}, which is no part of a LoRA adapter of linears"
            raise RewriteError(f"{text}; merge it into the model with peft first")
        held, part = (parts.setdefault(factor["path"], {}), _PARTS[factor["part"]]) if factor is not None else (saved, name)
        if part in held and again and held[part].equal(value):
            continue
        if part in held:
            raise RewriteError(f"{file} holds {name!r} twice; save one adapter to a file")
        held[part] = value
    return parts, saved


def _update(folder: Path, config: dict[str, Any], path: str, held: Mapping[str, Tensor], scale: float) -> Update:
    if not {"down", "up"} <= set(held):
        missing = " and ".join(f"lora_{side}" for side, part in (("A", "down"), ("B", "up")) if part not in held)
        raise _wrong(folder, f"{path!r} lacks {missing}")
    if bool(config.get("use_dora")) != ("magnitude" in held):
        raise _wrong(folder, f"use_dora is {config.get('use_dora')}, and {path!r} says otherwise")
    for part, axes in (("down", 2), ("up", 2), ("shift", 1), ("magnitude", 1)):
        if part in held and (held[part].dim() != axes or not held[part].is_floating_point()):
            said = f"{held[part].dtype} {list(held[part].shape)}"
            raise _wrong(folder, f"the {part} of {path!r} is {said}, not floats with {axes} axes")
    rank = _by_module(folder, config, path, "r", "rank_pattern")
    alpha = _by_module(folder, config, path, "lora_alpha", "alpha_pattern")
    if not isinstance(rank, int) or rank < 1:
        raise _wrong(folder, f"the rank r of {path!r} is {rank!r}; it must be a whole number from 1 on")
    held = _block_diagonal(folder, config, path, held)
    down, up = held["down"], held["up"]
    if len(down) != rank or up.shape[1] != rank:
        shapes = f"{list(up.shape)} x {list(down.shape)}"
        raise _wrong(folder, f"the factors of {path!r} are {shapes}, its configuration says rank {rank}")
    strength = scale * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    shift = held.get("shift")
    return Update(down, up.float() * strength, None if shift is None else shift.float() * strength, held.get("magnitude"))


def _block_diagonal(folder: Path, config: dict[str, Any], path: str, held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """BD-LoRA's factors whole, zero off the blocks: A or B of the modules in whose name one of its patterns is."""
    options = config.get("use_bdlora") or {}
    blocks = options.get("nblocks", 1) if isinstance(options, dict) else None
    if not isinstance(blocks, int) or not 1 <= blocks <= MOST_BLOCKS:
        raise _wrong(folder, f"use_bdlora has nblocks {blocks!r}; it must be a whole number from 1 to {MOST_BLOCKS}")
    patterns = {"down": options.get("target_modules_bd_a") or [], "up": options.get("target_modules_bd_b") or []}
    chosen = [part for part, words in patterns.items() if any(str(word) in path for word in words)]
    for part in chosen:
        if len(chosen) > 1 or len(held[part]) % blocks:
            raise _wrong(folder, f"the {part} of {path!r} is {list(held[part].shape)}, which is not {blocks} blocks of one of two factors")
        held = {**held, part: torch.block_diag(*held[part].chunk(blocks))}
    return held


def save_adapter(folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> Path:
    """The folder that peft writes for these (A (r, n), B (m, r)) by module path, all of one rank; `scale` becomes lora_alpha / r.

    Files that are there are replaced, the configuration last. RewriteError where the folder cannot be written.
    """
    rank = len(next(iter(factors.values()))[0])
    modules = "|".join(re.escape(path) for path in factors)  # a pattern fits whole names, a list their tails
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "target_modules": modules, "bias": "none", "lora_dropout": 0.0}
    named = {f"base_model.model.{p}.lora_{side}.weight": t for p, pair in factors.items() for side, t in zip("AB", pair, strict=True)}
    held = {key: tensor.detach().cpu().contiguous() for key, tensor in named.items()}
    try:
        write_atomically(folder / WEIGHTS, lambda path: save_file(held, path, {"format": "pt"}))
        write_atomically(folder / CONFIG, lambda path: write_text(path, json.dumps({**config, "task_type": None, "inference_mode": True})))
    except OSError as problem:
        raise RewriteError(f"{folder} cannot be written ({problem.strerror or problem}); give another folder") from problem
    return folder


def _by_module(folder: Path, config: dict[str, Any], path: str, name: str, patterns: str) -> float:
    """The first pattern that the module's name ends with, as peft has it, else the number for all."""
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise _wrong(folder, f"{patterns} is {type(table).__name__}, not a table")
    for pattern in table:
        if len(re.findall(r"[*+{]", pattern)) > MOST_REPEATS or re.search(r"\)[*+?{]", pattern):
            raise _wrong(folder, f"{patterns} has {pattern!r}; patterns repeat at most {MOST_REPEATS} times here, and no group")
    try:
        value = next((v for pattern, v in table.items() if re.match(rf"(.*\.)?({pattern})$", path)), config.get(name))
    except re.error as problem:
        raise _wrong(folder, f"a pattern of {patterns} is none ({problem})") from None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise _wrong(folder, f"{name} of {path!r} is {value!r}; it must be a finite number")
    return value
