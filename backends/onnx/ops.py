"""The vocabulary as ONNX nodes: the body of a model-local function in standard operators, one per spec, rank and lowering.

The factors are the function's inputs, their dimensions are baked in; leading dimensions are copied or inferred by Reshape, so that they
stay dynamic without a Shape node. Only forms that mean the same in every opset from 13 to 25 are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from torch import Tensor

from rewriter.backends.onnx import nibbles
from rewriter.backends.onnx.arrange import Arranged, Axis, arrange, plain, settled, split
from rewriter.backends.onnx.attention import DOMAIN as CONTRIB_DOMAIN
from rewriter.backends.onnx.either import Way, either, name_inside
from rewriter.backends.onnx.nibbles import NBITS
from rewriter.backends.onnx.opaque import DOMAIN, field_paths, kind, matrix_skeleton, overload
from rewriter.backends.onnx.scatter import scattered

# The first is what is emitted where nothing was measured. The last has features before the last leading axis. A grouped 1x1 convolution
# would be about as fast there, but ONNX Runtime refuses it an empty sequence, which a product takes.
LOWERINGS = SPLIT, BATCHED, COLUMNS = ("split", "batched", "columns")
MANY_BLOCKS = 64  # beyond which "split" would be a node for each block


class Weight(NamedTuple):
    """A factor and its shape."""

    value: ir.Value
    shape: tuple[int, ...]


class Integers(NamedTuple):
    """A factor of integers (..., q, p) with its scales (..., 1, p): inputs are rounded to 8 bits, each product's by a range of its own."""

    value: ir.Value
    scales: ir.Value
    shape: tuple[int, ...]


class Nibbles(NamedTuple):
    """A factor of 4 bits (..., q / 2, p) uint8; with its scales (..., groups, p) one for MatMulNBits."""

    value: ir.Value
    scales: ir.Value | None
    shape: tuple[int, ...]  # (..., q, p)
    groups: int = 1


Factor = Weight | Integers | Nibbles


