"""Planted payloads: harmless, each leaves a marker file if anything runs it."""

from __future__ import annotations

import functools
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.files.corpus import program


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (self.marker,)


@functools.cache
def clean_bytes(name: str) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.export.save(program(name), buffer)
    return buffer.getvalue()


def rebuild(
    target: Path,
    name: str = "dynamic",
    model: Callable[[Any], None] | None = None,
    replace: dict[str, bytes] | None = None,
    drop: tuple[str, ...] = (),
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A clean export with its JSON edited, members replaced, added or dropped."""
    import io

    replace = dict(replace or {})
    with zipfile.ZipFile(io.BytesIO(clean_bytes(name))) as source, zipfile.ZipFile(target, "w", compression) as archive:
        for member in source.namelist():
            root, short = member.split("/", 1)
            content = replace.pop(short, source.read(member))
            if short == "models/model.json" and model is not None:
                document = json.loads(content)
                model(document)
                content = json.dumps(document).encode()
            if short not in drop:
                archive.writestr(f"{root}/{short}", content)
        for short, content in replace.items():
            archive.writestr(short if short.startswith("/") else f"{root}/{short}", content)
    return target


def config(name: str, short: str) -> Any:
    """A weights or constants table of a clean export."""
    import io

    with zipfile.ZipFile(io.BytesIO(clean_bytes(name))) as source:
        member = next(member for member in source.namelist() if member.endswith(short))
        return json.loads(source.read(member))


def model(name: str) -> Any:
    """The model.json of a clean export."""
    return config(name, "models/model.json")


def first(document: Any, key: str) -> Any:
    """The first object that holds `key`."""
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if key in value:
                return value
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
    raise KeyError(key)
