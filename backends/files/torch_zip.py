"""A torch.save file is a pickle: it is read by the weights-only unpickler, and a pickled module needs the user's word."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rewriter.backends.files.archive import one_line, open_archive
from rewriter.backends.files.sniff import Kind, recognise
from rewriter.errors import RewriteError

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights", "ema", "params")
_MAX_PICKLE_NBYTES = 1 << 30
_SHOWN = 6
_WAYS_ON = (
    "save model.state_dict() and give --arch MODULE:FACTORY, or give a .pt2, .onnx or .safetensors file,"
    " or --trust-pickle if you made the file yourself"
)


def load_torch(path: Path | str, trust_pickle: bool = False) -> nn.Module | dict[str, Tensor]:
    """The state dict (or, with `trust_pickle`, the module) in a torch.save file; nothing in it runs unless trusted."""
    path = Path(path)
    kind = recognise(path)
    if kind is Kind.TORCHSCRIPT:
        raise RewriteError(f"{path}: a TorchScript archive, whose code cannot be rewritten; export the original module to .pt2 or .onnx")
    if kind not in (Kind.TORCH_ZIP, Kind.LEGACY_PICKLE):
        raise RewriteError(f"{path}: a {kind.value} file and no torch.save file; load it as what it is")
    if trust_pickle:
        return _unwrap(path, _trusted(path))
    if kind is Kind.LEGACY_PICKLE:
        raise RewriteError(f"{path}: a pickle in the format before torch 1.6, which is not read; {_WAYS_ON}")
    _check_archive(path)
    return _unwrap(path, _weights_only(path))


def _check_archive(path: Path) -> None:
    """Members are stored uncompressed; the pickle in the middle is small."""
    with open_archive(path) as archive:
        nbytes = archive.nbytes("data.pkl")
    if nbytes > _MAX_PICKLE_NBYTES:
        raise RewriteError(f"{path}: its pickle has {nbytes} bytes, {_MAX_PICKLE_NBYTES} are allowed; give a .safetensors file")


def _weights_only(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as problem:
        raise _refusal(path, problem) from problem
    except Exception as problem:
        raise RewriteError(f"{path}: torch cannot read it ({one_line(problem)}); fetch or write the file again") from problem


def _refusal(path: Path, problem: Exception) -> RewriteError:
    try:
        names = sorted(str(name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:
        names = []
    if not names:
        return RewriteError(f"{path}: its pickle does more than hold tensors ({one_line(problem)}); {_WAYS_ON}")
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return RewriteError(f"{path}: a pickled module or object, loading it would run {', '.join(names[:_SHOWN])}{more}; {_WAYS_ON}")


def _trusted(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as problem:
        raise RewriteError(
            f"{path}: the trusted pickle cannot be read ({one_line(problem)}); run where its classes can be imported"
        ) from problem


def _unwrap(path: Path, loaded: object) -> nn.Module | dict[str, Tensor]:
    """A module, or the flat table of tensors that a checkpoint holds at its top or one or two levels down."""
    if isinstance(loaded, nn.Module):
        return loaded.eval()
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        if isinstance(state := _tensors(loaded), dict):
            return state
        inner = next((loaded[name] for name in WRAPPERS if isinstance(loaded.get(name), Mapping | nn.Module)), None)
        if isinstance(inner, nn.Module):
            return inner.eval()
        loaded = inner
    raise RewriteError(f"{path}: holds no table of tensors (nor under {', '.join(WRAPPERS)}); save model.state_dict() and try again")


def _tensors(table: Mapping[object, object]) -> dict[str, Tensor] | None:
    found = {name: value for name, value in table.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return found if found and len(found) == len(table) else None
