"""Chains linear, bias, GELU, linear under ONNX Runtime: features last in every layer against features first from end to end.

    python tools/bench_layout.py [--shapes 384x1536 1024x4096] [--tokens 64 256 1024] [--threads 1]

Both layers are of one family. "Last" is what each layer by itself is fastest with of the lowerings that keep features last. A cell is the
median over repeats of paired ratios last / first, in brackets the least and the largest repeat; a plus says that emission chose features
first for that count. Before anything is printed, both are compared with the eager oracle.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import onnx_ir as ir
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rewriter.algebra import BlockDiagonal, Compose, Dense, Permutation
from rewriter.backends.eager import EagerOps
from rewriter.backends.onnx.emit import attach
from rewriter.backends.onnx.layout import Conditions, layouts
from rewriter.backends.onnx.lowering import matrix_lowerings
from rewriter.backends.onnx.measure import measure_lowerings
from rewriter.backends.onnx.opaque import is_opaque, opaque
from rewriter.backends.onnx.ops import COLUMNS
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.tensors import from_torch
from rewriter.operator import AbstractMatrix, flatten
from rewriter.passes.structures.blast import Blast
from rewriter.passes.structures.block_dense import BlockDense
from rewriter.passes.structures.low_rank import LowRank
from rewriter.passes.structures.monarch import Monarch
from rewriter.passes.structures.pivoted_low_rank import PivotedLowRank
from rewriter.timing import interleave
from rewriter.tolerances import EQUAL

OPSET = 20
REPEATS = 3
SECONDS = 0.15  # of each form in each repeat


def normal(*shape: int) -> Tensor:
    """Weights that keep values of order one."""
    return torch.randn(*shape) / shape[-2] ** 0.5


def monarch(blocks: int, factor: int, strided: bool = False) -> Callable[[int, int], AbstractMatrix]:
    def made(n: int, m: int) -> AbstractMatrix:
        rank = max(1, n * m // factor // (blocks * (n + m)))
        right, left = normal(blocks, n // blocks, rank * blocks), normal(blocks, blocks * rank, m // blocks)
        return Monarch(right, left, n, m, strided, strided)

    return made


def block_dense(n: int, m: int) -> AbstractMatrix:
    rank = n * m // 4 // (n // 4 + m) // 4
    return BlockDense(normal(4, n // 4, rank), normal(4 * rank, m), n)


def blast(n: int, m: int) -> AbstractMatrix:
    rank = n * m // 4 // (n + m + 16)
    return Blast(normal(4, n // 4, rank), normal(rank, 4, 4), normal(4, rank, m // 4), n, m)


def low_rank(n: int, m: int) -> AbstractMatrix:
    rank = n * m // 4 // (n + m)
    return LowRank(normal(n, rank), normal(rank, m))


def pivoted(n: int, m: int) -> AbstractMatrix:
    """With rows from all over, as discovery finds them: a permutation stands behind."""
    rank = next(r for r in range(min(m, n) - 1, 0, -1) if r * (m + n - r) <= n * m // 4)
    return Compose((PivotedLowRank(normal(n, rank), normal(rank, m - rank), 0), Permutation(torch.randperm(m), m)))


FAMILIES: Mapping[str, Callable[[int, int], AbstractMatrix]] = {
    "dense": lambda n, m: Dense(normal(n, m)),
    "low-rank, F = 4": low_rank,
    "pivoted-low-rank, permuted, F = 4": pivoted,
    "block-dense, 4 blocks, F = 4": block_dense,
    "block-diagonal, 8 blocks": lambda n, m: BlockDiagonal(normal(8, n // 8, m // 8)),
    "monarch 4 x 4, F = 4": monarch(4, 4),
    "monarch 8 x 8, F = 4": monarch(8, 4),
    "monarch 8 x 8, F = 8": monarch(8, 8),
    "monarch 8 x 8, strided, F = 8": monarch(8, 8, strided=True),
    "monarch 32 x 32, F = 16": monarch(32, 16),
    "blast, 4 blocks, F = 4": blast,
}


class Layer(NamedTuple):
    """One linear of the chain."""

    operator: AbstractMatrix
    bias: Tensor


def chain(first: Layer, second: Layer) -> ir.Model:
    """Opaque nodes, biases and the GELU between, for (batch, tokens, n)."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="chain")
    value = ir.val("x", ir.DataType.FLOAT, ["batch", "tokens", first.operator.shape[1]])
    graph.inputs.append(value)

    def stored(tensor: Tensor, name: str) -> ir.Value:
        held = from_torch(tensor, name)
        made = ir.Value(name=name, shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(held.dtype), const_value=held)
        graph.register_initializer(made)
        return made

    def add(node: ir.Node, width: int, name: str) -> ir.Value:
        graph.append(node)
        (made,) = node.outputs
        made.name, made.type, made.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "tokens", width])
        return made

    for i, (operator, bias) in enumerate((first, second)):
        leaves, spec = flatten(operator)
        factors = [stored(leaf, f"w{i}_{j}") for j, leaf in enumerate(leaves)]
        value = add(opaque([value], factors, spec, f"layer{i}", 3), len(bias), f"product{i}")
        value = add(ir.node("Add", [value, stored(bias, f"b{i}")]), len(bias), f"sum{i}")
        value = add(ir.node("Gelu", [value]), len(bias), "gelu") if i == 0 else value
    graph.outputs.append(value)
    return ir.Model(graph, ir_version=10)


