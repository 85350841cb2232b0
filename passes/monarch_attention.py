"""`monarch-attention`: softmax attention as P = L R over blocks of tokens, at the layers where it is near enough and faster; no training.

The error of a layer is that of its output, relative L2 over the real tokens of the calibration samples, each layer on what the dense model
hands it. What the method cannot say is refused: a causal or windowed mask (R is shared by queries far apart), keys that are not the
queries' own tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.calibrate import padding_mask, unpadded
from rewriter.errors import RewriteError
from rewriter.graph import Graph, Port, Site, Value
from rewriter.inputs import dim_names
from rewriter.passes.fuse_attention import per_token
from rewriter.passes.structures.attention import Attention
from rewriter.passes.structures.monarch_attention import MonarchAttention
from rewriter.registry import eager_ops
from rewriter.rule import AbstractPass, Context, Decision, against_dense

LOW = -1e3  # a score that hides its key


@dataclass(frozen=True)
class MonarchAttentionPass(AbstractPass):
    """block: tokens in one, by default the root of the largest asked token count, where the cost is least; iterations: of the
    alternation, 2 being near its limit; error: the largest relative error that a layer's output may have."""

    name: ClassVar[str] = "monarch-attention"
    summary: ClassVar[str] = "self-attention without a causal mask as a product over blocks of tokens, where it is near enough and faster"
    block: int | None = None
    iterations: int = 2
    error: float = 0.1

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        if not self.error > 0:
            raise RewriteError(f"{self.name}:error={self.error} is out of range; give a relative error above 0, such as 0.1")
        trials = []
        for site in context.selected:
            if site.kind != "attention":
                continue
            found = self._candidate(graph, context, site)
            if isinstance(found, Decision):
                yield found
            else:
                trials.append(found)
        if trials:
            _compare(graph, context, trials)
        decided = [self._judged(context, trial) for trial in trials]
        for decision in decided:  # after the last comparison, so that all saw the model as it was given
            if decision.operator is not None:
                graph.splice(decision.site, decision.operator)
        yield from decided

    def _candidate(self, graph: Graph, context: Context, site: Site) -> Trial | Decision:
        earlier = context.decisions.get(site.id)
        if earlier is not None and earlier.rewritten:
            return earlier
        lengths = _lengths(graph, site) or context.tokens
        found = _refusal(graph, context, site) or _unmasked(graph, site, max(lengths))
        if isinstance(found, Site) and not all(graph.can_tap(port.value) for port in found.region.inputs):  # type: ignore[union-attr]
            found = "its inputs cannot be seen from outside: nothing is known of its error"
        if isinstance(found, str):
            return Decision(site, found)
        site, dense = found, found.form
        assert isinstance(dense, Attention)
        mask = tuple("time" if n == "keys" else n for n in dense.mask)
        sizes = (dense.heads, dense.shared, dense.key, dense.width, dense.scale)
        block = self.block or max(1, round(max(lengths) ** 0.5))
        return Trial(site, lengths, dense, MonarchAttention(*sizes, block, self.iterations, mask, dense.boolean))

    def _judged(self, context: Context, trial: Trial) -> Decision:
        """By error, then by time."""
        block, asked, site = trial.form.block, max(trial.lengths), trial.site
        before, after = per_token(trial.dense, asked), per_token(trial.form, asked)
        kept = Decision(site, "", before, before)
        if trial.others:
            return kept.kept("its keys are not the queries' own tokens: cross attention or a cache")
        if trial.longest <= block:
            return kept.kept(
                f"the samples have up to {trial.longest} tokens, which blocks of {block} do exactly: give --data of about {asked} tokens"
            )
        seen = f"relative error {trial.error:.3g} on {trial.count} samples of up to {trial.longest} tokens"
        if not trial.error <= self.error:
            return kept.kept(f"{seen} with blocks of {block}, more than error={self.error}")
        table = [context.target.measure([trial.dense, trial.form], length, context.threads) for length in trial.lengths]
        figures = against_dense(trial.lengths, [(d, f) for d, f in table])
        if context.objective != "ms":
            figures += f" (attention stores no {context.objective}: time decides)"
        if sum(f - d for d, f in table) >= 0:
            return kept.kept(f"{seen}, but it is not faster: {figures}")
        spelling = f"{self.name}:block={block}:iterations={self.iterations}"
        return Decision(site, f"{seen}; {figures}", before, after, trial.form, spelling, False, trial.error)


