"""A plan and its weights as one tensor of bytes that the kernel reads: header, steps, panels of weights (src/chain.hpp, src/sparse.hpp).

Of int8 weights each column of each block has a scale of its own, max |w| / 127.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.backends.kernels.plan import ACTIVATIONS, LARGEST_GROUP, ZERO, Copy, Ending, Finish, Pattern, Plan, Product, Y
from rewriter.packing import pack_nibbles
from rewriter.quantised import rounded

MAGIC = 0x314E494148434B52
FORMATS = ("float32", "bfloat16", "weight8", "int8")  # that floats can be stored in
STORED = (*FORMATS, "int4")  # as the kernel numbers them
_ROWS = {"float32": 1, "bfloat16": 2, "weight8": 1, "int8": 4, "int4": 4}  # of weights that lie side by side
_HEADER, _STEP = 8, 27  # numbers of 8 bytes
_FIELDS = (
    *("kind", "source", "target", "at", "width", "first", "block", "run", "jump", "step", "valid"),
    *("k", "q", "p", "format", "weights", "scales", "bias", "activation", "runs", "skip", "norm", "epsilon"),
    *("entries", "window", "each", "places"),
)
_ALIGN = 64


@dataclass(frozen=True)
class Layout:
    """How the kernel of this CPU wants its panels."""

    lanes: int
    panel: int  # columns


class _Bytes:
    """Sections at aligned offsets behind a head of known size."""

    def __init__(self, head: int) -> None:
        self.parts: list[Tensor] = []
        self.size = -(-head // _ALIGN) * _ALIGN

    def add(self, *tensors: Tensor) -> int:
        """The offset of the first; the others follow without gaps."""
        offset = self.size
        for tensor in tensors:
            self.parts.append(tensor.contiguous().flatten().view(torch.uint8))
            self.size += self.parts[-1].numel()
        gap = -self.size % _ALIGN
        self.parts.append(torch.zeros(gap, dtype=torch.uint8))
        self.size += gap
        return offset


def pack(plan: Plan, layout: Layout, weights: str = "float32") -> Tensor:
    """uint8, one axis; `weights` is how floats are stored and multiplied, one of FORMATS. What is integers already stays so."""
    head = (_HEADER + _STEP * len(plan.steps)) * 8
    data = _Bytes(head)
    steps = [_step(step, plan, data, layout, weights) for step in plan.steps]
    rows = [[fields.get(name, 0) for name in _FIELDS] for fields in steps]
    header = [MAGIC, data.size, layout.lanes, layout.panel, plan.inputs, plan.outputs, plan.scratch, len(steps)]
    numbers = torch.tensor([*header, *(n for row in rows for n in row)], dtype=torch.int64).view(torch.uint8)
    return torch.cat([numbers, torch.zeros(-head % _ALIGN, dtype=torch.uint8), *data.parts])


def _step(step: Product | Copy | Finish, plan: Plan, data: _Bytes, layout: Layout, weights: str) -> dict[str, int]:
    if isinstance(step, Copy):
        runs = runs_of(step.pairs)
        return {"kind": 2, "source": step.source, "target": step.target, "width": len(runs), "runs": data.add(runs)}
    if isinstance(step, Finish):
        return {"kind": 3, "target": Y, "width": plan.outputs, **_ending(step.ending, data)}
    k, stored, p = step.weight.shape
    weights = stored_as(step, weights)
    packed, scales = packed_weight(step.weight, step.scale, layout, weights)
    places = {name: getattr(step, name) for name in ("source", "target", "at", "width", "first", "block", "run", "jump", "step", "valid")}
    sizes = {"k": k, "q": stored if step.pattern is None else step.valid, "p": p, "format": STORED.index(weights)}
    return {
        "kind": 1,
        **places,
        **sizes,
        "weights": data.add(packed),
        "scales": data.add(*scales) if scales else 0,
        **({"each": stored // step.scale.shape[1]} if weights == "int4" and step.scale is not None else {}),
        **({} if step.pattern is None else _pattern(step.pattern, data, layout)),
        **_ending(step.ending, data),
    }


def stored_as(step: Product, weights: str) -> str:
    """The format of a step's weight where floats are asked for in `weights`; sparse ones are multiplied as floats."""
    if step.pattern is not None:
        return "float32" if step.scale is None and weights in ("float32", "bfloat16") else "weight8"
    return weights if step.scale is None else f"int{step.bits}"


