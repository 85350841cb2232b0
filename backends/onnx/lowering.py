"""Which lowering a body gets by itself: of a matrix how block products are spelled and whether features come first or last, of a map the
form or the target's own operator. What neighbours change is in layout.py.

Each is timed under ONNX Runtime at the asked token counts; the least summed time wins.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewriter.backends.onnx.contrib import STANDARD
from rewriter.backends.onnx.emit import Choose, default_lowering
from rewriter.backends.onnx.measure import OPSET, measure_lowerings
from rewriter.backends.onnx.nibbles import NBITS
from rewriter.backends.onnx.opaque import matrix_skeleton
from rewriter.backends.onnx.ops import BATCHED, COLUMNS, SPLIT, takes_columns
from rewriter.backends.onnx.sequence_ops import lowerings
from rewriter.cost import CostOps, Width

_chosen: dict[tuple[str, int, tuple[int, ...], int, bool, int], str] = {}


def chooser(tokens: Sequence[int], threads: int, contrib: bool = False, opset: int = OPSET) -> Choose:
    """Decides by measurement, once for each spec in a process (and once for each machine, through the timings' cache).

    `contrib`: operators of com.microsoft are allowed. Where they are not, the file is for any runtime, and a standard operator is taken
    unmeasured.
    """

    def choose(spec: str, rank: int) -> str:
        key = (spec, rank, tuple(tokens), threads, contrib, opset)
        if key not in _chosen:
            among = matrix_lowerings(spec, rank, contrib) if rank else lowerings(spec, contrib, opset)
            among = (STANDARD,) if STANDARD in among and not contrib else among
            _chosen[key] = among[0] if len(among) == 1 else default_lowering(spec, rank)
            if len(among) > 1:
                _chosen[key] = _fastest(spec, rank, among, tokens, threads, opset)
        return _chosen[key]

    return choose


def _fastest(spec: str, rank: int, among: Sequence[str], tokens: Sequence[int], threads: int, opset: int) -> str:
    table = [measure_lowerings(spec, rank, among, count, threads, opset) for count in tokens]
    totals = [sum(column) for column in zip(*table, strict=True)]
    return among[totals.index(min(totals))]


class _Words(CostOps):
    """The count, noting which words that move features are used."""

    def __init__(self) -> None:
        super().__init__(1)
        self.blocks = self.moves = self.halves = False

    def block_matmul(self, x: Width, w: Width) -> Width:
        self.blocks = self.blocks or w.shape[0] > 1
        return super().block_matmul(x, w)

    def nibbles(self, packed: Width) -> Width:
        self.halves = True
        return super().nibbles(packed)

    def shuffle(self, x: Width, k: int) -> Width:
        self.moves = True
        return super().shuffle(x, k)

    def gather(self, x: Width, index: Width) -> Width:
        self.moves = True
        return super().gather(x, index)


def matrix_lowerings(spec: str, rank: int, contrib: bool = False, chained: bool = False) -> tuple[str, ...]:
    """Those that differ. `chained`: features first may pay for the sake of a neighbour, even where the product moves none."""
    operator, leaves = matrix_skeleton(spec)
    words = _Words()
    operator.product(words, Width((operator.shape[1],)))
    columns = rank > 1 and takes_columns(leaves) and (words.blocks or words.moves or chained)
    ours = {SPLIT: True, BATCHED: words.blocks, COLUMNS: columns, NBITS: words.halves and contrib and rank > 1}
    return tuple(lowering for lowering, there in ours.items() if there)
