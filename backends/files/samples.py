"""Calibration data is data: arrays from an .npz that holds no pickle, sentences from a text file, sized before they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from rewriter.backends.files.archive import MAX_RATIO, Archive, one_line, open_archive
from rewriter.errors import RewriteError

MAX_NBYTES = 64 << 30
_MAX_HEADER_NBYTES = 10_000
_DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "complex64", "complex128",
)  # fmt: skip

Array = np.ndarray[Any, np.dtype[Any]]


def load_npz(path: Path | str, max_nbytes: int = MAX_NBYTES) -> dict[str, Array]:
    """The arrays of an .npz by name; axis 0 is the samples and agrees between them, an array without axes is the same for all."""
    path = Path(path)
    if not path.is_file():
        raise RewriteError(f"{path}: there is no such file; give --data an .npz or a .txt that exists")
    with open_archive(path, max_ratio=MAX_RATIO) as archive:
        names = archive.names()
        if not names or not all(name.endswith(".npy") for name in names):
            raise RewriteError(f"{path}: not an .npz of arrays; write it with numpy.savez(path, input_name=array, ...)")
        total = sum(archive.nbytes(name) for name in names)
        if total > max_nbytes:
            raise RewriteError(f"{path}: {total} bytes of arrays and {max_nbytes} are allowed; keep fewer samples")
        for name in names:
            _check_header(archive, name)
        arrays = {(archive.root + name).removesuffix(".npy"): _array(archive, name) for name in names}
    if len({array.shape[0] for array in arrays.values() if array.ndim}) > 1:
        shown = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise RewriteError(f"{path}: axis 0 is the samples and must agree, got {shown}; write arrays of the same length")
    return arrays


def load_lines(path: Path | str) -> list[str]:
    """One sentence a line, UTF-8, blank lines dropped."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as problem:
        raise RewriteError(f"{path}: cannot be read ({one_line(problem)}); give --data a text file that exists") from problem
    if b"\x00" in raw:
        raise RewriteError(f"{path}: a binary file; --data takes an .npz or UTF-8 text with one sentence a line")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise RewriteError(f"{path}: byte {problem.start} is no UTF-8; write the text as UTF-8, one sentence a line") from problem
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise RewriteError(f"{path}: no text in it; write one sentence a line")
    return lines


def _check_header(archive: Archive, name: str) -> None:
    """Shape and dtype are read from the first bytes alone, so a file that declares more than it holds costs nothing."""
    import io

    head = next(archive.chunks(name), b"")
    stream = io.BytesIO(head)
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(stream, max_header_size=_MAX_HEADER_NBYTES)
    except Exception as problem:
        raise RewriteError(f"{archive.path}: {name} is a damaged array ({one_line(problem)}); write the file again") from problem
    if dtype.hasobject:
        raise RewriteError(f"{archive.path}: {name} holds Python objects, which are pickles; write arrays of numbers")
    if dtype.name not in _DTYPES:
        raise RewriteError(f"{archive.path}: {name} holds {_shown(dtype)}; only {', '.join(_DTYPES)} are read, convert it to one of them")
    count = 1
    for size in shape:
        count *= size
    if min(shape, default=0) < 0 or stream.tell() + count * dtype.itemsize != archive.nbytes(name):
        raise RewriteError(f"{archive.path}: {name} declares {list(shape)} {dtype} and holds {archive.nbytes(name)} bytes; write it again")


def _shown(dtype: np.dtype[Any]) -> str:
    """A structured dtype may list thousands of fields, which nobody reads."""
    return f"records of {len(dtype.names)} fields" if dtype.names else dtype.name


def _array(archive: Archive, name: str) -> Array:
    """In the machine's own byte order, whatever wrote it."""
    import io

    stream = io.BytesIO(archive.read(name, limit=MAX_NBYTES))
    try:
        array: Array = npy.read_array(stream, allow_pickle=False, max_header_size=_MAX_HEADER_NBYTES)
    except Exception as problem:
        raise RewriteError(f"{archive.path}: {name} is a damaged array ({one_line(problem)}); write the file again") from problem
    return array.astype(array.dtype.newbyteorder("="), copy=False)