def _pattern(pattern: Pattern, data: _Bytes, layout: Layout) -> dict[str, int]:
    """One list for each panel whose columns share their rows; else of each number its place in a window of whole groups, in 4 bits."""
    entries, p = pattern.rows.shape
    panels = pattern.rows.split(layout.panel, 1)
    if all((panel == panel[:, :1]).all() for panel in panels):
        return {"entries": entries, "places": data.add(torch.cat([panel[:, 0] for panel in panels]).to(torch.int32))}
    groups = LARGEST_GROUP // pattern.group
    window, each = groups * pattern.group, groups * pattern.kept
    padded = torch.nn.functional.pad(pattern.rows % window, (0, -p % layout.lanes, 0, -entries % 8)).unflatten(0, (-1, 8))
    words = (padded << torch.arange(0, 32, 4)[:, None]).sum(1).to(torch.int32)  # the last of eight may hold the sign
    return {"entries": entries, "window": window, "each": each, "places": data.add(_panels(words[None], layout, 1))}


def _ending(ending: Ending, data: _Bytes) -> dict[str, int]:
    bias = 0 if ending.bias is None else data.add(ending.bias.float())
    found = {"bias": bias, "activation": ACTIVATIONS.index(ending.activation), "skip": int(ending.skip)}
    if ending.norm is None:
        return found
    epsilon = int(torch.tensor(ending.norm.epsilon, dtype=torch.float64).view(torch.int64))  # the bits of a double
    return {**found, "norm": data.add(ending.norm.gamma.float(), ending.norm.beta.float()), "epsilon": epsilon}


def runs_of(pairs: Tensor) -> Tensor:
    """(from, to) one by one -> (runs, 3) of (from, to, length); zeros, whose `from` is ZERO, run as well."""
    source, target = pairs.long().unbind(1)
    goes_on = (target[1:] == target[:-1] + 1) & ((source[1:] == source[:-1] + 1) | ((source[1:] == ZERO) & (source[:-1] == ZERO)))
    goes_on &= (source[1:] == ZERO) == (source[:-1] == ZERO)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (~goes_on).nonzero().flatten() + 1])
    lengths = torch.diff(starts, append=torch.tensor([len(pairs)]))
    return torch.stack([source[starts], target[starts], lengths], 1).to(torch.int32)


def packed_weight(weight: Tensor, scale: Tensor | None, layout: Layout, weights: str) -> tuple[Tensor, list[Tensor]]:
    """The panels of (k, q, p), and per block and column what the kernel multiplies sums with and takes off them.

    In 4 bits rows of two units lie in the same bytes, and the scales of groups in panels as well.
    """
    _, q, p = weight.shape
    rows, columns = -(-q // _ROWS[weights]) * _ROWS[weights], -(-p // layout.lanes) * layout.lanes
    wide = torch.nn.functional.pad(weight.detach(), (0, columns - p, 0, rows - q))
    if scale is None:
        wide = wide.float()
    if weights == "float32":
        return _panels(wide, layout, 1), []
    if weights == "bfloat16":
        return _panels(wide.bfloat16(), layout, 2), []
    integers, scale = rounded(wide) if scale is None else (wide, torch.nn.functional.pad(scale.float(), (0, columns - p)))
    if weights == "int4":
        sums = integers.unflatten(1, (scale.shape[1], -1)).sum(2)  # (k, groups, columns)
        pairs = pack_nibbles(integers.unflatten(1, (-1, 2, 4)).transpose(2, 3).flatten(1, 3))  # row i of a unit over row i of the next
        return _panels(pairs, layout, 4), [_panels(scale, layout, 1), (scale.double() * sums).sum(1).float()]
    if weights == "weight8":
        return _panels(integers, layout, 1), [scale]
    return _panels(integers, layout, 4), [scale, integers.sum(1, dtype=torch.int32)]


def _panels(weight: Tensor, layout: Layout, unit: int) -> Tensor:
    """(k, q, columns) in the kernel's order: block, panel, unit of rows, column, row of the unit."""
    k, q, _ = weight.shape
    panels = weight.view(k, q // unit, unit, -1).transpose(2, 3).split(layout.panel, 2)  # of (k, units, columns, unit)
    return torch.cat([panel.flatten(1) for panel in panels], 1)
