"""The vocabulary as ONNX nodes: the body of a model-local function in standard operators, one per spec, rank and lowering.

The factors are the function's inputs, their dimensions are baked in; leading dimensions are copied by zeros in Reshape, so that they stay
dynamic without a Shape node. Only forms that mean the same in every opset from 13 to 25 are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.tape import Tape
from torch import Tensor

from rewriter.backends.onnx.opaque import DOMAIN, field_paths, kind, overload, skeleton

LOWERINGS = ("split", "batched")  # of block_matmul; the first is what is emitted where nothing was measured
MANY_BLOCKS = 64  # beyond which "split" would be a node for each block


class Held(NamedTuple):
    """A value and the sizes that are known: a weight's shape, or (features,)."""

    value: ir.Value
    shape: tuple[int, ...]

    @property
    def features(self) -> int:
        return self.shape[-1]


class OnnxOps:
    """Emits onto a tape, for an x of known rank."""

    def __init__(self, rank: int, factors: Mapping[int, ir.Value], lowering: str) -> None:
        self.rank = rank
        self.factors = factors  # by id of the operator's tensor
        self.lowering = lowering
        self.tape = Tape()

    def _ints(self, *numbers: int) -> ir.Value:
        return self.tape.op("Constant", [], {"value_ints": list(numbers)})

    def _reshape(self, value: ir.Value, *tail: int) -> ir.Value:
        """The leading dimensions as they are, then these."""
        return self.tape.op("Reshape", [value, self._ints(*[0] * (self.rank - 1), *tail)])

    def _swap(self, value: ir.Value, a: int, b: int, rank: int) -> ir.Value:
        axes = list(range(rank))
        axes[a], axes[b] = axes[b], axes[a]
        return self.tape.op("Transpose", [value], {"perm": axes})

    def const(self, tensor: Tensor) -> Held:
        return Held(self.factors[id(tensor)], tuple(tensor.shape))

    def matmul(self, x: Held, w: Held) -> Held:
        return Held(self.tape.op("MatMul", [x.value, w.value]), (w.shape[1],))

    def block_matmul(self, x: Held, w: Held) -> Held:
        k, _, p = w.shape
        if k == 1:
            single = self.tape.op("Squeeze", [w.value, self._ints(0)])
            return Held(self.tape.op("MatMul", [x.value, single]), (p,))
        lowered = self._split if self.lowering == "split" and k <= MANY_BLOCKS else self._batched
        return Held(lowered(x.value, w), (k * p,))

    def _split(self, x: ir.Value, w: Held) -> ir.Value:
        """One product for each block: 2-D weights, which runtimes pack ahead of time (the cut of a constant folds away)."""
        k, q, _ = w.shape
        pieces = self.tape.op_multi_out("Split", [x, self._ints(*[q] * k)], {"axis": -1}, num_outputs=k)
        weights = self.tape.op_multi_out("Split", [w.value, self._ints(*[1] * k)], {"axis": 0}, num_outputs=k)
        zero = self._ints(0)
        products = [self.tape.op("MatMul", [a, self.tape.op("Squeeze", [b, zero])]) for a, b in zip(pieces, weights, strict=True)]
        return self.tape.op("Concat", products, {"axis": -1})

    def _batched(self, x: ir.Value, w: Held) -> ir.Value:
        """One product over a batch of blocks, the block axis moved before the last leading one."""
        k, q, p = w.shape
        if self.rank == 1:
            rows = self.tape.op("Reshape", [x, self._ints(k, 1, q)])
            return self.tape.op("Reshape", [self.tape.op("MatMul", [rows, w.value]), self._ints(k * p)])
        rows = self._swap(self._reshape(x, k, q), self.rank - 2, self.rank - 1, self.rank + 1)
        product = self.tape.op("MatMul", [rows, w.value])
        return self._reshape(self._swap(product, self.rank - 2, self.rank - 1, self.rank + 1), k * p)

    def shuffle(self, x: Held, k: int) -> Held:
        apart = self._reshape(x.value, k, x.features // k)
        return Held(self._reshape(self._swap(apart, self.rank - 1, self.rank, self.rank + 1), x.features), x.shape)

    def add(self, a: Held, b: Held) -> Held:
        return Held(self.tape.op("Add", [a.value, b.value]), a.shape)

    def mul(self, x: Held, w: Held) -> Held:
        return Held(self.tape.op("Mul", [x.value, w.value]), x.shape)

    def gather(self, x: Held, index: Held) -> Held:
        return Held(self.tape.op("Gather", [x.value, index.value], {"axis": -1}), index.shape)

    def concat(self, xs: Sequence[Held]) -> Held:
        return Held(self.tape.op("Concat", [x.value for x in xs], {"axis": -1}), (sum(x.features for x in xs),))

    def split(self, x: Held, sizes: Sequence[int]) -> list[Held]:
        pieces = self.tape.op_multi_out("Split", [x.value, self._ints(*sizes)], {"axis": -1}, num_outputs=len(sizes))
        return [Held(piece, (size,)) for piece, size in zip(pieces, sizes, strict=True)]

    def pad(self, x: Held, width: int) -> Held:
        if width == x.features:
            return x
        pads = [0] * (2 * self.rank - 1) + [width - x.features]
        return Held(self.tape.op("Pad", [x.value, self._ints(*pads)]), (width,))


def function(spec: str, rank: int, opset: int, lowering: str = LOWERINGS[0]) -> ir.Function:
    """The body of the operator that `spec` describes, for an x of `rank` axes."""
    operator, leaves = skeleton(spec)
    inputs = [ir.Value(name=path.replace(".", "_")) for path in field_paths(spec)]
    ops = OnnxOps(rank, {id(leaf): value for leaf, value in zip(leaves, inputs, strict=True)}, lowering)
    x = ir.Value(name="x")
    y = operator.product(ops, Held(x, (operator.shape[1],))).value
    if y.producer() is None:
        y = ops.tape.op("Identity", [y])
    graph = ir.Graph([x, *inputs], [y], nodes=ops.tape.nodes, opset_imports={"": opset}, name=kind(spec))
    return ir.Function(DOMAIN, kind(spec), overload(spec, rank), graph=graph, attributes=())
