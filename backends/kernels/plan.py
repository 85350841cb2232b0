"""The vocabulary as a plan for the kernel: block-diagonal products whose inputs and outputs are addresses in one row.

Shuffles, splits, pads and permutations compute nothing: they only rename addresses. A product then reads
x[first + b*block + i//run*jump + i%run*step], where its input is that regular, and writes straight to where its output belongs. The columns
of a block stand in the order in which the next product reads them, so that it reads runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from rewriter import packing
from rewriter.algebra import Dense
from rewriter.operator import AbstractMatrix

ZERO = -1  # the address of padding
AREAS = X, Y, SCRATCH = 0, 1, 2
ACTIVATIONS = ("", "relu", "gelu", "gelu-tanh", "silu")  # as the kernel numbers them
MOST_ROWS = 65536  # of a block of 8 bits, whose sums are to fit in 32
LARGEST_GROUP = 16  # of a pattern: what a vector holds
PAIR = 8  # rows of 4 bits that lie in the same bytes
ALIGN = 16  # floats that scratch offsets are multiples of


class NotCovered(Exception):
    """The kernel has no step for this; what follows runs as it did."""


@dataclass(frozen=True)
class Norm:
    """y = (y - mean) / sqrt(variance + epsilon) * gamma + beta, over the features."""

    gamma: Tensor  # (m,)
    beta: Tensor  # (m,)
    epsilon: float


@dataclass(frozen=True)
class Ending:
    """What is done to the product: activation(y + bias) + skip, normalised; skip comes with the call."""

    bias: Tensor | None = None  # (m,)
    activation: str = ""  # of ACTIVATIONS
    skip: bool = False
    norm: Norm | None = None

    @property
    def whole_rows(self) -> bool:
        """Whether it needs more than a column and its bias."""
        return self.skip or self.norm is not None


NOTHING = Ending()


@dataclass(frozen=True)
class Pattern:
    """Which inputs the stored numbers of a sparse weight are for: `kept` of every `group`."""

    rows: Tensor  # (entries, p)
    kept: int
    group: int


@dataclass(frozen=True)
class Product:
    """to[at + b*p + j] = sum_i from[first + b*block + i//run*jump + i%run*step] w[b, i, j]; rows beyond the `valid` of the k*q are zero.

    With a pattern there is one block, whose inputs lie side by side, and of its weight the pattern's rows are stored.
    """

    weight: Tensor  # (k, q, p); (1, entries, p) with a pattern
    scale: Tensor | None  # (k, groups, p) of a weight of integers, which are multiplied as such; one group but in 4 bits
    bits: int  # of integers
    pattern: Pattern | None
    source: int  # area
    first: int
    block: int
    run: int
    jump: int
    step: int
    valid: int
    target: int  # area
    at: int
    width: int  # columns of the k*p that are wanted
    ending: Ending = NOTHING  # of the wanted columns: bias and activation


@dataclass(frozen=True)
class Copy:
    """to[pairs[i, 1]] = from[pairs[i, 0]], zero where that is ZERO."""

    source: int
    target: int
    pairs: Tensor  # (count, 2) int32


@dataclass(frozen=True)
class Finish:
    """An ending as a step of its own."""

    ending: Ending


Step = Product | Copy | Finish


@dataclass(frozen=True)
class Plan:
    """One row of inputs to one row of outputs."""

    inputs: int
    outputs: int
    scratch: int
    steps: tuple[Step, ...]


@dataclass(eq=False)
class _Made:
    """A product whose output has addresses of its own; where they lie is settled when all are known."""

    weight: Tensor  # as of a Product
    scale: Tensor | None  # (k, groups, p)
    bits: int
    pattern: Pattern | None
    source: Tensor  # (k*q,) addresses
    start: int
    area: int = SCRATCH
    at: int = 0
    width: int = 0

    @property
    def columns(self) -> int:
        return self.weight.shape[0] * self.weight.shape[2]


class Weight(NamedTuple):
    """What is not floats alone: int8 with scales, or some rows of each column."""

    values: Tensor  # (..., q, p)
    scale: Tensor | None = None  # (..., groups, p)
    bits: int = 8
    pattern: Pattern | None = None


@dataclass
class PlanOps:
    """Values are tensors of addresses: x's are 0 to n-1, each product's follow."""

    inputs: int
    made: list[_Made] = field(default_factory=list)

    def const(self, tensor: Tensor) -> Tensor:
        return tensor

    def matmul(self, x: Tensor, w: Tensor | Weight) -> Tensor:
        w = w if isinstance(w, Weight) else Weight(w)
        return self.block_matmul(x, w._replace(values=w.values[None], scale=w.scale if w.scale is None else w.scale[None]))

    def block_matmul(self, x: Tensor, w: Tensor | Weight) -> Tensor:
        start = self.inputs + sum(m.columns for m in self.made)
        self.made.append(_Made(*(w if isinstance(w, Weight) else Weight(w)), x, start))
        return torch.arange(start, start + self.made[-1].columns)

    def nibbles(self, packed: Tensor) -> Weight:
        return Weight(packing.nibbles(packed), bits=4)

    def scaled(self, values: Tensor | Weight, scales: Tensor) -> Weight:
        whole = values if isinstance(values, Weight) else Weight(values)
        rows, groups = whole.values.shape[-2], scales.shape[-2]
        if whole.values.dtype != torch.int8:
            raise NotCovered(f"its integers are {whole.values.dtype}, not int8")
        if rows > MOST_ROWS:
            raise NotCovered(f"sums over {rows:,} products of 8 bits may not fit in 32")
        if whole.bits == 8 and groups > 1:
            raise NotCovered("scales for some of a column's rows are known with 4 bits alone")
        if whole.bits == 4 and (rows % groups or rows // groups % PAIR):
            raise NotCovered(f"{rows} rows in {groups} groups are not {PAIR} or a multiple in each, as 4 bits have them")
        return whole._replace(scale=scales)

    def scatter(self, values: Tensor | Weight, positions: Tensor, n: int, m: int) -> Weight:
        held, scale, bits, _ = values if isinstance(values, Weight) else Weight(values)
        if bits == 4:
            raise NotCovered("weights with zeros left out have no kernel in 4 bits")
        if m > LARGEST_GROUP:
            raise NotCovered(f"kernels pick from groups of up to {LARGEST_GROUP}, not {m}")
        entries, columns = held.shape
        within = packing.unpack(positions, entries, m).view(-1, n, positions.shape[1])  # of its group
        if not ((within < m).all() and (within.diff(dim=1) > 0).all()):
            raise NotCovered(f"its positions are not {n} different ones of every {m} in order")
        rows = (within + m * torch.arange(len(within))[:, None, None]).flatten(0, 1)
        return Weight(held, scale, bits, Pattern(rows.repeat_interleave(columns // positions.shape[1], 1), n, m))

    def shuffle(self, x: Tensor, k: int) -> Tensor:
        return x.view(k, -1).T.reshape(-1)

    def gather(self, x: Tensor, index: Tensor) -> Tensor:
        return x[index]

    def concat(self, xs: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(xs))

    def split(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        return torch.split(x, list(sizes))

    def pad(self, x: Tensor, width: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - len(x)), value=ZERO)

    def by_rows(self, x: Tensor, most: int, few: Callable[[Tensor], Tensor], many: Callable[[Tensor], Tensor]) -> NoReturn:
        raise NotCovered("two forms by the number of tokens have no kernel as one")

    def add(self, a: Tensor, b: Tensor) -> NoReturn:
        raise NotCovered("sums have no kernel")

    def mul(self, x: Tensor, w: Tensor) -> NoReturn:
        raise NotCovered("scales beside a product have no kernel")


def plan(operator: AbstractMatrix, ending: Ending = NOTHING) -> Plan:
    """The steps of an operator and its ending; NotCovered where it is spelled with more than products and permutations."""
    m, n = operator.shape
    ops = PlanOps(n)
    y = operator.product(ops, torch.arange(n))
    if not ops.made:
        raise NotCovered("there is no product in it")
    _order_columns(ops, y)
    scratch = _place(ops.made, y)
    steps: list[Step] = []
    for made in ops.made:
        before, product, scratch = _product(made, ops, scratch)
        steps += [*before, product]
    steps += _rest(ops, y)
    return Plan(n, m, scratch, tuple(_finished(steps, ending)))


def for_session(operator: AbstractMatrix, ending: Ending = NOTHING) -> Plan:
    """The plan of what a session takes: NotCovered also for a dense weight in floats, which ONNX Runtime multiplies as fast."""
    if isinstance(operator, Dense):
        raise NotCovered("a dense weight is left to ONNX Runtime")
    return plan(operator, ending)


def _order_columns(ops: PlanOps, y: Tensor) -> None:
    """Of a product that one other reads, and y does not: each block's columns as that reads them first."""
    for made in ops.made:
        own = torch.arange(made.start, made.start + made.columns)
        readers = [m for m in ops.made if torch.isin(own, m.source).any()]
        if len(readers) != 1 or torch.isin(own, y).any():
            continue
        (reader,) = readers
        k, _, p = made.weight.shape
        first = torch.full((made.columns,), reader.source.numel())
        inside = (reader.source >= made.start) & (reader.source < made.start + made.columns)
        first.scatter_reduce_(0, reader.source[inside] - made.start, inside.nonzero().flatten(), "amin")
        order = first.view(k, p).argsort(dim=1, stable=True)  # of each block, the old column at each new place
        if order.equal(torch.arange(p).expand(k, p)):
            continue
        made.weight = made.weight.gather(2, order[:, None].expand_as(made.weight))
        made.scale = None if made.scale is None else made.scale.gather(2, order[:, None].expand_as(made.scale))
        made.pattern = None if made.pattern is None else replace(made.pattern, rows=made.pattern.rows[:, order[0]])
        places = torch.arange(k)[:, None] * p + order.argsort(1)
        reader.source = reader.source.clone()
        reader.source[inside] = made.start + places.flatten()[reader.source[inside] - made.start]


def _place(made: list[_Made], y: Tensor) -> int:
    """Each output to y where y has it in one piece, else to the scratch; gives the scratch's width."""
    scratch = 0
    for product in made:
        where = (y == product.start).nonzero().flatten()
        later = [m.source for m in made]
        if len(where):
            at = int(where[0])
            run = y[at : at + product.columns] == torch.arange(product.start, product.start + product.columns)[: len(y) - at]
            width = int(run.long().cumprod(0).sum())
            beyond = range(product.start + width, product.start + product.columns)
            if not any(((used >= beyond.start) & (used < beyond.stop)).any() for used in [*later, y]):
                product.area, product.at, product.width = Y, at, width
                continue
        product.area, product.at, product.width = SCRATCH, scratch, product.columns
        scratch += -(-product.columns // ALIGN) * ALIGN
    return scratch


def _located(ops: PlanOps, addresses: Tensor) -> tuple[Tensor, Tensor]:
    """Area and offset of each address; padding has area -1."""
    areas, offsets = torch.full_like(addresses, -1), torch.full_like(addresses, ZERO)
    inside = (addresses >= 0) & (addresses < ops.inputs)
    areas[inside], offsets[inside] = X, addresses[inside]
    for made in ops.made:
        inside = (addresses >= made.start) & (addresses < made.start + made.columns)
        areas[inside], offsets[inside] = made.area, addresses[inside] - made.start + made.at
    return areas, offsets


def _product(made: _Made, ops: PlanOps, scratch: int) -> tuple[list[Copy], Product, int]:
    """The product on its input as it lies, where that is regular; else on a copy."""
    k = made.weight.shape[0]
    q = len(made.source) // k
    areas, offsets = _located(ops, made.source)
    whole = Product(made.weight, made.scale, made.bits, made.pattern, X, 0, 0, q, 0, 1, k * q, made.area, made.at, made.width)
    valid = int((areas >= 0).sum())
    source = int(areas[0])
    if source in AREAS and (areas[:valid] == source).all():
        regular = _regular(offsets[:valid].tolist(), q)
        if regular is not None and (made.pattern is None or (regular[1:] == (q, 0, 1) and valid == q)):
            block, run, jump, step = regular
            places = replace(whole, source=source, first=int(offsets[0]), block=block, run=run, jump=jump, step=step, valid=valid)
            return [], places, scratch
    to = torch.arange(scratch, scratch + k * q)
    copies = _copies(areas, offsets, to, SCRATCH)
    copied = replace(whole, source=SCRATCH, first=scratch, block=q)
    return copies, copied, scratch + -(-k * q // ALIGN) * ALIGN


def _regular(offsets: Sequence[int], q: int) -> tuple[int, int, int, int] | None:
    """Block, run, jump and step by which blocks of q read these places, if they do so regularly."""
    first, one = offsets[0], offsets[:q]
    step = one[1] - first if len(one) > 1 else 1
    run = next((i for i in range(1, len(one)) if one[i] - one[i - 1] != step), q)
    jump = one[run] - first if run < len(one) else 0
    block = offsets[q] - first if len(offsets) > q else 0
    if min(step, jump, block) < 0:
        return None
    rule = (first + i // q * block + i % q // run * jump + i % q % run * step for i in range(len(offsets)))
    return (block, run, jump, step) if all(a == b for a, b in zip(rule, offsets, strict=True)) else None


def _copies(areas: Tensor, offsets: Tensor, to: Tensor, target: int) -> list[Copy]:
    """One for each area that is read, zeros with the first."""
    found = []
    for area in AREAS:
        here = areas == area
        if area == X:
            here = here | (areas < 0)
        if here.any():
            found.append(Copy(area, target, torch.stack([offsets[here], to[here]], 1).to(torch.int32)))
    return found


def _rest(ops: PlanOps, y: Tensor) -> list[Copy]:
    """What no product writes to y itself."""
    areas, offsets = _located(ops, y)
    to = torch.arange(len(y))
    missing = ~((areas == Y) & (offsets == to))
    return _copies(areas[missing], offsets[missing], to[missing], Y)


def _finished(steps: list[Step], ending: Ending) -> list[Step]:
    """With the products that write to y where nothing else does and nobody reads it, else in a step of its own."""
    if ending.bias is None and not ending.activation and not ending.whole_rows:
        return steps
    touched = any((isinstance(s, Copy) and s.target == Y) or (isinstance(s, Product | Copy) and s.source == Y) for s in steps)
    if touched or ending.whole_rows:
        return [*steps, Finish(ending)]

    def last(step: Step) -> Step:
        if not isinstance(step, Product) or step.target != Y:
            return step
        bias = None if ending.bias is None else ending.bias[step.at : step.at + step.width]
        return replace(step, ending=replace(ending, bias=bias))

    return [last(step) for step in steps]