class OnnxOps:
    """Emits onto a tape, for an x of known rank."""

    axis = -1  # of the features

    def __init__(self, rank: int, factors: Mapping[int, ir.Value], lowering: str) -> None:
        self.leading = tuple(Axis(None) for _ in range(rank - 1))
        self.factors = factors  # by id of the operator's tensor
        self.lowering = lowering
        self.tape = Tape()
        self._rounded: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}  # by what was rounded

    def _ints(self, *numbers: int) -> ir.Value:
        return self.tape.op("Constant", [], {"value_ints": list(numbers)})

    def _plain(self, value: ir.Value, features: int) -> Arranged:
        return plain(value, self.leading, features)

    def _settled(self, x: Arranged) -> ir.Value:
        return settled(self.tape, x).value

    def given(self, x: ir.Value, features: int) -> Arranged:
        """The function's input, (..., features), as products are to find it."""
        return self._plain(x, features)

    def const(self, tensor: Tensor) -> Weight:
        return Weight(self.factors[id(tensor)], tuple(tensor.shape))

    def matmul(self, x: Arranged, w: Factor) -> Arranged:
        return self._plain(self._product(self._settled(x), w), w.shape[1])

    def block_matmul(self, x: Arranged, w: Factor) -> Arranged:
        k, _, p = w.shape
        if k == 1:
            return self._plain(self._product(self._settled(x), self._each(w)[0]), p)
        if not self.leading:
            return self._one_row(x, w)
        if isinstance(w, Nibbles) or (self.lowering in (SPLIT, NBITS) and k <= MANY_BLOCKS):
            return self._split(x, w)
        return self._batched(x, w)

    def _product(self, x: ir.Value, w: Factor) -> ir.Value:
        """x times a weight of two axes, or of one more for a batch. Of integers in the spelling that ONNX Runtime makes one node."""
        if isinstance(w, Weight):
            return self.tape.op("MatMul", [x, w.value])
        if isinstance(w, Nibbles):
            assert w.scales is not None
            return nibbles.product(self.tape, x, w.value, w.scales, w.shape, w.groups)
        if x not in self._rounded:
            made = self.tape.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3)
            self._rounded[x] = made[0], made[1], made[2]
        whole, scale, zero = self._rounded[x]
        scales = self.tape.op("Squeeze", [w.scales, self._ints(0)]) if len(w.shape) == 2 else w.scales
        sums = self.tape.op("Cast", [self.tape.op("MatMulInteger", [whole, w.value, zero])], {"to": ir.DataType.FLOAT.value})
        return self.tape.op("Mul", [sums, self.tape.op("Mul", [scale, scales])])

    def _each(self, w: Factor) -> list[Factor]:
        """The blocks; the cut of a constant folds away."""
        k, q, p = w.shape
        fields = [w.value] if isinstance(w, Weight) or w.scales is None else [w.value, w.scales]
        cut = [self.tape.op_multi_out("Split", [f, self._ints(*[1] * k)], {"axis": 0}, num_outputs=k) if k > 1 else [f] for f in fields]
        blocks = [[self.tape.op("Squeeze", [piece, self._ints(0)]) for piece in pieces] for pieces in cut]
        changed = [dict(zip(("value", "scales"), block, strict=False)) for block in zip(*blocks, strict=True)]
        return [w._replace(**fields, shape=(q, p)) for fields in changed]

    def _one_row(self, x: Arranged, w: Factor) -> Arranged:
        k, q, p = w.shape
        rows = self.tape.op("Reshape", [self._settled(x), self._ints(k, 1, q)])
        return self._plain(self.tape.op("Reshape", [self._product(rows, w), self._ints(k * p)]), k * p)

    def _split(self, x: Arranged, w: Factor) -> Arranged:
        """One product for each block: 2-D weights, which runtimes pack ahead of time."""
        k, q, p = w.shape
        pieces = self.tape.op_multi_out("Split", [self._settled(x), self._ints(*[q] * k)], {"axis": -1}, num_outputs=k)
        products = [self._product(a, b) for a, b in zip(pieces, self._each(w), strict=True)]
        return self._plain(self.tape.op("Concat", products, {"axis": -1}), k * p)

    def _batched(self, x: Arranged, w: Factor) -> Arranged:
        """One product over a batch of blocks, the block axis before the last leading one."""
        k, _, p = w.shape
        x, blocks, within = split(self.tape, x, k)
        *outer, last = self.leading
        before = tuple((axis,) for axis in outer)
        rows = arrange(self.tape, x, (*before, blocks, (last,), within))
        made = Axis(p)
        product = self._product(rows.value, w)
        return Arranged(product, (*before, blocks, (last,), (made,)), self.leading, (*blocks, made))

    def scatter(self, values: Factor, positions: Weight, n: int, m: int) -> Factor:
        value, shape = scattered(self.tape, (values.value, values.shape), positions, n, m)
        return values._replace(value=value, shape=shape)

    def nibbles(self, packed: Weight) -> Nibbles:
        *blocks, half, p = packed.shape
        return Nibbles(packed.value, None, (*blocks, 2 * half, p))

    def scaled(self, values: Weight | Nibbles, scales: Weight) -> Factor:
        groups = scales.shape[-2]
        if isinstance(values, Weight):
            return Integers(values.value, scales.value, values.shape)
        if self.lowering == NBITS and self.leading and values.shape[-2] // groups in nibbles.GROUPS:
            return values._replace(scales=scales.value, groups=groups)
        whole = nibbles.whole(self.tape, values.value, values.shape)
        return Weight(nibbles.weighted(self.tape, whole, scales.value, values.shape, groups), values.shape)

    def shuffle(self, x: Arranged, k: int) -> Arranged:
        x, first, second = split(self.tape, x, k)
        return replace(x, features=(*second, *first))

    def add(self, a: Arranged, b: Arranged) -> Arranged:
        return self._plain(self.tape.op("Add", [self._settled(a), self._settled(b)]), a.width)

    def mul(self, x: Arranged, w: Weight) -> Arranged:
        return self._plain(self.tape.op("Mul", [self._settled(x), w.value]), x.width)

    def gather(self, x: Arranged, index: Weight) -> Arranged:
        return self._plain(self.tape.op("Gather", [self._settled(x), index.value], {"axis": self.axis}), index.shape[0])

    def concat(self, xs: Sequence[Arranged]) -> Arranged:
        return self._plain(self.tape.op("Concat", [self._settled(x) for x in xs], {"axis": self.axis}), sum(x.width for x in xs))

    def split(self, x: Arranged, sizes: Sequence[int]) -> list[Arranged]:
        pieces = self.tape.op_multi_out("Split", [self._settled(x), self._ints(*sizes)], {"axis": self.axis}, num_outputs=len(sizes))
        return [self._plain(piece, size) for piece, size in zip(pieces, sizes, strict=True)]

    def pad(self, x: Arranged, width: int) -> Arranged:
        if width == x.width:
            return x
        rank = len(self.leading) + 1
        pads = [0] * (2 * rank)
        pads[self.axis] = width - x.width
        return self._plain(self.tape.op("Pad", [self._settled(x), self._ints(*pads)]), width)

    def by_rows(self, x: Arranged, most: int, few: Callable[[Arranged], Arranged], many: Callable[[Arranged], Arranged]) -> Arranged:
        if not self.leading:
            return (few if most else many)(x)
        x = self._plain(self._settled(x), x.width)
        (first, width), (second, _) = self._apart(few, x), self._apart(many, x)
        return self._plain(either(self.tape, x.value, most, x.width, first, second), width)

    def _apart(self, form: Callable[[Arranged], Arranged], x: Arranged) -> tuple[Way, int]:
        """The nodes of a body of its own, what was rounded outside at hand; and the width of what it gives."""
        outer, rounded = self.tape, dict(self._rounded)
        self.tape = Tape()
        y = form(x)
        value, nodes = self._settled(y), self.tape.nodes
        self.tape, self._rounded = outer, rounded
        return (nodes, value), y.width


