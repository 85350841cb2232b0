"""What sizes are called: torch numbers what varies (s27, s15 + s70); whoever asked for the export said batch and past+seq."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from rewriter.inputs import InputSpec

_NUMBERED = re.compile(r"\b[su]\d+\b")
_WORD = re.compile(r"(?![su]\d+$)[A-Za-z_]\w*")
_SPELLED = re.compile(r"\w+(\+\w+)*")


def words(own: Sequence[Sequence[int | str]], asked: Sequence[InputSpec]) -> dict[str, str]:
    """torch's spelling of an input's sizes to the one that was asked for: the first, where one size has two."""
    pairs = [pair for shape, spec in zip(own, asked, strict=True) for pair in zip(shape, spec.dims, strict=True)]
    found: dict[str, str] = {}
    for ours, theirs in pairs:
        lone = _NUMBERED.fullmatch(str(ours))  # which stands in expressions, where a sum could not
        if isinstance(ours, str) and isinstance(theirs, str) and (_WORD.fullmatch(theirs) or not lone):
            found.setdefault(ours, theirs)
    return found


def said(size: str, known: Mapping[str, str]) -> str:
    """A size, or an expression of several, in the words that were asked for."""
    return known.get(size) or _NUMBERED.sub(lambda symbol: known.get(symbol[0], symbol[0]), size)


def spelled(size: int | str, value: str, axis: int) -> int | str:
    """As --input has it; what it cannot spell gets a name of its own."""
    close = size.replace(" ", "") if isinstance(size, str) else size
    return close if isinstance(close, int) or _SPELLED.fullmatch(close) else f"{value}_{axis}"


def rename(model: ir.Model, known: Mapping[str, str]) -> None:
    """The same in every shape of an exported model."""
    for graph in model.graphs():
        for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]:
            if value.shape is not None:
                dims = [said(d.value or "", known) or None if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
                value.shape = ir.Shape(dims)
