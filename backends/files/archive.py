"""A zip is trusted for nothing: names, counts and sizes are checked against the length of the file before a member is read."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from rewriter.errors import RewriteError

MAX_MEMBERS = 1_000_000
MAX_RATIO = 1100  # above deflate's own limit of 1032: what an archive that may be compressed is allowed
MAX_JSON_NBYTES = 1 << 30
_CHUNK_NBYTES = 1 << 20
_BAD_NAME = re.compile(r"[\x00-\x1f\\]")


class Archive:
    """An open zip whose members are addressed without the archive's root folder, if it has a single one."""

    def __init__(self, path: Path, handle: zipfile.ZipFile, max_ratio: int) -> None:
        self.path = path
        self._zip = handle
        infos = handle.infolist()
        _check_members(path, infos, max_ratio)
        files = [info for info in infos if not info.is_dir()]
        self.root = _common_root([info.filename for info in files])
        self._infos = {info.filename[len(self.root) :]: info for info in files}

    def names(self) -> list[str]:
        return list(self._infos)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def nbytes(self, name: str) -> int:
        return self._infos[name].file_size

    def read(self, name: str, limit: int = MAX_JSON_NBYTES) -> bytes:
        """One member whole; `limit` is a bound on what the reader is ready to hold."""
        if name not in self._infos:
            raise RewriteError(f"{self.path}: the archive has no {name}; the file is damaged or not what it claims, write it again")
        if self.nbytes(name) > limit:
            raise RewriteError(f"{self.path}: {name} holds {self.nbytes(name)} bytes and {limit} are allowed; write the file again")
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """One member in pieces, with its checksum verified at the end."""
        try:
            with self._zip.open(self._infos[name]) as member:
                while piece := member.read(_CHUNK_NBYTES):
                    yield piece
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as problem:
            raise RewriteError(f"{self.path}: {name} is damaged ({one_line(problem)}); fetch or write the file again") from problem

    def copy(self, name: str, target: IO[bytes]) -> None:
        for piece in self.chunks(name):
            target.write(piece)

    def json(self, name: str) -> Any:
        try:
            return json.loads(self.read(name).decode("utf-8"))
        except (ValueError, RecursionError) as problem:
            raise RewriteError(f"{self.path}: {name} is not readable JSON ({one_line(problem)}); write the file again") from problem


@contextmanager
def open_archive(path: Path, max_ratio: int = 1) -> Iterator[Archive]:
    """Open a zip. `max_ratio` bounds all members together against the length of the file; 1 means stored uncompressed."""
    try:
        handle = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, ValueError, NotImplementedError) as problem:
        raise RewriteError(f"{path}: a truncated or damaged zip ({one_line(problem)}); fetch or write the file again") from problem
    with handle:
        yield Archive(path, handle, max_ratio)


def one_line(problem: object) -> str:
    """The first line of a message: what users read never spans lines."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    text = lines[0] if lines else type(problem).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def read_object(file: Path, what: str) -> dict[str, Any]:
    """The JSON object in a small file beside a model; RewriteError where it is none, the absurdly nested included."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise RewriteError(f"{file} is nested too deeply; expected {what}, fetch or write it again") from None
    except (OSError, ValueError) as problem:
        raise RewriteError(f"{file} is no JSON ({one_line(problem)}); expected {what}, fetch or write it again") from None
    if not isinstance(content, dict):
        raise RewriteError(f"{file} holds no object but {type(content).__name__}; expected {what}, fetch or write it again")
    return content


def _common_root(names: list[str]) -> str:
    roots = {name.split("/", 1)[0] for name in names}
    return f"{roots.pop()}/" if len(roots) == 1 and all("/" in name for name in names) else ""


def _check_members(path: Path, infos: list[zipfile.ZipInfo], max_ratio: int) -> None:
    if len(infos) > MAX_MEMBERS:
        raise RewriteError(f"{path}: {len(infos)} members in the archive and {MAX_MEMBERS} are allowed; write the file again")
    if min((info.header_offset for info in infos), default=0) != 0:  # the directory found belongs to a zip inside this one
        raise RewriteError(f"{path}: a truncated or damaged zip (it does not begin with its first member); fetch or write the file again")
    seen: set[str] = set()
    for info in infos:
        name = info.filename
        if name.startswith("/") or ":" in name.split("/")[0] or ".." in PurePosixPath(name).parts or _BAD_NAME.search(name):
            raise RewriteError(f"{path}: the archive names {name!r}; only relative names without '..' are allowed, do not use this file")
        if name in seen:
            raise RewriteError(f"{path}: the archive holds {name!r} twice; each name is allowed once, write the file again")
        seen.add(name)
        if info.flag_bits & 1:
            raise RewriteError(f"{path}: {name!r} is encrypted; only plain archives are allowed, decrypt it first")
    length = path.stat().st_size
    total = sum(info.file_size for info in infos)
    if total > length * max_ratio:
        raise RewriteError(
            f"{path}: the members declare {total} bytes in a file of {length}; at most {max_ratio} times as many are allowed, do not use it"
        )
