"""Calibration: the second moments of each site's input, from samples pushed through the model, streamed.

Sites are taken in groups whose moments fit in a share of the model's own size, or in LEAST where that is more; each group costs one pass
over the samples. Sites that read the same value share moments. Padding never counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.graph import Graph, Layout, Site, Value
from rewriter.moments import Accumulator, Moments, layer_norm
from rewriter.progress import Progress

SHARE = 0.25  # of the model's bytes, for the moments of one group;
MASK = "attention_mask"  # the input that says which positions are real
LEAST = 135_000_000  # bytes of a group, however small the model: a group costs a run over all samples
Feeds = Mapping[str, Tensor]


@dataclass
class Samples:
    """Batches of feeds, their law in words, and a hash of what they hold."""

    batches: Sequence[Feeds]
    law: str
    key: str
    invented: bool = False

    @property
    def count(self) -> int:
        return sum(rows(batch) for batch in self.batches)


def rows(feeds: Feeds) -> int:
    """Samples in a batch: the first axis of its inputs."""
    return max((len(t) for t in feeds.values() if t.dim()), default=0)


def padding_mask(feeds: Feeds) -> Tensor | None:
    """(batch, seq) bool of real positions, where the model takes an attention mask that hides some."""
    mask = feeds.get(MASK)
    if mask is None or mask.dim() != 2 or bool((mask != 0).all()):
        return None
    return mask != 0


def unpadded(value: Tensor, mask: Tensor | None) -> Tensor:
    """The real rows of (batch, seq, …) or (batch * seq, n); everything where the value has no such axes."""
    if mask is not None and value.dim() == 2 and len(value) == mask.numel():
        return value[mask.flatten()]
    if mask is None or value.dim() < 3 or value.shape[:2] != mask.shape:
        return value
    return value[mask]


@dataclass
class Calibration:
    """Moments on demand, for the graph as it stands: a second pass sees what the first one left."""

    graph: Graph
    samples: Samples | None
    progress: Progress = field(default_factory=Progress)

    @property
    def key(self) -> str:
        return self.samples.key if self.samples else "none"

    def moments(self, sites: Sequence[Site]) -> Iterator[list[tuple[Site, Moments | None]]]:
        """The sites in order, in groups, with their inputs' moments (None: the input is unknown); use a group up before the next."""
        for group in self._groups(sites):
            found = self._accumulate(group)
            held = [(site, found.get(source(site))) for site in group]
            found.clear()
            yield held
            held.clear()

    def _groups(self, sites: Sequence[Site]) -> Iterator[list[Site]]:
        limit, group, used, seen = max(SHARE * self.graph.nbytes(), LEAST), list[Site](), 0, set[object]()
        for site in sites:
            assert site.shape is not None
            nbytes = 0 if source(site) in seen else 8 * site.shape[1] ** 2
            if group and nbytes and used + nbytes > limit:
                yield group
                group, used, seen = [], 0, set()
                nbytes = 8 * site.shape[1] ** 2
            group.append(site)
            seen.add(source(site))
            used += nbytes
        if group:
            yield group

    def _accumulate(self, group: Sequence[Site]) -> dict[object, Moments]:
        formulas = {source(s): m for s in group if (m := norm_moments(self.graph, s)) is not None}
        if self.samples is None:
            return formulas
        accumulators: dict[object, Accumulator] = {}
        taps: dict[Value, list[Callable[[Tensor, Tensor | None], None]]] = {}
        for site in group:
            if source(site) not in accumulators and all(self.graph.can_tap(p.x) for p in site.places):
                assert site.shape is not None
                accumulator = accumulators[source(site)] = Accumulator(site.shape[1])
                for place in site.places:
                    taps.setdefault(place.x, []).append(_feeder(accumulator, place.layout))
        if taps:
            self._run(taps)
        seen = {key: a.moments(self.samples.law) for key in list(accumulators) if (a := accumulators.pop(key)).count}
        return {**formulas, **seen, **(formulas if self.samples.invented and self._floats() else {})}

    def _floats(self) -> bool:
        """Invented floats are isotropic, which says nothing of a layer deep inside: there the LayerNorm's affine knows more."""
        assert self.samples is not None
        return all(t.is_floating_point() for name, t in self.samples.batches[0].items() if name != MASK)

    def _run(self, taps: Mapping[Value, list[Callable[[Tensor, Tensor | None], None]]]) -> None:
        assert self.samples is not None
        mask: list[Tensor | None] = [None]

        def tap(name: str, feeders: list[Callable[[Tensor, Tensor | None], None]]) -> Callable[[Tensor], None]:
            def update(x: Tensor) -> None:
                if not bool(torch.isfinite(x).all()):
                    raise RewriteError(
                        f"calibration met NaN or inf in '{name}'; check the samples and the weights before it, or give the model in float32"
                    )
                for feeder in feeders:
                    feeder(x, mask[0])

            return update

        callbacks = {value: tap(self.graph.name(value), feeders) for value, feeders in taps.items()}
        for batch in self.progress.track(self.samples.batches, "calibrating", len(self.samples.batches)):
            mask[0] = padding_mask(batch)
            self.graph.run(batch, callbacks)


def source(site: Site) -> object:
    """What decides a site's moments: the values it reads and how the features lie in them."""
    return tuple((id(p.x), p.layout.before, p.layout.join) for p in site.places), site.shape and site.shape[1]


def site_rows(x: Tensor, layout: Layout, mask: Tensor | None) -> Tensor:
    """(..., n): what a site multiplies of the value that it reads, real positions only."""
    ordered = x.permute(layout.before) if layout.before else x
    return unpadded(ordered.flatten(-layout.join), mask)


def _feeder(accumulator: Accumulator, layout: Layout) -> Callable[[Tensor, Tensor | None], None]:
    def feed(x: Tensor, mask: Tensor | None) -> None:
        accumulator.update(site_rows(x, layout, mask))

    return feed


def norm_moments(graph: Graph, site: Site) -> Moments | None:
    """The moments that the affine of a LayerNorm or RMSNorm right before the site implies, where there is one."""
    if any(p.layout.before or p.layout.join > 1 for p in site.places):
        return None
    node = graph.producer(site.places[0].x)
    while node is not None and graph.op(node) in ("identity", "cast", "reshape"):
        first = graph.inputs(node)[0]
        node = graph.producer(first) if first is not None else None
    if node is None or graph.op(node) not in ("layer_norm", "rms_norm"):
        return None
    gamma, beta = ([v for v in graph.inputs(node)[1:3]] + [None, None])[:2]
    if gamma is None or not graph.is_const(gamma) or (beta is not None and not graph.is_const(beta)):
        return None
    scale, offset = graph.const(gamma), graph.const(beta) if beta is not None else None
    assert scale is not None
    if site.shape is None or scale.shape != (site.shape[1],):
        return None
    return layer_norm(scale, offset, rms=graph.op(node) == "rms_norm")
