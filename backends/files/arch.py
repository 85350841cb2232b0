"""Weights without code: tensors from a checked safetensors file, and the code that they belong to from the user's own factory."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from rewriter.backends.files.archive import one_line
from rewriter.backends.files.sniff import read_safetensors_header
from rewriter.errors import RewriteError

PREFIXES = ("module.", "model.", "_orig_mod.")  # left by DataParallel, wrappers and torch.compile
_SHOWN = 5
_MAX_NDIM = 64  # torch's own
_ITEM_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def build(arch: str, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Call the factory `MODULE:FACTORY` without arguments and load `state` into what it returns; evaluation mode."""
    module = _call(arch)
    if state is not None:
        _load(arch, module, state)
    return module.eval()


def load_safetensors(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, memory-mapped, after shape, dtype and offsets were found to agree."""
    import safetensors

    path = Path(path)
    _check_safetensors(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as problem:
        raise RewriteError(f"{path}: not a readable safetensors file ({one_line(problem)}); fetch or write it again") from problem


def _check_safetensors(path: Path) -> None:
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            header, _ = read_safetensors_header(path, file, length)
    except OSError as problem:
        raise RewriteError(f"{path}: cannot be read ({one_line(problem)}); check the path") from problem
    for name, entry in header.items():
        shape, dtype, offsets = entry.get("shape"), entry.get("dtype"), entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEM_BITS or not _is_shape(shape):
            raise RewriteError(f"{path}: tensor {name!r} has dtype {dtype!r} and shape {shape!r}, which are none; write the file again")
        assert isinstance(offsets, list) and isinstance(shape, list)
        count = 1
        for size in shape:
            count *= size
        if (count * _ITEM_BITS[dtype] + 7) // 8 != offsets[1] - offsets[0]:
            raise RewriteError(
                f"{path}: tensor {name!r} of shape {shape} {dtype} does not fill its {offsets[1] - offsets[0]} bytes; write the file again"
            )


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and len(shape) <= _MAX_NDIM and all(type(size) is int and size >= 0 for size in shape)


def _call(arch: str) -> nn.Module:
    name, colon, attribute = arch.partition(":")
    if not colon or not name or not attribute:
        raise RewriteError(f"--arch {arch}: give MODULE:FACTORY, for example --arch mypackage.models:build")
    with _here_on_path():
        try:
            factory = importlib.import_module(name)
        except Exception as problem:
            text = one_line(problem)
            raise RewriteError(f"--arch {arch}: module {name} cannot be imported ({text}); check it from this folder") from problem
        found: object = factory
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise RewriteError(f"--arch {arch}: {name} has no {attribute}; name a function or class without required arguments")
            found = getattr(found, part)
        if not callable(found):
            raise RewriteError(f"--arch {arch}: {attribute} cannot be called; name a function or class without required arguments")
        try:
            module = found()
        except Exception as problem:
            raise RewriteError(
                f"--arch {arch}: calling it without arguments failed ({one_line(problem)}); wrap it in a factory that needs none"
            ) from problem
    if not isinstance(module, nn.Module):
        raise RewriteError(f"--arch {arch}: it returned {type(module).__name__}; it must return a torch.nn.Module")
    return module


@contextmanager
def _here_on_path() -> Iterator[None]:
    """The user's folder comes first while their module is imported, as it does for `python -m`."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _load(arch: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    wanted = module.state_dict()
    state = _fill_tied(_strip_prefixes(state, set(wanted)), wanted)
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unexpected:
        parts = [f"{label} {_listed(names)}" for label, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise RewriteError(f"--arch {arch}: the weights do not fit: {'; '.join(parts)}; name the factory of this very model")
    for name, tensor in state.items():
        if isinstance(wanted[name], Tensor) and wanted[name].shape != tensor.shape:
            raise RewriteError(
                f"--arch {arch}: {name} is {list(tensor.shape)} in the file and {list(wanted[name].shape)} in the module;"
                " name the factory of this very model"
            )
    try:
        with torch.no_grad():
            module.load_state_dict(dict(state), strict=True, assign=_may_stand_in(wanted, state))
    except Exception as problem:
        text = one_line(problem)
        raise RewriteError(f"--arch {arch}: the weights cannot be loaded ({text}); name the factory of this very model") from problem


def _may_stand_in(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    """Memory-mapped weights replace the module's own only where that changes no dtype and unties no parameter."""
    if not all(isinstance(tensor, Tensor) for tensor in wanted.values()):
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in wanted.values()}
    return len(storages) == len(wanted) and all(wanted[name].dtype == tensor.dtype for name, tensor in state.items())


def _fill_tied(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file may hold one name of a tied weight; the module knows the others."""
    present = {_identity(wanted[name]): tensor for name, tensor in state.items() if isinstance(wanted.get(name), Tensor)}
    tied = {
        name: present[_identity(tensor)]
        for name, tensor in wanted.items()
        if name not in state and isinstance(tensor, Tensor) and tensor.numel() and _identity(tensor) in present
    }
    return state | tied


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _strip_prefixes(state: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Wrappers' prefixes go where every name carries one and the module itself does not."""
    names = dict(state)
    for _ in PREFIXES:
        if names.keys() & wanted:
            break
        prefix = next((prefix for prefix in PREFIXES if names and all(name.startswith(prefix) for name in names)), None)
        if prefix is None:
            break
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
    if not names.keys() & wanted:
        inner = {name.replace("_orig_mod.", ""): tensor for name, tensor in names.items()}
        names = inner if len(inner) == len(names) else names
    return names


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
