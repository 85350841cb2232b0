"""The vocabulary of sequences as ONNX nodes: the body of a model-local function for a map of several values.

Ranks are known here, so an axis is a number or None (batch, time, a count of chunks); Reshape copies what stands before the axes that it
changes (0) or infers one (-1). A recurrence is a Scan over axis 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor

from rewriter.backends.onnx import nibbles
from rewriter.backends.onnx.attention import DOMAIN as CONTRIB_DOMAIN
from rewriter.backends.onnx.contrib import NAME as CONTRIB_NAME
from rewriter.backends.onnx.contrib import lower, own_lowerings, steady
from rewriter.backends.onnx.either import Way, chosen, either, name_inside
from rewriter.backends.onnx.opaque import DOMAIN, field_paths, kind, overload
from rewriter.backends.onnx.scatter import scattered
from rewriter.backends.onnx.tensors import from_torch
from rewriter.operator import AbstractMap, Dims, skeleton
from rewriter.ops import Choice, Step

Axes = tuple[int | None, ...]


class Sized(NamedTuple):
    """A value and its axes, None where a size varies."""

    value: ir.Value
    axes: Axes


class SequenceOps:
    """Emits onto a tape, for values of any float type: literals take theirs by CastLike. `factors`: the operator's tensors by id."""

    def __init__(self, factors: Mapping[int, ir.Value]) -> None:
        self.factors = factors
        self.tape = Tape()
        self._scans = 0

    def _op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.tape.op(kind, list(inputs), attributes)

    def _ints(self, *numbers: int) -> ir.Value:
        return self._op("Constant", value_ints=list(numbers))

    def const(self, tensor: Tensor) -> Sized:
        return Sized(self.factors[id(tensor)], tuple(tensor.shape))

    def literal(self, tensor: Tensor, like: Sized) -> Sized:
        held = self._op("Constant", value=from_torch(tensor, ""))
        return Sized(self._op("CastLike", held, like.value), tuple(tensor.shape))

    def _elementwise(self, kind: str, a: Sized, b: Sized) -> Sized:
        return Sized(self._op(kind, a.value, b.value), broadcast(a.axes, b.axes))

    def add(self, a: Sized, b: Sized) -> Sized:
        return self._elementwise("Add", a, b)

    def sub(self, a: Sized, b: Sized) -> Sized:
        return self._elementwise("Sub", a, b)

    def mul(self, x: Sized, w: Sized) -> Sized:
        return self._elementwise("Mul", x, w)

    def exp(self, x: Sized) -> Sized:
        return Sized(self._op("Exp", x.value), x.axes)

    def log(self, x: Sized) -> Sized:
        return Sized(self._op("Log", x.value), x.axes)

    def at_least(self, x: Sized, bound: float) -> Sized:
        return self._elementwise("Max", x, self.literal(torch.full((1,), bound), x))

    def where(self, condition: Sized, a: Sized, b: Sized) -> Sized:
        axes = broadcast(condition.axes, broadcast(a.axes, b.axes))
        return Sized(self._op("Where", condition.value, a.value, b.value), axes)

    def triangle(self, like: Sized) -> Sized:
        sizes = self._op("Slice", self._op("Shape", like.value), self._ints(-2), self._ints(1 << 62))
        every = self._op("ConstantOfShape", sizes, value=from_torch(torch.ones(1, dtype=torch.bool), ""))
        return Sized(self._op("Trilu", every, upper=0), (like.axes[-2], like.axes[-1]))

    def regroup(self, x: Sized, heads: int) -> Sized:
        count, rows = x.axes[1:3]
        made = None if count is None or rows is None else count * rows // heads
        return Sized(self._op("Reshape", x.value, self._ints(0, heads, -1, 0)), (x.axes[0], heads, made, x.axes[3]))

    def softmax(self, x: Sized) -> Sized:
        return Sized(self._op("Softmax", x.value, axis=-1), x.axes)

    def total(self, x: Sized) -> Sized:
        return Sized(self._op("ReduceSum", x.value, self._ints(-1), keepdims=1), (*x.axes[:-1], 1))

    def cumulate(self, x: Sized, axis: int) -> Sized:
        """A product with a triangle of ones, which runtimes do faster than CumSum."""
        size = x.axes[axis]
        assert size is not None
        ones = self.literal(torch.ones(size, size).tril(), x)
        if axis == -2:
            return self.contract(ones, x)
        moved = self.swap(x, axis, -2)
        return self.swap(self.contract(ones, moved), axis, -2)

    def last(self, x: Sized, axis: int) -> Sized:
        axes = list(x.axes)
        axes[axis] = 1
        end = self._ints(-1), self._ints(1 << 62), self._ints(axis % len(axes))
        return Sized(self._op("Slice", x.value, *end), tuple(axes))

    def matmul(self, x: Sized, w: Sized) -> Sized:
        return self.contract(x, w)

    def contract(self, a: Sized, b: Sized) -> Sized:
        assert a.axes[-1] == b.axes[-2], f"contract {a.axes} with {b.axes}"
        return Sized(self._op("MatMul", a.value, b.value), (*broadcast(a.axes[:-2], b.axes[:-2]), a.axes[-2], b.axes[-1]))

    def swap(self, x: Sized, a: int = -1, b: int = -2) -> Sized:
        order = list(range(len(x.axes)))
        order[a], order[b] = order[b], order[a]
        return Sized(self._op("Transpose", x.value, perm=order), tuple(x.axes[i] for i in order))

    def unfold(self, x: Sized, *sizes: int) -> Sized:
        known = math.prod(n for n in sizes if n > 0)
        sizes = tuple(n if n > 0 else (x.axes[-1] or 0) // known for n in sizes)
        return self._reshape(x, (*x.axes[:-1], *sizes), len(x.axes) - 1)

    def fold(self, x: Sized, axes: int = 2) -> Sized:
        together = math.prod(n for n in x.axes[-axes:] if n is not None)
        return self._reshape(x, (*x.axes[:-axes], together), len(x.axes) - axes)

    def _reshape(self, x: Sized, axes: Axes, copied: int) -> Sized:
        assert all(n is not None for n in axes[copied:])
        return Sized(self._op("Reshape", x.value, self._ints(*[0] * copied, *[n or 0 for n in axes[copied:]])), axes)

    def split(self, x: Sized, sizes: Sequence[int]) -> list[Sized]:
        pieces = self.tape.op_multi_out("Split", [x.value, self._ints(*sizes)], {"axis": -1}, num_outputs=len(sizes))
        return [Sized(piece, (*x.axes[:-1], size)) for piece, size in zip(pieces, sizes, strict=True)]

    def concat(self, xs: Sequence[Sized]) -> Sized:
        width = sum(x.axes[-1] or 0 for x in xs)
        return Sized(self.tape.op("Concat", [x.value for x in xs], {"axis": -1}), (*xs[0].axes[:-1], width))

    def gather(self, x: Sized, index: Sized) -> Sized:
        return Sized(self._op("Gather", x.value, index.value, axis=-1), (*x.axes[:-1], index.axes[0]))

    def block_matmul(self, x: Sized, w: Sized) -> Sized:
        k, q = w.axes[0] or 0, w.axes[1] or 0
        rows = self.unfold(self.unfold(x, k, q), 1, q)  # (..., k, 1, q)
        return self.fold(self.contract(rows, w), 3)

    def scatter(self, values: Sized, positions: Sized, n: int, m: int) -> Sized:
        return Sized(*scattered(self.tape, values, positions, n, m))

    def nibbles(self, packed: Sized) -> Sized:
        *blocks, half, p = known(packed.axes)
        shape = (*blocks, 2 * half, p)
        return Sized(nibbles.whole(self.tape, packed.value, shape), shape)

    def scaled(self, values: Sized, scales: Sized) -> Sized:
        groups = known(scales.axes)[-2]
        return Sized(nibbles.weighted(self.tape, values.value, scales.value, known(values.axes), groups), values.axes)

    def shuffle(self, x: Sized, k: int) -> Sized:
        features = x.axes[-1]
        assert features is not None
        return self.fold(self.swap(self.unfold(x, k, features // k)))

    def pad(self, x: Sized, width: int) -> Sized:
        have = x.axes[-1]
        assert have is not None
        pads = self._ints(*[0] * (2 * len(x.axes) - 1), width - have)
        return Sized(self._op("Pad", x.value, pads), (*x.axes[:-1], width))

    def unit_lower_inverse(self, x: Sized) -> Sized:
        """By blocks: [[A, 0], [L, B]]^-1 = [[A', 0], [-B' L A', B']], from pairs of rows upwards; padded to a power of two."""
        size = x.axes[-1]
        assert size is not None
        eye = self.literal(torch.eye(size), x)
        inverse, width = self.sub(eye, self.mul(x, self.literal(_within(size, 2), x))), 2
        while width < size:  # blocks of `width` are inverted; join two and two
            between = self.mul(x, self.literal(_between(size, width), x))
            inverse = self.sub(inverse, self.contract(self.contract(inverse, between), inverse))
            width *= 2
        return inverse

    def _length(self, x: Sized, axis: int) -> ir.Value:
        return self._op("Gather", self._op("Shape", x.value), self._ints(axis), axis=0)

    def chunks(self, x: Sized, size: int, axis: int) -> Sized:
        missing = self._op("Mod", self._op("Neg", self._length(x, axis)), self._ints(size))
        none = [self._ints(*[0] * n) for n in (len(x.axes) + axis, len(x.axes) - axis - 1)]
        pads = self.tape.op("Concat", [none[0], missing, none[1]], {"axis": 0})
        padded = self._op("Pad", x.value, pads)
        axes = (*x.axes[:axis], None, size, *x.axes[axis + 1 :])
        shape = self._ints(*[0] * axis, -1, size, *[n or 0 for n in x.axes[axis + 1 :]])
        return Sized(self._op("Reshape", padded, shape), axes)

    def joined(self, x: Sized, like: Sized, axis: int) -> Sized:
        axes = (*x.axes[:axis], None, *x.axes[axis + 2 :])
        whole = self._op("Reshape", x.value, self._ints(*[0] * axis, -1, *[n or 0 for n in x.axes[axis + 2 :]]))
        cut = self._op("Slice", whole, self._ints(0), self._length(like, axis), self._ints(axis))
        return Sized(cut, axes)

    def tail(self, x: Sized, size: int, axis: int) -> Sized:
        start = self._op("Mul", self._last_chunk(x, size, axis), self._ints(size))
        return Sized(self._op("Slice", x.value, start, self._length(x, axis), self._ints(axis)), x.axes)

    def at_tail(self, x: Sized, like: Sized, size: int) -> Sized:
        index = self._op("Squeeze", self._last_chunk(like, size, 1))
        return Sized(self._op("Gather", x.value, index, axis=1), (x.axes[0], *x.axes[2:]))

    def _last_chunk(self, x: Sized, size: int, axis: int) -> ir.Value:
        return self._op("Div", self._op("Sub", self._length(x, axis), self._ints(1)), self._ints(size))

    def steady(self, x: Sized, like: Sized) -> Sized:
        return Sized(steady(self.tape, x.value, like.value, x.axes[-1] or 1), (None, None, x.axes[-1]))

    def zeros(self, like: Sized, *sizes: int) -> Sized:
        shape = self.tape.op("Concat", [self._length(like, 0), self._ints(*sizes)], {"axis": 0})
        return Sized(self._op("CastLike", self._op("ConstantOfShape", shape), like.value), (None, *sizes))

    def by_rows(self, x: Sized, most: int, few: Callable[[Sized], Sized], many: Callable[[Sized], Sized]) -> Sized:
        (first, axes), (second, _) = self._apart(few, x), self._apart(many, x)
        return Sized(either(self.tape, x.value, most, x.axes[-1] or 1, first, second), axes)

    def _apart(self, form: Choice[Sized], *given: Sized) -> tuple[Way, Axes]:
        """The nodes of a body of its own, and the axes of what it gives."""
        outer, self.tape = self.tape, Tape()
        y = form(*given)
        nodes, self.tape = self.tape.nodes, outer
        return (nodes, y.value), y.axes

    def attend(self, attention: Any, *inputs: Sized) -> Sized:
        found: Sized = attention.apply(self, *inputs)[0]
        return found

    def by_length(self, x: Sized, axis: int, most: int, few: Choice[Sized], many: Choice[Sized], given: Sequence[Sized]) -> Sized:
        size = x.axes[axis]
        if size is not None:
            return (few if size <= most else many)(*given)
        (first, axes), (second, others) = self._apart(few, *given), self._apart(many, *given)
        short = self._op("Squeeze", self._op("LessOrEqual", self._length(x, axis % len(x.axes)), self._ints(most)))
        return Sized(chosen(self.tape, short, first, second), tuple(n if n == m else None for n, m in zip(axes, others, strict=True)))

    def recurrence(self, step: Step[Sized], states: Sequence[Sized], xs: Sequence[Sized]) -> tuple[list[Sized], list[Sized]]:
        outer, self.tape = self.tape, Tape()
        self._scans += 1
        mine = f"scan{self._scans}"
        carried = [Sized(ir.Value(name=f"{mine}_state{i}"), s.axes) for i, s in enumerate(states)]
        rows = [Sized(ir.Value(name=f"{mine}_x{i}"), (x.axes[0], *x.axes[2:])) for i, x in enumerate(xs)]
        new, ys = step(carried, rows)
        inside = {id(node.outputs[0]) for node in self.tape.nodes}
        results = [y.value if id(y.value) in inside else self._op("Identity", y.value) for y in [*new, *ys]]
        results = [r if results.index(r) == i else self._op("Identity", r) for i, r in enumerate(results)]
        formal = [v.value for v in [*carried, *rows]]
        body = ir.Graph(formal, results, nodes=self.tape.nodes, name=f"{mine}_body")
        self.tape = outer
        attributes: dict[str, Any] = {"body": body, "num_scan_inputs": len(xs)}
        first = [self.swap(x, 0, 1) for x in xs]  # ONNX Runtime divides by zero where it moves the time axis of an empty sequence itself
        found = self.tape.op_multi_out("Scan", [v.value for v in [*states, *first]], attributes, num_outputs=len(results))
        last = [Sized(v, s.axes) for v, s in zip(found, states, strict=False)]
        given = [Sized(v, (None, *y.axes)) for v, y in zip(found[len(states) :], ys, strict=True)]
        return last, [self.swap(y, 0, 1) for y in given]


def map_function(spec: str, opset: int, lowering: str, wanted: int) -> ir.Function:
    """The body of the map that `spec` describes, in one of its forms or in one of this backend's lowerings; its first `wanted` outputs."""
    operator, leaves = skeleton(spec)
    assert isinstance(operator, AbstractMap)
    factors = [ir.Value(name=path.replace(".", "_")) for path in field_paths(spec)]
    ops = SequenceOps({id(leaf): value for leaf, value in zip(leaves, factors, strict=True)})
    inputs = [ir.Value(name=f"{name}_in") for name in operator.inputs()]
    native = lower(lowering, kind(spec))
    if native is not None:
        results = list(native(ops.tape, operator, [*inputs, *factors]))
    else:
        given = [Sized(v, axes_of(dims)) for v, dims in zip(inputs, operator.inputs().values(), strict=True)]
        results = [sized.value for sized in operator.spelled(lowering, ops, *given)]
    results = [ops.tape.op("Identity", [r]) if r.producer() is None else r for r in results[:wanted]]
    domains = {"": opset, **({CONTRIB_DOMAIN: 1} if lowering == CONTRIB_NAME else {})}
    graph = ir.Graph([*inputs, *factors], results, nodes=ops.tape.nodes, opset_imports=domains, name=kind(spec))
    name_inside(graph)
    return ir.Function(DOMAIN, kind(spec), map_overload(spec, lowering, wanted), graph=graph, attributes=())


def map_overload(spec: str, lowering: str, wanted: int) -> str:
    """What tells the bodies of one map apart."""
    return f"{overload(spec, 0)}_{lowering}_{wanted}"


def lowerings(spec: str, contrib: bool = False, opset: int = 0) -> tuple[str, ...]:
    """A map's forms, and the backend's own lowerings where it has some that the file may use."""
    operator, _ = skeleton(spec)
    assert isinstance(operator, AbstractMap)
    return (*operator.offered(), *own_lowerings(kind(spec), contrib, opset))


def axes_of(dims: Dims) -> Axes:
    """None for a size that varies."""
    return tuple(n if isinstance(n, int) else None for n in dims)


def known(axes: Axes) -> tuple[int, ...]:
    """Of a constant."""
    assert None not in axes
    return tuple(n for n in axes if n is not None)


def broadcast(a: Axes, b: Axes) -> Axes:
    """The axes of an elementwise result; a size that varies meets itself or 1."""
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    return tuple(n if m == 1 else m for n, m in pairs)


def _within(size: int, width: int) -> Tensor:
    """1 where row and column lie in one block."""
    block = torch.arange(size) // width
    return (block[:, None] == block).float()


def _between(size: int, width: int) -> Tensor:
    """1 where the row lies in the second and the column in the first of two neighbouring blocks."""
    block = torch.arange(size) // width
    return ((block[:, None] % 2 == 1) & (block[:, None] - 1 == block)).float()
