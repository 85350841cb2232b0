"""Sequential blockwise reconstruction: each block from what the blocks before it give now to the dense model's state at its end.

    min over the factors of block b of  |f_b(x) - t_b|^2 / |t_b|^2,  x = f_{b-1}(...) as trained

One block's gradients are in memory at a time; what goes into it lies on disk, so a model may have more blocks than memory holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from rewriter.calibrate import Feeds, padding_mask, unpadded
from rewriter.graph import Graph, Value
from rewriter.passes.healing.loss import distance
from rewriter.passes.healing.targets import Targets


class Chain:
    """Blocks by the values that they end with; `targets` are the dense model's states as `states` names them."""

    def __init__(self, graph: Graph, ends: Sequence[Value], feeds: Sequence[Feeds], targets: Targets, folder: Path) -> None:
        self.graph, self.ends, self.feeds, self.targets = graph, ends, feeds, targets
        self.inputs = Targets(folder)

    def loss(self, block: int, index: int, grad: bool) -> Tensor:
        """Of a batch; real rows only."""
        (end,) = self.values(block, index, [self.ends[block]], grad)
        return distance(unpadded(end, padding_mask(self.feeds[index])), self.targets[index][str(block)])

    def advance(self, block: int, indices: Iterable[int]) -> None:
        """Run a block, as it is now, over batches: that is what the next one gets."""
        for index in indices:
            (end,) = self.values(block, index, [self.ends[block]])
            self.inputs.put(_file(block, index), {"x": end})

    def values(self, block: int, index: int, wanted: Sequence[Value], grad: bool = False) -> list[Tensor]:
        """What a block has inside, or at its end, on a batch."""
        given: Mapping[Value, Tensor] = {self.ends[block - 1]: self.inputs[_file(block - 1, index)]["x"]} if block else {}
        return self.graph.part(self.feeds[index], given, wanted, grad)


def _file(block: int, index: int) -> int:
    """Two for each batch, in turn: one is read, from where it lies, while the other is written."""
    return 2 * index + block % 2
