"""What a file is, is what its bytes say: the suffix is never asked, and multi-gigabyte files are skipped through, not read."""

from __future__ import annotations

import enum
import json
import os
from pathlib import Path
from typing import BinaryIO

from rewriter.backends.files.archive import MAX_RATIO, open_archive
from rewriter.errors import RewriteError

MAX_HEADER_NBYTES = 100_000_000  # the safetensors library's own cap
_ALLOWED = "give a .pt2, .onnx, .safetensors, a torch.save file or a Hugging Face folder"
_LEGACY_MAGIC = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_OTHERS = {
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMP": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
    b"\x7fELF": "a program library",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` for the file itself",
}
# ModelProto's fields (onnx.proto), number -> wire type: 1 ir_version, 7 graph, 8 opset_import, 14 metadata, 25 functions, ...
_MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}


class Kind(enum.Enum):
    """What a path turned out to be."""

    PT2 = "pt2"
    ONNX = "onnx"
    TORCH_ZIP = "torch"
    TORCHSCRIPT = "torchscript"
    LEGACY_PICKLE = "legacy-pickle"
    SAFETENSORS = "safetensors"
    FOLDER = "folder"


def recognise(path: Path) -> Kind:
    """The kind of `path`, by content; RewriteError with one line for anything else, the truncated included."""
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise RewriteError(f"{path}: there is no such file; check the path")
    if not path.is_file():
        raise RewriteError(f"{path}: not a regular file; {_ALLOWED}")
    length = path.stat().st_size
    if length == 0:
        raise RewriteError(f"{path}: the file is empty; fetch or write it again")
    try:
        with path.open("rb") as file:
            head = file.read(32)
            if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
                return _zip(path)
            if head.startswith(_LEGACY_MAGIC):
                return Kind.LEGACY_PICKLE
            if _looks_safetensors(head):
                return _safetensors(path, file, length)
            return _onnx(path, file, head, length)
    except PermissionError as problem:
        raise RewriteError(f"{path}: may not be read by this user; change its permissions") from problem


def _folder(path: Path) -> Kind:
    if (path / "config.json").is_file():
        return Kind.FOLDER
    raise RewriteError(f"{path}: a folder without config.json; give a Hugging Face folder or the model file itself")


def _zip(path: Path) -> Kind:
    with open_archive(path, max_ratio=MAX_RATIO) as archive:
        names = archive.names()
    members = set(names)
    if "archive_format" in members or any(name.startswith("models/") and name.endswith(".json") for name in names):
        return Kind.PT2
    if "serialized_exported_program.json" in members:
        raise RewriteError(f"{path}: a .pt2 of torch 2.7 or older; load it there and write it again with torch 2.8 or newer")
    if any(name.startswith("code/") for name in names) or "constants.pkl" in members:
        return Kind.TORCHSCRIPT
    if "data.pkl" in members and ("version" in members or ".data/version" in members):
        return Kind.TORCH_ZIP
    if names and all(name.endswith(".npy") for name in names):
        raise RewriteError(f"{path}: a NumPy .npz, which is data and no model; pass it with --data, and {_ALLOWED} as the model")
    raise RewriteError(f"{path}: a zip that holds no model this program knows; {_ALLOWED}")


def _looks_safetensors(head: bytes) -> bool:
    return len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_NBYTES


def _safetensors(path: Path, file: BinaryIO, length: int) -> Kind:
    read_safetensors_header(path, file, length)
    return Kind.SAFETENSORS


def read_safetensors_header(path: Path, file: BinaryIO, length: int) -> tuple[dict[str, dict[str, object]], int]:
    """The header as JSON objects and the offset at which data begins; the declared ranges must lie inside the file."""
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_NBYTES or 8 + size > length:
        raise RewriteError(f"{path}: a truncated safetensors file (its header takes {size} bytes, the file has {length}); fetch it again")
    try:
        header = json.loads(file.read(size).decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise RewriteError(f"{path}: a safetensors header that is not JSON; fetch or write the file again") from problem
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise RewriteError(f"{path}: a safetensors header that names no tensors; fetch or write the file again")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        offsets = entry.get("data_offsets")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(value) is int for value in offsets)):
            raise RewriteError(f"{path}: tensor {name!r} has no data_offsets; fetch or write the file again")
        if not 0 <= offsets[0] <= offsets[1] <= length - 8 - size:
            raise RewriteError(
                f"{path}: tensor {name!r} ends at byte {8 + size + offsets[1]} of a file of {length}; it is truncated, fetch it again"
            )
    return header, 8 + size


def _onnx(path: Path, file: BinaryIO, head: bytes, length: int) -> Kind:
    """Walk ModelProto's top-level fields and skip over what they hold, so that the graph's gigabytes are never read."""
    file.seek(0)
    seen: set[int] = set()
    while file.tell() < length:
        tag = _varint(file)
        number, wire = (tag >> 3, tag & 7) if tag is not None else (0, -1)
        if _MODEL_FIELDS.get(number) != wire:
            raise _unknown(path, head, seen)
        value = _varint(file)
        end = file.tell() + (value or 0) if wire == 2 else file.tell()
        if value is None or end > length:
            if seen:
                raise RewriteError(f"{path}: a truncated ONNX file (field {number} ends past its {length} bytes); fetch or write it again")
            raise _unknown(path, head, seen)
        file.seek(end, os.SEEK_SET)
        seen.add(number)
    if not {1, 7} <= seen:
        raise _unknown(path, head, set())
    return Kind.ONNX


def _unknown(path: Path, head: bytes, seen: set[int]) -> RewriteError:
    if {1, 7} <= seen:
        return RewriteError(f"{path}: a damaged ONNX file (bytes that belong to no field of a model); fetch or write it again")
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            return RewriteError(f"{path}: {name}; {_ALLOWED}")
    return RewriteError(f"{path}: neither a model file this program knows nor a whole one; {_ALLOWED}")


def _varint(file: BinaryIO) -> int | None:
    """A base-128 number of at most ten bytes; None where the file ends inside it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    return None
