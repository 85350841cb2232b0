"""How far the outputs of a model are from what they were, on a few samples: the worst output's relative error.

What they were lies on disk: logits of a large vocabulary may be larger than the model.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewriter.calibrate import Feeds, Samples
from rewriter.graph import Graph
from rewriter.rule import Decision
from rewriter.verify import certify

JUDGED = 64  # samples that a comparison takes


class OutputErrors:
    """Errors of a graph against what it gives when this is entered, on about JUDGED of the samples."""

    def __init__(self, graph: Graph, samples: Samples) -> None:
        self.graph, self.samples = graph, _few(samples)

    def __enter__(self) -> Self:
        self.folder = tempfile.TemporaryDirectory(prefix="rewriter-outputs-")
        for batch in self.samples.batches:
            floats = {name: value for name, value in self.graph.run(batch).items() if value.is_floating_point()}
            save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in floats.items()}, self._path(batch))
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    def _path(self, batch: Feeds) -> Path:
        return Path(self.folder.name, f"{id(batch)}.safetensors")

    def _dense(self, batch: Feeds) -> Mapping[str, Tensor]:
        return load_file(self._path(batch))

    def now(self) -> float:
        """The error of the graph as it stands."""
        return certify(self._dense, self.graph.run, self.samples).estimate

    def of(self, decisions: Iterable[Decision]) -> float:
        """The error with these rewritten as well; the graph is as it was afterwards."""
        spliced = []
        for d in decisions:
            if d.operator is not None:
                self.graph.splice(d.site, d.operator, d.shift)
                spliced.append(d)
        try:
            return self.now()
        finally:
            for d in reversed(spliced):
                self.graph.restore(d.site)

    def effect(self, decision: Decision) -> float:
        """Its part in the output's squared error, for each unit of its own; 0 where it was kept, 1 where the dense output is nothing."""
        output = self.of([decision]) if decision.error else 0.0
        return (output / (decision.error or 1.0)) ** 2 if math.isfinite(output) else 1.0


def _few(samples: Samples) -> Samples:
    """Evenly spread batches that hold about `JUDGED` samples."""
    count = max(1, round(len(samples.batches) * min(1.0, JUDGED / max(samples.count, 1))))
    step = len(samples.batches) / count
    return replace(samples, batches=[samples.batches[int(i * step)] for i in range(count)])