class ColumnOps(OnnxOps):
    """The same on (..., n, tokens), for an x of two axes or more: weights stand on the left, and what moves are whole rows of tokens.

    Between two such bodies with nothing but elementwise nodes in between, the turns at their ends cancel: ONNX Runtime's own optimizer
    carries a Transpose past those.
    """

    axis = -2

    def _plain(self, value: ir.Value, features: int) -> Arranged:
        axis, (*outer, last) = Axis(features), self.leading
        return Arranged(value, (*((a,) for a in outer), (axis,), (last,)), self.leading, (axis,))

    def _settled(self, x: Arranged) -> ir.Value:
        *outer, last = self.leading
        return arrange(self.tape, x, (*((a,) for a in outer), x.features, (last,))).value

    def given(self, x: ir.Value, features: int) -> Arranged:
        return self._plain(self._settled(plain(x, self.leading, features)), features)

    def matmul(self, x: Arranged, w: Factor) -> Arranged:
        turned = self.tape.op("Transpose", [w.value], {"perm": [1, 0]})
        return self._plain(self.tape.op("MatMul", [turned, self._settled(x)]), w.shape[1])

    def block_matmul(self, x: Arranged, w: Factor) -> Arranged:
        """One product over the blocks. An axis of size 1 goes before the features, so that in both Reshapes tokens keep their place:
        a size of -1 could not be told where another one is zero."""
        k, q, p = w.shape
        if k == 1:
            return self.matmul(x, self._each(w)[0])
        before, one = [0] * (len(self.leading) - 1), self._ints(-3)
        blocks = self.tape.op("Reshape", [self.tape.op("Unsqueeze", [self._settled(x), one]), self._ints(*before, k, q, 0)])
        product = self.tape.op("MatMul", [self.tape.op("Transpose", [w.value], {"perm": [0, 2, 1]}), blocks])
        joined = self.tape.op("Reshape", [product, self._ints(*before, 1, k * p, 0)])
        return self._plain(self.tape.op("Squeeze", [joined, one]), k * p)

    def shuffle(self, x: Arranged, k: int) -> Arranged:
        order = [i * (x.width // k) + j for j in range(x.width // k) for i in range(k)]
        return self._plain(self.tape.op("Gather", [self._settled(x), self._ints(*order)], {"axis": self.axis}), x.width)

    def mul(self, x: Arranged, w: Weight) -> Arranged:
        return super().mul(x, Weight(self.tape.op("Unsqueeze", [w.value, self._ints(-1)]), (*w.shape, 1)))


def function(spec: str, rank: int, opset: int, lowering: str = LOWERINGS[0]) -> ir.Function:
    """The body of the operator that `spec` describes, for an x of `rank` axes."""
    operator, leaves = matrix_skeleton(spec)
    inputs = [ir.Value(name=path.replace(".", "_")) for path in field_paths(spec)]
    columns = lowering == COLUMNS and rank > 1 and takes_columns(leaves)
    ops = (ColumnOps if columns else OnnxOps)(rank, {id(leaf): value for leaf, value in zip(leaves, inputs, strict=True)}, lowering)
    x = ir.Value(name="x")
    y = settled(ops.tape, operator.product(ops, ops.given(x, operator.shape[1]))).value
    if y.producer() is None:
        y = ops.tape.op("Identity", [y])
    imports = {"": opset, **({CONTRIB_DOMAIN: 1} if lowering == NBITS else {})}
    graph = ir.Graph([x, *inputs], [y], nodes=ops.tape.nodes, opset_imports=imports, name=kind(spec))
    name_inside(graph)
    return ir.Function(DOMAIN, kind(spec), overload(spec, rank, lowering), graph=graph, attributes=())


def takes_columns(leaves: Sequence[Tensor]) -> bool:
    """Whether there are no integers among the factors: runtimes multiply those on the right."""
    return all(leaf.dtype != torch.int8 for leaf in leaves)
