"""torch.export.load runs what a file tells it to run, so a file is checked, copied without its pickle, and only the copy is loaded.

The ways in that are closed here: sample inputs (a pickle) become zero bytes, pickled weights, custom and opaque objects and
compiled payloads are refused, and the program's JSON is held to program.py. The same copy is what save_pt2 publishes.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from rewriter.backends.files.archive import Archive, one_line, open_archive
from rewriter.backends.files.atomic import publish, reserve, scratch_beside
from rewriter.backends.files.program import Refused, check_program, output_module
from rewriter.backends.files.quiet import muted
from rewriter.errors import RewriteError

_MODEL: Final = "models/model.json"
_SAMPLES: Final = "data/sample_inputs/model.pt"
_CONFIGS: Final = {
    "data/weights/": ("data/weights/model_weights_config.json", re.compile(r"weight_\d{1,9}")),
    "data/constants/": ("data/constants/model_constants_config.json", re.compile(r"tensor_\d{1,9}")),
}
_SMALL: Final = {"archive_format": b"pt2", "archive_version": b"0", ".data/version": None, "byteorder": b"little"}
_IGNORED: Final = {".data/serialization_id", _SAMPLES}
_EXTRA_NAME: Final = re.compile(r"[\w.\-]{1,200}")
_MAX_EXTRA_NBYTES: Final = 64 << 20
_SUFFIXES_OF_CODE: Final = (".so", ".cpp", ".o", ".cubin", ".ptx", ".py", ".dll", ".dylib", ".hsaco", ".spv")
_MAX_EXPANDED_NBYTES: Final = 1 << 40
_ITEM_NBYTES: Final = {  # the serialised number of a dtype -> bytes
    **dict.fromkeys((1, 2, 12, 29, 30, 31, 32, 33), 1),
    **dict.fromkeys((3, 6, 13, 28), 2),
    **dict.fromkeys((4, 7, 9, 34), 4),
    **dict.fromkeys((5, 8, 10, 35), 8),
    11: 16,
}
_NODE_NBYTES: Final = 8 << 10
_MARGIN_NBYTES: Final = 1 << 20
_WAY_ON: Final = "export the model again with torch.export.save, or give .onnx or .safetensors"


def load_pt2(path: Path | str) -> ExportedProgram:
    """The program in a .pt2 without its example inputs; RewriteError with one line for anything that is damaged or could run code."""
    path = Path(path)
    with muted(), tempfile.TemporaryDirectory(prefix="rewriter-") as scratch:
        clean = Path(scratch) / "model.pt2"
        try:
            _copy_checked(path, clean)
        except OSError as problem:
            text = one_line(problem)
            raise RewriteError(f"{path}: cannot be copied for loading ({text}); check it, and the space in TMPDIR") from problem
        return _load_trusted(path, clean)


def save_pt2(program: ExportedProgram, path: Path | str, extra: Mapping[str, str] | None = None) -> None:
    """Write `program` without example inputs, build paths or pickles; `path` is the old file until the new one is whole and checked."""
    path = Path(path)
    extra = dict(extra or {})
    for name in extra:
        if not _EXTRA_NAME.fullmatch(name):
            raise RewriteError(f"{path}: extra file {name!r}; its name may hold letters, digits, '.', '_' and '-' only, rename it")
    bare = copy.copy(program)
    bare._example_inputs = None  # torch then writes zero bytes: no pickle, no user data
    with muted(), scratch_beside(path) as scratch:
        raw, clean = scratch / "raw.pt2", scratch / "model.pt2"
        reserve(scratch, _estimate(bare, extra), files=2)  # raw and clean exist side by side
        try:
            torch.export.save(bare, raw, extra_files=extra)
        except OSError:
            raise
        except Exception as problem:
            raise RewriteError(f"{path}: torch.export cannot write this program ({one_line(problem)}); {_WAY_ON}") from problem
        _copy_checked(raw, clean, shown=path)
        raw.unlink()
        publish(clean, path)


def _estimate(program: ExportedProgram, extra: Mapping[str, str]) -> int:
    """What torch.export.save will write at most, nearly: every storage once, and a margin for the JSON with its stack traces."""
    tensors = [value for value in (*program.state_dict.values(), *program.constants.values()) if isinstance(value, torch.Tensor)]
    storages = {}
    for tensor in tensors:
        if tensor.layout is torch.strided:  # sparse ones have no storage, and are refused later
            storage = tensor.untyped_storage()
            storages[storage.data_ptr() or id(tensor)] = storage.nbytes()
    modules = (part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule))
    entries = sum(len(part.graph.nodes) for part in modules) + len(tensors)
    return sum(storages.values()) + sum(len(text.encode()) for text in extra.values()) + _NODE_NBYTES * entries + _MARGIN_NBYTES


def read_extra(path: Path | str) -> dict[str, str]:
    """The texts stored beside the program, by name."""
    path = Path(path)
    with open_archive(path) as archive:
        return {name: _extra_text(archive, name) for name in map(_extra_name, archive.names()) if name}


def _extra_name(member: str) -> str:
    return member.removeprefix("extra/") if member.startswith("extra/") else ""


def _extra_text(archive: Archive, name: str) -> str:
    try:
        return archive.read(f"extra/{name}", limit=_MAX_EXTRA_NBYTES).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise RewriteError(f"{archive.path}: extra file {name!r} is no UTF-8 text; {_WAY_ON}") from problem


def _copy_checked(path: Path, clean: Path, shown: Path | None = None) -> None:
    """Judge every member of `path` and write what is allowed to `clean`, always the same bytes for the same content."""
    try:
        with open_archive(path) as archive:
            payloads = _check_members(archive)
            program = archive.json(_MODEL)
            targets, classes = check_program(program, _registered_plainly)
            _prepare(targets, classes)
            with zipfile.ZipFile(clean, "w", zipfile.ZIP_STORED) as target:
                for name in payloads:
                    with target.open(_entry(name), "w", force_zip64=archive.nbytes(name) >= 1 << 31) as member:
                        archive.copy(name, member)
                target.writestr(_entry(_MODEL), json.dumps(program, separators=(",", ":")))
                target.writestr(_entry(_SAMPLES), b"")
    except Refused as reason:
        raise RewriteError(f"{shown or path}: refused, {reason}; {_WAY_ON}") from reason


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"model/{name}", date_time=(1980, 1, 1, 0, 0, 0))


def _check_members(archive: Archive) -> list[str]:
    """The members that are copied as they are: what the format names and the configs refer to."""
    for name in (*_SMALL, _MODEL, _SAMPLES):
        if name not in archive and name != "byteorder":
            raise Refused(f"it has no {name}")
    wanted = dict.fromkeys(name for name in _SMALL if name in archive)  # ordered, and quick to ask for a hundred thousand names
    for name, content in _SMALL.items():
        if name in archive and (text := archive.read(name, limit=64)) != content and content is not None:
            raise Refused(f"its {name} is {text[:20]!r} and {content!r} is known")
    for folder, (config, names) in _CONFIGS.items():
        wanted |= dict.fromkeys([config, *_check_payloads(archive, folder, archive.json(config), names)])
    for name in archive.names():
        if name.startswith("extra/"):
            if not _EXTRA_NAME.fullmatch(name.removeprefix("extra/")):
                raise Refused(f"the extra file {name[:80]!r}")
            wanted[name] = None
    for name in archive.names():
        if name not in wanted and name not in _IGNORED and name != _MODEL:
            _refuse_stray(name)
    return list(wanted)


def _refuse_stray(name: str) -> None:
    if name.startswith("data/aotinductor/") or name.endswith(_SUFFIXES_OF_CODE):
        raise Refused(f"it carries compiled code ({name[:80]})")
    if name.startswith(("data/weights/", "data/constants/")) and re.fullmatch(r"(weight|tensor)_\d+", name.rsplit("/", 1)[1]):
        return  # stored and referred to by nobody: left behind
    raise Refused(f"it carries {name[:80]!r}, which no plain export has")


def _check_payloads(archive: Archive, folder: str, config: Any, names: re.Pattern[str]) -> list[str]:
    """Every tensor is raw bytes whose length its shape, strides and dtype fit into."""
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise Refused("a table of weights that is not one")
    members: dict[str, None] = {}
    for tensor, entry in entries.items():
        path_name = entry.get("path_name")
        if entry.get("use_pickle") is not False:
            raise Refused(f"{tensor[:80]!r} is stored as a pickle")
        if not isinstance(path_name, str) or not names.fullmatch(path_name):
            raise Refused(f"{tensor[:80]!r} is no plain tensor but {str(path_name)[:80]!r}")
        if folder + path_name not in archive:
            raise Refused(f"{tensor[:80]!r} has no bytes in the archive")
        _check_tensor(tensor, entry.get("tensor_meta"), archive.nbytes(folder + path_name))
        members[folder + path_name] = None
    return list(members)


def _check_tensor(name: str, meta: Any, nbytes: int) -> None:
    try:
        sizes = [size["as_int"] for size in meta["sizes"]]
        strides = [stride["as_int"] for stride in meta["strides"]]
        offset, item = meta["storage_offset"]["as_int"], _ITEM_NBYTES[meta["dtype"]]
        device, strided = meta["device"]["type"], meta["layout"] == 7
    except (TypeError, KeyError) as problem:
        raise Refused(f"{name[:80]!r} does not say its shape and dtype") from problem
    numbers = [*sizes, *strides, offset]
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers) or len(sizes) != len(strides) or len(sizes) > 64:
        raise Refused(f"{name[:80]!r} has an impossible shape")
    if not strided or device not in ("cpu", "cuda", "mps", "xpu"):
        raise Refused(f"{name[:80]!r} lies on {str(device)[:20]!r} or is sparse")
    count = 1
    for size in sizes:
        count *= size
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1 if count else 0
    if last * item > nbytes or count * item > _MAX_EXPANDED_NBYTES:
        raise Refused(f"{name[:80]!r} has shape {sizes} and {nbytes} bytes, too few")


def _registered_plainly(name: str) -> bool:
    """A class that the caller's own code registered with torch, and whose context is plain JSON."""
    kind = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name)
    return kind is not None and pytree.SUPPORTED_SERIALIZED_TYPES[kind].from_dumpable_context is None