@dataclass
class Trial:
    """A layer and what may stand there; the sums grow with the samples."""

    site: Site
    lengths: tuple[int, ...]  # that time is measured at
    dense: Attention
    form: MonarchAttention
    difference: float = 0.0  # squared, summed
    energy: float = 0.0
    longest: int = 0
    count: int = 0
    others: bool = False  # there were more or fewer keys than queries
    waiting: dict[int, Tensor] = field(default_factory=dict)  # this batch's inputs, until all are there

    @property
    def error(self) -> float:
        return math.sqrt(self.difference / max(self.energy, 1e-300))

    def take(self, which: int, value: Tensor, real: Tensor | None) -> None:
        """One tapped input; the last of a batch sets off the comparison."""
        assert self.site.region is not None
        self.waiting[which] = taken(value, self.site.region.inputs[which])
        if len(self.waiting) == len(self.site.region.inputs):
            given = [self.waiting[i] for i in range(len(self.waiting))]
            self.waiting.clear()
            if given[0].shape[2] != given[1].shape[2]:
                self.others = True
                return
            for row in range(len(given[0])):  # one at a time: scores of a whole batch are large
                alone = [x[row : row + 1] if len(x) > 1 else x for x in given]
                self._add(alone, None if real is None else real[row : row + 1])

    def _add(self, given: Sequence[Tensor], real: Tensor | None) -> None:
        wide = [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in given]
        ops = eager_ops()
        (exact,), (near,) = self.dense.spelled(self.dense.forms()[0], ops, *wide), self.form.apply(ops, *wide)
        exact, near = (unpadded(x.transpose(1, 2), real).double() for x in (exact, near))
        self.difference += float((near - exact).square().sum())
        self.energy += float(exact.square().sum())
        self.longest = max(self.longest, given[0].shape[2] if real is None else int(real.sum()))
        self.count += 1


def _compare(graph: Graph, context: Context, trials: Sequence[Trial]) -> None:
    """Run the samples through the model as it stands, every trial seeing its own layer's inputs."""
    samples = context.calibration.samples
    assert samples is not None
    readers: dict[Value, list[tuple[Trial, int]]] = {}
    for trial in trials:
        assert trial.site.region is not None
        for i, port in enumerate(trial.site.region.inputs):
            readers.setdefault(port.value, []).append((trial, i))
    real: list[Tensor | None] = [None]

    def tap(mine: list[tuple[Trial, int]]) -> Callable[[Tensor], None]:
        def update(value: Tensor) -> None:
            for trial, i in mine:
                trial.take(i, value, real[0])

        return update

    taps = {value: tap(mine) for value, mine in readers.items()}
    for batch in context.progress.track(samples.batches, "comparing attention", len(samples.batches)):
        real[0] = padding_mask(batch)
        with torch.no_grad():
            graph.run(batch, taps)


def _refusal(graph: Graph, context: Context, site: Site) -> str:
    """ "" where the method can say what the layer computes and its inputs can be seen."""
    dense, region = site.form, site.region
    if site.operator is not None:
        return f"already structured: {type(site.operator).__name__}"
    if region is None or not isinstance(dense, Attention):
        return site.reason or "not read as softmax attention"
    if dense.causal:
        return "causal: blocks share their weights among queries before and after a key, and decoding has one query"
    query, keys = (_axes(graph, port) for port in region.inputs[:2])
    if query is None or keys is None:
        return "the length of its keys is unknown"
    if query[-2] != keys[-2] and not _lone_length(graph, (query[-2], keys[-2])):
        return f"its {keys[-2]} keys are not the {query[-2]} queries' own tokens: cross attention or a cache"
    if dense.bias or (dense.boolean and dense.hidden > LOW):
        return "besides hiding keys something is added to its scores"
    if place := graph.can_splice(region):
        return place
    if context.calibration.samples is None:
        return "no samples reach it: nothing is known of its error"
    return ""


