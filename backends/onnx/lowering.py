"""Which spelling of block_matmul a body gets: each is timed under ONNX Runtime at the asked token counts, the least summed time wins."""

from __future__ import annotations

from collections.abc import Sequence

from rewriter.backends.onnx.emit import Choose, default_lowering
from rewriter.backends.onnx.measure import measure_lowerings
from rewriter.backends.onnx.opaque import skeleton
from rewriter.backends.onnx.ops import LOWERINGS
from rewriter.cost import CostOps, Width

_chosen: dict[tuple[str, int, tuple[int, ...], int], str] = {}


def chooser(tokens: Sequence[int], threads: int) -> Choose:
    """Decides by measurement, once for each spec in a process (and once for each machine, through the timings' cache)."""

    def choose(spec: str, rank: int) -> str:
        key = (spec, rank, tuple(tokens), threads)
        if key not in _chosen:
            _chosen[key] = _fastest(spec, rank, tokens, threads) if has_blocks(spec) else default_lowering(spec, rank)
        return _chosen[key]

    return choose


def _fastest(spec: str, rank: int, tokens: Sequence[int], threads: int) -> str:
    table = [measure_lowerings(spec, rank, LOWERINGS, count, threads) for count in tokens]
    totals = [sum(column) for column in zip(*table, strict=True)]
    return LOWERINGS[totals.index(min(totals))]


class _Blocks(CostOps):
    """The count, noting whether the word is used."""

    seen = False

    def block_matmul(self, x: Width, w: Width) -> Width:
        self.seen = self.seen or w.shape[0] > 1
        return super().block_matmul(x, w)


def has_blocks(spec: str) -> bool:
    """Whether there is anything to choose."""
    operator, _ = skeleton(spec)
    ops = _Blocks(1)
    operator.product(ops, Width((operator.shape[1],)))
    return ops.seen