def _prepare(targets: set[str], classes: set[str]) -> None:
    """Import what a clean file may refer to, then let every operator resolve before torch builds anything."""
    for module in sorted({module for name in classes if (module := output_module(name))}):
        try:
            importlib.import_module(module)
        except Exception as problem:
            raise Refused(f"its outputs are of {module}, which cannot be imported here ({one_line(problem)})") from problem
    if any(target.startswith("torch.ops.structured.") for target in targets):
        try:
            importlib.import_module("rewriter.backends.fx.custom_op")
        except ImportError as problem:
            raise Refused("it calls structured operators, whose library is missing") from problem
    for target in sorted(targets):
        if target.startswith("torch.ops."):
            _resolve(target)


def _resolve(target: str) -> None:
    found: Any = torch.ops
    if target.startswith("torch.ops.higher_order."):
        importlib.import_module("torch._higher_order_ops")
    try:
        for name in target.split(".")[2:]:
            found = getattr(found, name)
    except (AttributeError, RuntimeError) as problem:
        raise Refused(f"the operator {target!r} is not known to torch {torch.__version__}") from problem
    if not isinstance(found, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        raise Refused(f"{target!r} is no operator")


def _symbols_only(program: ExportedProgram) -> ExportedProgram:
    """The ranges of derived sizes (`past + seq`, `2 * n`), which torch.export.save writes, come back among the symbols of the shape
    environment, where `run_decompositions` fails on them; the program goes on checking them."""
    from torch._export.utils import _get_shape_env_from_gm

    ranges = getattr(_get_shape_env_from_gm(program.graph_module), "var_to_range", {})
    for size in [size for size in ranges if not size.is_Symbol]:
        del ranges[size]
    return program


def _load_trusted(path: Path, clean: Path) -> ExportedProgram:
    """torch.export.load less its fallback to an older format, which reads other members of the zip."""
    from torch.export.pt2_archive._package import load_pt2 as load_archive

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _symbols_only(load_archive(str(clean)).exported_programs["model"])
    except (Exception, RecursionError) as problem:
        reason = one_line(str(problem).rsplit("Original exception", 1)[0]) or type(problem).__name__
        raise RewriteError(f"{path}: torch {torch.__version__} cannot rebuild the program ({reason}); {_WAY_ON}") from problem