def eager(x: Tensor, first: Layer, second: Layer) -> Tensor:
    hidden = torch.nn.functional.gelu(first.operator.product(EagerOps(), x) + first.bias)
    product: Tensor = second.operator.product(EagerOps(), hidden)
    return product + second.bias


def lowered(layers: tuple[Layer, Layer], lowerings: Mapping[str, str], threads: int) -> Session:
    """A session with these lowerings by spec; SystemExit unless it gives what eager gives."""
    model = chain(*layers)
    attach(model, lambda spec, _rank: lowerings[spec])
    session = Session(ir.to_proto(model).SerializeToString(), threads)
    x = torch.randn(2, 5, layers[0].operator.shape[1])
    expected = eager(x, *layers)
    rtol, atol = EQUAL[torch.float32]
    (got,) = session({"x": x}).values()
    if not torch.allclose(got, expected, rtol, atol * float(expected.abs().max())):
        raise SystemExit(f"red: {lowerings} differs from eager; no figure is printed")
    return session


def cell(layers: tuple[Layer, Layer], tokens: int, threads: int) -> str:
    specs = [flatten(layer.operator)[1] for layer in layers]
    last = {}
    for spec in specs:
        among = matrix_lowerings(spec, 3, chained=True)
        seconds = dict(zip(among, measure_lowerings(spec, 3, among, tokens, threads, OPSET), strict=True))
        last[spec] = min((name for name in among if name != COLUMNS), key=seconds.__getitem__)
    sessions = [lowered(layers, last, threads), lowered(layers, dict.fromkeys(specs, COLUMNS), threads)]
    feeds = {"x": torch.randn(1, tokens, layers[0].operator.shape[1]).numpy()}
    calls = [lambda session=session: session.session.run(None, feeds) for session in sessions]
    ratios = sorted(interleave(calls, seconds=SECONDS).ratio(0, 1)[1] for _ in range(REPEATS))
    model = chain(*layers)
    chosen, _ = layouts(model, Conditions((tokens,), threads, OPSET))
    plus = " +" if all(chosen.get(node) == COLUMNS for node in model.graph if is_opaque(node)) else ""
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}){plus}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--shapes", nargs="+", default=["384x1536", "1024x4096"])
    options.add_argument("--tokens", nargs="+", type=int, default=[64, 256, 1024])
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    torch.manual_seed(0)
    table = Table(title=f"features first over features last, {given.threads} thread(s)")
    for head in ("chain", "both layers", *(f"T={count}" for count in given.tokens)):
        table.add_column(head)
    for shape in given.shapes:
        n, m = map(int, shape.split("x"))
        for name, made in FAMILIES.items():
            layers = Layer(made(n, m), torch.randn(m)), Layer(made(m, n), torch.randn(n))
            table.add_row(f"{n}-{m}-{n}", name, *(cell(layers, count, given.threads) for count in given.tokens))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
