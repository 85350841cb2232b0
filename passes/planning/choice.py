"""Which form to take, by its measured seconds at the asked token counts; two of them where each wins at some.

One form alone is the one with the least summed time. A second one is stored beside it only where the two behind one dispatch, measured as
they would run, are at no count more than NOISE slower than the best alone, and faster by GAIN at one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rewriter.algebra import ByTokens
from rewriter.operator import AbstractMatrix

GAIN, NOISE = 1.1, 1.03
Timer = Callable[[Sequence[AbstractMatrix]], list[list[float]]]  # forms -> a row for each token count, a figure for each form
Table = list[list[float]]  # seconds: a row for each token count, a figure for each form


@dataclass(frozen=True)
class Choice:
    """What is taken, and its seconds by token count."""

    form: AbstractMatrix
    index: int | None  # among the forms; None where it is two of them
    seconds: tuple[float, ...]


def fastest(table: Table, rows: Sequence[int] | None = None) -> int:
    """The form with the least summed time, the first of equals; over some of the token counts."""
    totals = [sum(column) for column in zip(*(table[row] for row in (rows or range(len(table)))), strict=True)]
    return totals.index(min(totals))


def chosen(tokens: Sequence[int], seconds: Timer, forms: Sequence[AbstractMatrix], table: Table, two: bool) -> Choice:
    """The best form by a table that `seconds` gave; `two`: or two behind one dispatch, which it measures too."""
    index = fastest(table)
    best = Choice(forms[index], index, tuple(row[index] for row in table))
    candidate = dispatch(tokens, forms, table) if two else None
    if candidate is None:
        return best
    measured = seconds([forms[index], candidate])
    return Choice(candidate, None, tuple(both for _, both in measured)) if pays(measured) else best


def pays(table: Table) -> bool:
    """Whether the second form is faster than the first by GAIN at one token count, and at none slower than by NOISE."""
    gains = [before / after for before, after in table]
    return max(gains) >= GAIN and min(gains) >= 1 / NOISE


def dispatch(tokens: Sequence[int], forms: Sequence[AbstractMatrix], table: Table) -> ByTokens | None:
    """The two forms that gain most by the table, and up to how many tokens the first one runs: halfway, as factors go. None where one form
    is within GAIN of the best at every count."""
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    alone = fastest(table)
    best, most = None, math.log(GAIN)
    for cut, (last, first) in enumerate(pairwise(order), 1):
        few, many = fastest(table, order[:cut]), fastest(table, order[cut:])
        gains = [math.log(table[row][alone] / table[row][few if i < cut else many]) for i, row in enumerate(order)]
        if few != many and max(gains) >= math.log(GAIN) and sum(gains) >= most and tokens[last] != tokens[first]:
            best, most = ByTokens(forms[few], forms[many], math.isqrt(tokens[last] * tokens[first])), sum(gains)
    return best


def ratios(tokens: Sequence[int], before: Sequence[float], after: Sequence[float]) -> str:
    """`1.4x as fast at T=1, 1.1x at T=256`."""
    figures = [f"{a / b:.1f}x" for a, b in zip(before, after, strict=True)]
    return ", ".join(f"{figure}{' as fast' if not i else ''} at T={t}" for i, (figure, t) in enumerate(zip(figures, tokens, strict=True)))


def said(form: AbstractMatrix) -> str:
    """Of two forms what is stored for it."""
    if not isinstance(form, ByTokens):
        return ""
    few, many = form.few.cost().nbytes, form.many.cost().nbytes
    return f"two forms, one up to {form.most} tokens and one beyond, which store {few:,} and {many:,} bytes"
