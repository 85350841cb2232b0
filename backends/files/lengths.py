"""A program that was traced through a body of chunks holds at some lengths only. Its guards say at which, and exporters drop them.

`(seq + (64 - seq % 64) % 64) // 64 == 1` is a count of chunks that the example fixed: at another count the graph still runs, wrongly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch.export import ExportedProgram

from rewriter.backends.files.expressions import refuse_guard
from rewriter.inputs import InputSpec, dim_names

LENGTHS = (63, 64, 65, 200)
SMALL = 3  # of the dimensions that are not asked about
_COUNTED = re.compile(r"//.*==|==.*//")  # other guards are sizes that belong together, and limits that fail aloud
_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_NAMES = {"__builtins__": {}, "math": math, "max": max, "min": min, "abs": abs, "Max": max, "Min": min, "Mod": lambda a, b: a % b,
          "PythonMod": lambda a, b: a % b, "FloorDiv": lambda a, b: a // b, "CeilDiv": lambda a, b: -(-a // b)}  # fmt: skip


def narrow(program: ExportedProgram, specs: Sequence[InputSpec], way_on: str) -> list[str]:
    """One line for each dimension at whose other sizes the program's own guards fail."""
    guards = [text for text in dict.fromkeys(program._guards_code) if _COUNTED.search(text) and refuse_guard(text) is None]
    found = []
    for dim in dim_names(specs) if guards else ():
        about = [text for text in guards if dim in re.split(r"\W+", _spelled(text, specs))]
        failed = {length: text for length in LENGTHS if (text := _first_that_fails(about, specs, dim, length))}
        if failed:
            at = ", ".join(map(str, failed))
            guard = _spelled(min(failed.values(), key=len), specs)
            found.append(
                f"the program holds only at sizes like its example's: at {dim} = {at} its guard {guard} fails, "
                f"which exporters drop, and the result may be wrong; {way_on}"
            )
    return found


def _first_that_fails(guards: Sequence[str], specs: Sequence[InputSpec], dim: str, length: int) -> str:
    sizes = dict.fromkeys(dim_names(specs), SMALL) | {dim: length}
    given = {spec.name: torch.empty(spec.shape(sizes), device="meta") for spec in specs}
    failed = []
    for text in guards:
        try:
            if not eval(text, {**_NAMES, "L": given}):  # of the grammar that refuse_guard has: sizes, numbers, comparisons
                failed.append(text)
        except (KeyError, IndexError, ArithmeticError, TypeError, ValueError):
            continue  # of an input that has another name here
    return min(failed, key=len, default="")


def _spelled(guard: str, specs: Sequence[InputSpec]) -> str:
    """In the dimensions' names."""
    dims = {spec.name: spec.dims for spec in specs}
    return _SIZE.sub(lambda m: str(dims[m[1]][int(m[2])]) if m[1] in dims else m[0], guard)
