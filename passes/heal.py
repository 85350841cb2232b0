"""`heal`: trains the factors of lossy rewrites against the dense model, for a given time, and keeps them only where that is better.

Joint distillation: every block's state and the output follow those of the dense model on the calibration samples, of which every eighth
batch is held back to judge. The dense model runs once over the samples; what it says is kept on disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from rewriter.algebra import ByTokens
from rewriter.calibrate import Feeds
from rewriter.errors import RewriteError
from rewriter.fit import site_cost
from rewriter.graph import Graph, Site
from rewriter.operator import AbstractMatrix
from rewriter.passes.healing.session import Recipe, Session
from rewriter.passes.healing.training import Clock
from rewriter.rule import AbstractPass, Context, Decision
from rewriter.structure import spell


@dataclass(frozen=True)
class Heal(AbstractPass):
    """minutes: wall clock, kept; steps: so many instead, which is reproducible; rate: the step, relative to each tensor's size;
    guided: start from the dense weight and fade it; weighted: blocks that lag count more; average: the decay of an average of the weights,
    which is then what is judged and kept; blockwise: this share of what is left after the dense model's run goes to the blocks, one after
    another, before all are trained together; data: from Python, an iterable of batches to train on; loss: from Python, loss(outputs,
    feeds), a scalar that takes the place of the outputs' distance from the dense ones.

    Batches may hold more than the model takes, such as labels.
    """

    name: ClassVar[str] = "heal"
    summary: ClassVar[str] = "trains lossy rewrites against the dense model for some minutes; kept only where that is better"
    minutes: float = 5.0
    steps: int | None = None
    rate: float = 0.004
    guided: bool = False
    weighted: bool = False
    average: float = 0.0
    blockwise: float = 0.0
    data: Any = None
    loss: Any = None

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 10_000:
            raise RewriteError(f"heal:minutes={self.minutes} is out of range; give minutes above 0 and up to 10000")
        if not 0 < self.rate <= 1:
            raise RewriteError(f"heal:rate={self.rate} is out of range; give a relative step above 0 and up to 1, such as 0.004")
        if isinstance(self.data, str) or isinstance(self.loss, str):
            raise RewriteError("heal takes data and loss from Python only: Heal(data=batches, loss=function); give --data for samples")
        if not 0 <= self.average < 1:
            raise RewriteError(f"heal:average={self.average} is out of range; give 0 (off) or a decay below 1, such as 0.99")

        if not 0 <= self.blockwise < 1:
            raise RewriteError(
                f"heal:blockwise={self.blockwise} is out of range; give 0 (off) or a share of the time below 1, such as 0.25"
            )

    def requires(self, graph: Graph) -> None:
        if graph.format != "torch":
            raise RewriteError("heal trains, and an ONNX model does not; give the torch model (.pt2, module or folder)")

    def spelling(self) -> str:
        return spell(replace(self, data=None, loss=None))

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        clock = Clock(time.monotonic(), 60 * self.minutes, self.steps)
        decisions = {site.id: context.decisions.get(site.id) or _unseen(site) for site in context.selected}
        lossy = {key: d for key, d in decisions.items() if _trains(d)}
        if lossy:
            recipe = Recipe(self.rate, self.guided, self.weighted, self.average, self.blockwise, self.loss)
            rng = torch.Generator().manual_seed(context.seed)
            with Session(graph, lossy, self._feeds(context), recipe, clock, rng, context.progress) as session:
                decisions |= session.healed()
        yield from decisions.values()

    def _feeds(self, context: Context) -> list[Feeds]:
        """What is trained on; RewriteError where nothing says what the model will see."""
        if self.data is not None:
            return list(self.data)
        samples = context.calibration.samples
        if samples is None or samples.invented:
            raise RewriteError("heal trains on what the model will see, and invented inputs are not that; give --data")
        return list(samples.batches)


def _unseen(site: Site) -> Decision:
    cost = site_cost(site)
    return Decision(site, "heal trains what earlier passes rewrote, and none rewrote this one", cost, cost)


def _trains(decision: Decision) -> bool:
    """Of two forms only one would learn."""
    whole = isinstance(decision.operator, AbstractMatrix) and not isinstance(decision.operator, ByTokens)
    return whole and not decision.exact and decision.site.dtype in (torch.float32, torch.float64)
