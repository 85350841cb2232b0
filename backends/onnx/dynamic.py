"""A base model with room for adapters, and each adapter as a file that ONNX Runtime takes at run time: swapped on one session, any rank.

What is written was run: without an adapter it is the base, with each one it is the base with that adapter beside its linears.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
from torch import Tensor

from rewriter import registry, sampling
from rewriter.adapters import Adapter, Reduced, attach, matched, reduced
from rewriter.backend import EmitOptions, Runner
from rewriter.backends.files.atomic import scratch_beside
from rewriter.backends.files.load import open_adapters, open_source
from rewriter.backends.files.publish import publish
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.backends.onnx.opaque import SITE, is_opaque, matrix_skeleton, spec_of
from rewriter.backends.onnx.run import Session
from rewriter.backends.onnx.slots import Slot, opened
from rewriter.backends.onnx.target import OnnxRuntimeTarget
from rewriter.backends.onnx.tensors import torch_dtype
from rewriter.errors import RewriteError
from rewriter.graph import Graph, Place, Site
from rewriter.options import Options
from rewriter.places import out_path
from rewriter.tolerances import EQUAL
from rewriter.verify import certify

SHOWN = 2  # modules whose inputs are printed


class Adapted:
    """A session with an adapter active, which lives as long."""

    def __init__(self, session: Session, path: Path) -> None:
        self.session, self.adapter, self.options = session, ort.LoraAdapter(), ort.RunOptions()  # type: ignore[attr-defined]
        self.adapter.Load(str(path))
        self.options.add_active_adapter(self.adapter)

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.session(feeds, options=self.options)


@dataclass(frozen=True)
class Written:
    """One file."""

    path: Path
    said: str  # what it holds
    error: float  # relative L2 of the worst output: how far a session is from the model with that adapter beside its linears


def write(model: Any, options: Options) -> list[Written]:
    """options.out is the base with room at each linear that one of options.adapters has something for; beside it each adapter's file.

    RewriteError where an adapter does not fit, where it cannot be swapped at run time, or where a session is off from what it stands for;
    then nothing is written.
    """
    if not options.adapters:
        raise RewriteError("there is no adapter to make room for; give --adapter DIR")
    whole = open_adapters(options.adapters)
    for adapter in whole:
        _check_kind(adapter)
    less = [reduced(adapter, options.energy) for adapter in whole] if options.energy is not None else []
    adapters = [each.adapter for each in less] or whole
    out = out_path(model, dataclasses.replace(options, target="onnxruntime"))
    names = _names(out, adapters, options.force)
    source = open_source(model, dataclasses.replace(options, adapters=()))
    base: Any = source.graph
    graph = base.clone() if isinstance(base, OnnxGraph) else OnnxGraph(base.to_onnx(options.opset))
    sites = linears(graph)
    found = [matched(sites, adapter) for adapter in adapters]
    wanted = {site.id for each in found for site in each.values()}
    biased = {m[path].id for each, m in zip(adapters, found, strict=True) for path, u in each.updates.items() if u.shift is not None}
    slots = opened(graph, [site for site in sites if site.id in wanted], biased)
    allowed = max(EQUAL[slot.dtype][0] for slot in slots)
    with scratch_beside(out) as scratch:
        held, files = scratch / out.name, [scratch / name for name in names]
        inputs = [_inputs(slots, match) for match in found]
        kept = {"adapters": json.dumps(functools.reduce(dict.__or__, inputs))}
        OnnxRuntimeTarget().emit(graph, held, EmitOptions(options.opset, False, options.token_counts, options.threads, kept))
        session = Session(str(held), options.threads)
        for adapter, match, file in zip(adapters, found, files, strict=True):
            _export(_values(slots, adapter, match), session, file)
        errors, moved = _judged(source, adapters, whole if less else [], [session, *(Adapted(session, f) for f in files)], allowed, options)
        for file in (*files, held):  # the model last
            publish(file, out.parent / file.name)
    biases = f" and {len(biased)} to zeros" if biased else ""
    many = f"{len(slots) + len(wanted)} inputs that default to rank zero{biases}"
    room = f"room for adapters at {len(wanted)} linears, {many}; without one it is the base"
    said = [room, *(f"{adapter.folder} at scale {adapter.scale:g}, {_size(adapter)}" for adapter in adapters)]
    said[1:] = [f"{text}; {_shown(each)}" for text, each in zip(said[1:], inputs, strict=True)]
    said[1:] = [text + (_less(less[i], moved[i]) if less else "") for i, text in enumerate(said[1:])]
    return [Written(out.parent / name, text, error) for name, text, error in zip([out.name, *names], said, errors, strict=True)]


def linears(graph: Graph) -> list[Site]:
    """The linear sites, structured ones too."""
    found = [site for site in registry.sites(graph) if site.kind == "linear" and site.shape is not None]
    return [*found, *_structured(graph)] if isinstance(graph, OnnxGraph) else found


def _structured(graph: OnnxGraph) -> list[Site]:
    places: dict[str, list[Place]] = {}
    shapes, dtypes = {}, {}
    for node in graph.nodes():
        if is_opaque(node) and spec_of(node)[1]:
            x, name = node.inputs[0], node.metadata_props.get(SITE, node.name or "")
            places.setdefault(name, []).append(Place((node,), x, node.outputs[0]))
            shapes[name], dtypes[name] = matrix_skeleton(spec_of(node)[0])[0].shape, torch_dtype(x.dtype if x is not None else None)
    return [
        Site(name, name, "linear", shapes[name], dtypes[name], tuple(held), reason="already structured") for name, held in places.items()
    ]


def _check_kind(adapter: Adapter) -> None:
    """What a session cannot be given between two runs."""
    updates = adapter.updates.values()
    kinds = {
        "whole tensors": bool(adapter.saved),
        "DoRA's lengths": any(u.magnitude is not None for u in updates),
    }
    if found := [kind for kind, there in kinds.items() if there]:
        raise RewriteError(
            f"--adapter {adapter.folder} holds {found[0]}, which cannot be swapped at run time; merge it instead: --passes merge-lora"
        )


def _names(out: Path, adapters: Sequence[Adapter], force: bool) -> list[str]:
    """Of the adapters' files beside OUT. RewriteError where one is there, or where OUT has the name of another format."""
    if out.suffix != ".onnx":
        raise RewriteError(f"{out}: adapters at run time are ONNX Runtime's; give -o a name that ends in .onnx")
    names: list[str] = []
    for adapter in adapters:
        stem, number = f"{out.stem}.{Path(adapter.folder).resolve().name}", 1
        while (name := f"{stem}{f'-{number}' * (number > 1)}.onnx_adapter") in names:
            number += 1
        if (path := out.parent / name).exists() and not force:
            raise RewriteError(f"{path} exists; give --force to replace it, or another -o OUT")
        names.append(name)
    return names


