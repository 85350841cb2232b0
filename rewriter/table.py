"""Text laid out in columns: as wide as its content, shortened in the middle where the line would be too long, folded where it may."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

GAP = 2


def middle(text: str, width: int) -> str:
    """At most `width` characters; names differ at their ends, so the middle goes."""
    if len(text) <= width:
        return text
    head = (width - 3) // 2
    return f"{text[:head]}...{text[len(text) - (width - 3 - head) :]}"


def fold(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    """Lines of at most `width` with their indents; long words stay whole, so that they can be copied."""
    wrapper = textwrap.TextWrapper(width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text) or [first]


def columns(
    titles: Sequence[str], cells: Sequence[Sequence[str]], width: int, shrink: Sequence[tuple[int, int]] = ()
) -> tuple[list[str], list[list[str]]]:
    """(header lines, the lines of each row). Where it is too wide, each (column, least width) gives way in turn: names are shortened,
    spellings fold."""
    widths = [max(len(row[i]) for row in [titles, *cells]) for i in range(len(titles))]
    for i, least in shrink:
        over = sum(widths) + GAP * (len(widths) - 1) - width
        widths[i] = max(min(widths[i], least), widths[i] - max(over, 0))
    able = {i for i, _ in shrink}
    right = [i not in able and all(row[i][:1] in "-0123456789+" for row in cells) for i in range(len(titles))]
    fitted = [[middle(cell, w) if ":" not in cell else cell for cell, w in zip(row, widths, strict=True)] for row in cells]
    return _row(titles, widths, right), [_row(row, widths, right) for row in fitted]


def _row(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    parts = [_broken(cell, width) for cell, width in zip(row, widths, strict=True)]
    lines = []
    for line in range(max(map(len, parts))):
        texts = [part[line] if line < len(part) else "" for part in parts]
        padded = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True)]
        lines.append((" " * GAP).join(padded).rstrip())
    return lines


def _broken(text: str, width: int) -> list[str]:
    """A spelling such as monarch:blocks=4:rank=2 breaks before its colons; a part is never cut."""
    lines = [""]
    for part in text.replace(":", "\0:").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return lines


def clean(text: str) -> str:
    """One printable line: names come from model files, and a terminal obeys control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def count(value: float) -> str:
    """Three digits and a magnitude: 590k, 1.18M."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:#.3g}".rstrip(".") + unit
    return f"{value:.0f}"


def nbytes(value: float) -> str:
    """Decimal units, as file managers have them."""
    text = count(value)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} B"


def number(value: float) -> str:
    """Three digits of an error; what has none says so."""
    return f"{value:.3g}" if math.isfinite(value) else "unknown"


def change(before: int, after: int, unit: str) -> str:
    said = nbytes if unit == "nbytes" else count
    return f"{said(before)} -> {said(after)}" + (f" ({after / before:.0%})" if before else "")