def _lengths(graph: Graph, site: Site) -> tuple[int, ...]:
    """The length that a model has once and for all, such as an image's patches; () where it varies."""
    axes = _axes(graph, site.region.inputs[0]) if site.region else None
    return (axes[-2],) if axes and isinstance(axes[-2], int) else ()


def _lone_length(graph: Graph, sizes: Sequence[int | str]) -> bool:
    """Whether sizes of different names may be one all the same: one has no name of the inputs', and they bring only one length. The
    samples then tell."""
    specs = graph.specs()
    batch = {spec.dims[0] for spec in specs if spec.dims}
    names = [n for n in dim_names(specs) if n not in batch]
    return len(names) <= 1 and any(isinstance(n, str) and n not in names for n in sizes)


def _unmasked(graph: Graph, site: Site, tokens: int) -> Site | str:
    """The site, without its mask where that hides nothing; else why a mask with a row for each query may not have one for all.

    It is computed for `tokens` tokens, some of which are hidden.
    """
    dense, region = site.form, site.region
    assert isinstance(dense, Attention) and region is not None
    if not dense.mask or (dense.mask[2] == 1 and dense.mask[3] != 1):
        return site
    mask = region.inputs[3]
    try:
        (found,) = graph.compute([mask.value], _shown(graph, mask.value, tokens))
    except RewriteError as error:
        return f"its mask may differ from query to query: {error}"
    rows = taken(found, mask)
    if bool(rows.all() if dense.boolean else not rows.any()) and (dense.mask[3] == 1 or graph.is_const(mask.value)):
        whole = replace(dense, mask=(), boolean=False, empty="")
        return replace(site, form=whole, region=replace(region, inputs=region.inputs[:3]))
    if dense.mask[3] == 1:
        return "its mask hides whole queries and no keys"
    same = bool((rows == rows[:, :, :1]).all())
    return site if same else f"its mask differs from query to query at {tokens} tokens: causal, windowed or relative positions"


def _shown(graph: Graph, mask: Value, tokens: int) -> dict[Value, Tensor]:
    """Values for the inputs of the model that a mask is made of: ones at the first two thirds of the tokens, zeros behind."""
    given: dict[Value, Tensor] = {}
    stack, seen = [mask], set[Value]()
    while stack:
        value = stack.pop()
        if value is None or value in seen or graph.is_const(value):
            continue
        seen.add(value)
        node = graph.producer(value)
        operands = [] if node is None else graph.inputs(node)
        stack.extend(operands)
        if not operands and graph.shape(value):
            shape = [n if isinstance(n, int) else 2 if i == 0 else tokens for i, n in enumerate(graph.shape(value) or ())]
            ones = torch.arange(shape[-1]) < shape[-1] * 2 // 3
            given[value] = ones.to(graph.dtype(value) or torch.int64).expand(shape).contiguous()
    return given


def taken(value: Tensor, port: Port) -> Tensor:
    """A tapped value as the map takes it."""
    layout = port.layout
    value = ~value if port.negated else value
    value = value.permute(layout.before) if layout.before else value
    value = value.unsqueeze(-1) if layout.join == 0 else value
    value = value.flatten(-layout.join) if layout.join > 1 else value
    value = value.unflatten(-1, layout.spread) if layout.spread else value
    value = value.permute(layout.after) if layout.after else value
    return value.unsqueeze(0) if port.lone else value


def _axes(graph: Graph, port: Port) -> list[int | str] | None:
    """The sizes of a port's four axes; None where one is unknown."""
    shape, layout = graph.shape(port.value), port.layout
    if shape is None:
        return None
    axes = [shape[i] for i in layout.before] if layout.before else list(shape)
    if layout.join == 0:
        axes.append(1)
    if layout.join > 1:
        axes[-layout.join :] = ["joined"]
    axes = [*axes[:-1], *(layout.spread or axes[-1:])]
    axes = [axes[i] for i in layout.after] if layout.after else axes
    return [1, *axes] if port.lone else axes
