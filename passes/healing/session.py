"""One healing of one graph: the dense model teaches, the rewritten one trains, and what is better is kept."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from rewriter.calibrate import Feeds
from rewriter.cuts import cuts
from rewriter.errors import RewriteError
from rewriter.fit import shifted
from rewriter.graph import Graph, load_weight
from rewriter.operator import AbstractMatrix, flatten, unflatten
from rewriter.passes.healing.blockwise import Chain
from rewriter.passes.healing.guided import Guided
from rewriter.passes.healing.loss import Loss
from rewriter.passes.healing.targets import Targets, states
from rewriter.passes.healing.training import Clock, Trained, train
from rewriter.progress import Progress
from rewriter.rule import Decision

HELD_OUT = 8  # every eighth batch judges
JUDGES = 24  # batches at most
TEACHING = 0.25  # of the time that the dense model may take; what it has not reached by then is not trained on
FADED = 0.5  # of the time, after which nothing of a guiding dense weight is left
LOGITS = "logits"  # outputs of this name are compared as distributions


@dataclass(frozen=True)
class Recipe:
    """How it trains; see `Heal`."""

    rate: float
    guided: bool
    weighted: bool
    average: float
    blockwise: float
    loss: Callable[[Mapping[str, Tensor], Feeds], Tensor] | None


@dataclass(frozen=True)
class _Student:
    """What trains at one site: the factors as stored in the graph, and its bias where it has one of its own."""

    decision: Decision
    operator: AbstractMatrix  # what the factors are the leaves of
    guided: Guided | None
    factors: Sequence[Tensor]
    bias: Tensor | None
    shift: Tensor | None  # at the start
    first: Tensor | None  # the bias at the start

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.factors, *([self.bias] if self.bias is not None else [])]

    def fade(self, share: float) -> None:
        """So much of the guiding dense weight, where there is one."""
        if self.guided is not None:
            self.guided.mix(share)


class Session:
    """Feeds are split into those that train and those that judge; states of the dense model lie in a folder that goes with the session.

    Raises RewriteError where there are not two batches.
    """

    def __init__(
        self, graph: Graph, lossy: Mapping[str, Decision], feeds: Sequence[Feeds], recipe: Recipe, clock: Clock, rng: torch.Generator,
        progress: Progress,
    ) -> None:  # fmt: skip
        if len(feeds) < 2:
            raise RewriteError("heal needs two batches of samples at least, one to train on and one to judge by; give more --data")
        self.graph, self.lossy, self.feeds, self.recipe, self.clock = graph, lossy, feeds, recipe, clock
        self.rng, self.progress = rng, progress
        judges = list(range(0, len(feeds), HELD_OUT))
        keep = torch.randperm(len(judges), generator=rng)[:JUDGES].tolist()
        self.validation = sorted(judges[i] for i in keep)
        self.training = [i for i in range(len(feeds)) if i % HELD_OUT]
        logits = frozenset(name for name in graph.output_names() if name == LOGITS)
        self.loss, self.judge = Loss(recipe.weighted, logits), Loss(False, logits)

    def __enter__(self) -> Self:
        self.folder = tempfile.TemporaryDirectory(prefix="rewriter-heal-")
        self.targets = Targets(Path(self.folder.name))
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()

    def healed(self) -> dict[str, Decision]:
        """The decisions, trained where that helped; the graph holds their operators afterwards, whatever happened."""
        decisions = dict(self.lossy)
        try:
            self._teach()
            students = {key: self._student(decision) for key, decision in self.lossy.items()}
            start, steps = (self._validate(), self._reconstruct(students)) if self.recipe.blockwise else (None, 0)
            came = self._train(list(students.values()), steps)
            came = replace(came, before=came.before if start is None else start, steps=came.steps + steps)
            trained = {key: _after(student) for key, student in students.items()}
            self._splice(trained)
            if came.steps:
                came = replace(came, after=self._validate())  # in the form that is kept, to its rounding
            decisions = {key: _said(trained[key] if came.better else d, came) for key, d in decisions.items()}
        finally:
            self._splice(decisions)
        return decisions

    def _splice(self, decisions: Mapping[str, Decision]) -> None:
        for d in decisions.values():
            assert d.operator is not None
            self.graph.splice(d.site, d.operator, d.shift)

    def _teach(self) -> None:
        """Run the dense model over the samples for a part of the time at most, but over one that judges and one that trains."""
        for d in self.lossy.values():
            self.graph.restore(d.site)
        blocks = cuts(self.graph, [d.site for d in self.lossy.values()])
        self.blocks, self.inside = [value for value, _ in blocks], [{site.id for site in sites} for _, sites in blocks]
        shuffled = [self.training[i] for i in torch.randperm(len(self.training), generator=self.rng)]
        order = _mixed(self.validation, shuffled)
        taught = list[int]()
        for index in self.progress.track(order, "the dense model's states", len(order)):
            if self.clock.steps is None and self.clock.progress(0) > TEACHING and len(taught) > 1:
                break
            self.targets.put(index, states(self.graph, self.blocks, self.feeds[index])[0])
            taught.append(index)
        self.validation, self.training = [i for i in taught if i % HELD_OUT == 0], [i for i in taught if i % HELD_OUT]

    def _student(self, decision: Decision) -> _Student:
        """Splice the site in the form that trains."""
        assert isinstance(decision.operator, AbstractMatrix)
        site, operator = decision.site, decision.operator.balanced()
        guided = Guided.of(operator, load_weight(self.graph, site).to(site.dtype)) if self.recipe.guided and site.weights else None
        shift = decision.shift
        if shift is None and shifted(self.graph, site):
            shift = torch.zeros(operator.shape[0], dtype=torch.float64)
        self.graph.splice(site, guided or operator, shift)
        own = self.graph.trainable(site)
        ours, whole = (sum(t.is_floating_point() for t in flatten(form)[0]) for form in (operator, guided or operator))
        for fixed in own[ours:]:
            fixed.requires_grad_(False)
        bias = own[whole].requires_grad_() if len(own) == whole + 1 else None
        return _Student(decision, operator, guided, own[:ours], bias, shift, None if bias is None else bias.detach().clone())

    def _reconstruct(self, students: Mapping[str, _Student]) -> int:
        """Train the blocks in turn, for their share of what time is left; the steps that they took."""
        folder = Path(self.folder.name) / "inputs"
        folder.mkdir()
        chain, done, taken = Chain(self.graph, self.blocks, self.feeds, self.targets, folder), self.clock.progress(0), 0
        end = done + self.recipe.blockwise * (1 - done)
        for student in students.values():
            student.fade(0.0)
        for block, inside in enumerate(self.inside):
            if self.clock.progress(taken) >= end:
                break
            clock = self.clock.part(taken, end, len(self.inside) - block)
            tensors = [t for key, s in students.items() if key in inside for t in s.tensors]
            *_, came = self.progress.track(self._block(chain, block, tensors, clock), f"block {block + 1} of {len(self.inside)}", 101)
            taken += came.steps
            if block + 1 < len(self.inside):
                chain.advance(block, [*self.validation, *self.training])
        return taken

    def _block(self, chain: Chain, block: int, tensors: Sequence[Tensor], clock: Clock) -> Iterator[Trained]:
        def validate() -> float:
            return sum(float(chain.loss(block, i, False)) for i in self.validation) / len(self.validation)

        rate, average = self.recipe.rate, self.recipe.average
        return train(tensors, lambda i: chain.loss(block, i, True), validate, self.training, clock, rate, average, self.rng, lambda p: None)

    def _train(self, students: Sequence[_Student], taken: int) -> Trained:
        def mix(share: float) -> None:
            for student in students:
                student.fade(share)

        def faded(progress: float) -> float:
            return 0.5 * (1 + math.cos(math.pi * min(progress / FADED, 1.0)))

        def validate() -> float:
            mix(0.0)
            return self._validate()

        steps = train(
            [t for s in students for t in s.tensors],
            lambda index: self._of(index, self.loss, True),
            validate,
            self.training,
            self.clock.less(taken),
            self.recipe.rate,
            self.recipe.average,
            self.rng,
            lambda progress: mix(faded(progress)),
            FADED if self.recipe.guided else 0.0,
        )
        *_, came = self.progress.track(steps, "healing", 101)
        return came

    def _validate(self) -> float:
        return sum(float(self._of(i, self.judge, False)) for i in self.validation) / len(self.validation)

    def _of(self, index: int, loss: Loss, grad: bool) -> Tensor:
        found, outputs = states(self.graph, self.blocks, self.feeds[index], grad)
        wanted = self.targets[index]
        if self.recipe.loss is None:
            return loss(found, wanted)
        blocks = {name: tensor for name, tensor in wanted.items() if not name.startswith(":")}
        return loss(found, blocks) + self.recipe.loss(outputs, self.feeds[index])


def _mixed(validation: Sequence[int], training: Sequence[int]) -> list[int]:
    """One that judges before every three that train, so that any beginning of two or more has both."""
    rest = iter(training)
    return [i for judge in validation for i in (judge, *itertools.islice(rest, 3))] + list(rest)


def _after(student: _Student) -> Decision:
    """The decision with its trained factors."""
    decision = student.decision
    leaves, spec = flatten(student.operator)
    trained = iter(student.factors)
    operator = unflatten(spec, [next(trained).detach().clone() if t.is_floating_point() else t for t in leaves])
    shift = student.shift
    if student.bias is not None and student.first is not None and shift is not None:
        shift = shift + (student.bias.detach().double() - student.first.double())
    assert isinstance(decision.operator, AbstractMatrix) and isinstance(operator, AbstractMatrix)
    return replace(decision, operator=decision.operator.unbalanced(operator), shift=shift)


def _said(decision: Decision, came: Trained) -> Decision:
    said = f"loss on held-back samples {came.before:.3g} to {came.after:.3g} in {came.steps} steps"
    verdict = f"; healed: {said}" if came.better else f"; healing did not help ({said}): left as it was"
    return replace(decision, reason=decision.reason + verdict)