def _values(slots: Sequence[Slot], adapter: Adapter, match: Mapping[str, Site]) -> dict[str, Tensor]:
    """The inputs that an adapter gives. RewriteError where two of its modules are one linear of the model."""
    by_site: dict[str, str] = {}
    for path, site in match.items():
        if site.id in by_site:
            raise adapter.misfit(f"{path!r} and {by_site[site.id]!r} are both {site.name!r} of the model")
        by_site[site.id] = path
    found: dict[str, Tensor] = {}
    for slot in slots:
        if own := {site: adapter.updates[by_site[site]] for site in slot.parts if site in by_site}:
            found |= slot.filled(own)
    return found


def _export(values: Mapping[str, Tensor], session: Session, path: Path) -> None:
    """In the types that the session's inputs have: a target may widen what a model stores."""
    kinds = {i.name: i.type for i in session.session.get_overridable_initializers()}
    adapter = ort.AdapterFormat()  # type: ignore[attr-defined]
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    held = {name: ort.OrtValue.ortvalue_from_numpy(session.array(tensor, kinds[name])) for name, tensor in values.items()}  # type: ignore[attr-defined]
    adapter.set_parameters(held)
    adapter.export_adapter(str(path))  # type: ignore[arg-type]  # it says PathLike and takes text


def _size(adapter: Adapter) -> str:
    ranks = sorted({len(update.down) for update in adapter.updates.values()})
    said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{said}, {sum(update.down.numel() + update.up.numel() for update in adapter.updates.values()):,} numbers"


def _inputs(slots: Sequence[Slot], match: Mapping[str, Site]) -> dict[str, list[str]]:
    """The inputs that each module of an adapter fills: A, B and, where there is room for one, the bias."""
    of = {site: (slot.down, part.up, part.bias) for slot in slots for site, part in slot.parts.items()}
    return {path: [name for name in of[site.id] if name is not None] for path, site in match.items()}


def _shown(inputs: Mapping[str, Sequence[str]]) -> str:
    """Some of them in words."""
    some = [f"{path} in {', '.join(names)}" for path, names in inputs.items()]
    return "; ".join(some[:SHOWN]) + (f"; {len(some) - SHOWN} more are in the model's metadata" if len(some) > SHOWN else "")


def _less(found: Reduced, moved: float) -> str:
    """What --energy took."""
    ranks = f"ranks {found.ranks[0]} to {found.ranks[1]} in all"
    return f"; {ranks}, {found.lost:.2%} of its change lost, which moves the output by {moved:.2%} of itself"


def _judged(
    source: Any, adapters: Sequence[Adapter], whole: Sequence[Adapter], runs: Sequence[Runner], allowed: float, options: Options
) -> tuple[list[float], list[float]]:
    """How far the first run is from the base, and each other one from the base with its adapter beside the linears; then from `whole`."""
    samples = sampling.everything(source, options.data, options.samples, options.seed)

    def error(adapter: Adapter | None, run: Runner) -> float:
        graph = source.graph.clone()
        if adapter is not None:
            attach(graph, linears(graph), adapter)
        return certify(graph.run, run, samples).upper

    found = []
    for adapter, run in zip([None, *adapters], runs, strict=True):
        off = error(adapter, run)
        if not off <= allowed:
            what = "without an adapter" if adapter is None else f"with {adapter.folder}"
            raise RewriteError(f"{what} the session is off from the model by {off:.1e}, more than {allowed:g}; nothing was written")
        found.append(off)
    return found, [error(adapter, run) for adapter, run in zip(whole, runs[1:], strict=bool(whole))]
