"""What can stand after `--passes`: one line each, or one in detail, told by the code itself: its fields, its docstrings, its file's."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

from rewriter import registry
from rewriter.errors import RewriteError

PARAMS = ("params", "number", "chosen", "at most this share of each site's dense numbers")


def listing() -> str:
    """All passes and structures with a summary, plug-ins among them."""
    passes, structures = registry.passes(), registry.structures()
    width = max(map(len, [*passes, *structures]))
    parts = []
    for title, kinds in (("Passes", passes), ("Structures, each a pass of its own", structures)):
        rows = [_entry(name, summary(kind) + _origin(kind), width) for name, kind in kinds.items()]
        parts.append("\n".join([f"{title}:", *rows]))
    parts.append("Options follow a colon each: monarch:blocks=4:rank=2. `rewrite passes NAME` explains one.")
    return "\n\n".join(parts)


def detail(name: str) -> str:
    """One pass or structure: options with types and defaults, then what its authors say of it."""
    passes, structures = registry.passes(), registry.structures()
    kind = passes.get(name.partition(":")[0]) or structures.get(name.partition(":")[0])
    if kind is None:
        raise RewriteError(f"unknown pass '{name}'; there are: {', '.join([*passes, *structures])}")
    own = "pass" if kind.name in passes else "structure, a pass of its own"
    parts = [f"{kind.name} ({own}){_origin(kind)}", _paragraphs(_module_doc(kind))]
    rows = options(kind, kind.name in structures)
    titles = ("option", "type", "default")
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(3)]
    if rows:
        table = [_row((*titles, "meaning"), widths), *(_row(row, widths) for row in rows)]
        parts.append("Options:\n" + "\n".join(table))
    else:
        parts.append("It has no options.")
    parts += [f"{title}:\n{_paragraphs(text)}" for title, text in _sayings(kind)]
    return "\n\n".join(parts)


def summary(kind: Any) -> str:
    """A pass's own summary, or the idea that a structure's file opens with."""
    text = getattr(kind, "summary", None) or _module_doc(kind).partition("\n")[0]
    return str(text).rstrip(".")


def options(kind: Any, structure: bool) -> list[tuple[str, str, str, str]]:
    """(option, type, default, meaning) for each; every structure takes `params` too."""
    meanings = _meanings(inspect.cleandoc(kind.__doc__ or ""))
    rows = []
    for field in dataclasses.fields(kind):
        types = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text"}
        said = types.get(str(field.type).replace(" ", "").removesuffix("|None"), str(field.type))
        default = str(field.default) if field.default is not None else "chosen" if structure else "none"
        rows.append((field.name.replace("_", "-"), said, default, meanings.get(field.name, "")))
    return [*rows, PARAMS] if structure and all(row[0] != "params" for row in rows) else rows


def _meanings(doc: str) -> dict[str, str]:
    """`rank: what it is; blocks: ...` -> by name."""
    found = [part.partition(":") for part in " ".join(doc.split()).replace(". ", "; ").split(";")]
    return {name.strip(): text.strip().rstrip(".") for name, colon, text in found if colon and name.strip().isidentifier()}


def _sayings(kind: Any) -> Iterable[tuple[str, str]]:
    """The docstrings that say what it does; those of the base class say what all do, and are left out."""
    doc = inspect.cleandoc(vars(kind).get("__doc__") or "")
    if doc and not doc.startswith(f"{kind.__name__}(") and not _meanings(doc):
        yield "It", doc
    for method, title in (("fit", "Fit"), ("discover", "Exact discovery"), ("run", "Run"), ("requires", "Refuses"), ("ensures", "Ensures")):
        said = inspect.cleandoc(getattr(vars(kind).get(method), "__doc__", None) or "")
        if said:
            yield title, said


def _module_doc(kind: Any) -> str:
    return inspect.cleandoc(sys.modules[kind.__module__].__doc__ or kind.__doc__ or "")


def _origin(kind: Any) -> str:
    return "" if kind.__module__.startswith("rewriter.") else f"  [from {kind.__module__}]"


def _entry(name: str, text: str, width: int) -> str:
    return textwrap.fill(text, _width(), initial_indent=f"  {name:{width}}  ", subsequent_indent=" " * (width + 4))


def _row(row: tuple[str, str, str, str], widths: list[int]) -> str:
    lead = "  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row[:3], widths, strict=True)) + "  "
    return textwrap.fill(row[3] or "-", _width(), initial_indent=lead, subsequent_indent=" " * len(lead))


def _paragraphs(text: str) -> str:
    """Wrapped; lines that a docstring breaks by width are joined, indented ones stay."""
    blocks = text.split("\n\n")
    wrapped = [
        block if any(line.startswith(" ") for line in block.splitlines()) else textwrap.fill(block, _width() - 2) for block in blocks
    ]
    return textwrap.indent("\n\n".join(wrapped), "  ")


def _width() -> int:
    return max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))
