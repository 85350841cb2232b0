"""A base model with room for adapters, and each adapter as a file that ONNX Runtime takes at run time: swapped on one session, any rank.

What is written was run: without an adapter it is the base, with each one it is the base with that adapter beside its linears.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

from rewriter import registry, sampling
from rewriter.adapters import Adapter, attach, matched
from rewriter.backend import EmitOptions
from rewriter.backends.files.atomic import publish, scratch_beside
from rewriter.backends.files.load import open_adapters, open_source
from rewriter.backends.files.onnx_file import load_onnx, save_onnx
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

MERGE = "merge it instead: --passes merge-lora"


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
    adapters = open_adapters(options.adapters)
    for adapter in adapters:
        _check_kind(adapter)
    out = out_path(model, dataclasses.replace(options, target="onnxruntime"))
    names = _names(out, adapters)
    for path in (out.parent / name for name in names):
        if path.exists() and not options.force:
            raise RewriteError(f"{path} exists; give --force to replace it, or another -o OUT")
    if out.suffix != ".onnx":
        raise RewriteError(f"{out}: adapters at run time are ONNX Runtime's; give -o a name that ends in .onnx")
    source = open_source(model, dataclasses.replace(options, adapters=()))
    base: Any = source.graph
    graph = base.clone() if isinstance(base, OnnxGraph) else OnnxGraph(base.to_onnx(options.opset))
    sites = linears(graph)
    found = [matched(sites, adapter) for adapter in adapters]
    wanted = {site.id for each in found for site in each.values()}
    slots = opened(graph, [site for site in sites if site.id in wanted])
    with scratch_beside(out) as scratch:
        held = scratch / out.name
        OnnxRuntimeTarget().emit(graph, held, EmitOptions(options.opset, False, options.token_counts, options.threads))
        session = Session(str(held), options.threads)
        for adapter, match, name in zip(adapters, found, names, strict=True):
            _export(_values(slots, adapter, match), session, scratch / name)
        rows = _judged(source, adapters, session, [scratch / name for name in names], options)
        save_onnx(load_onnx(held), out)
        for name in names:
            publish(scratch / name, out.parent / name)
    inputs = len(slots) + len(wanted)
    room = f"room for adapters at {len(wanted)} linears, {inputs} inputs that default to rank zero; without one it is the base"
    sizes = [f"{_ranks(a)}, {sum(u.down.numel() + u.up.numel() for u in a.updates.values()):,} numbers" for a in adapters]
    said = [room, *(f"{a.folder} at scale {a.scale:g}, {size}" for a, size in zip(adapters, sizes, strict=True))]
    return [Written(out.parent / name, text, error) for name, text, error in zip([out.name, *names], said, rows, strict=True)]


def linears(graph: Graph) -> list[Site]:
    """The linear sites, structured ones too, as the model runs them."""
    found = [site for detect in registry.detectors() for site in detect(graph) if site.kind == "linear" and site.shape is not None]
    if isinstance(graph, OnnxGraph):
        found += _structured(graph)
    order = {id(node): i for i, node in enumerate(graph.nodes())}
    return sorted(found, key=lambda site: min(order.get(id(node), -1) for place in site.places for node in place.nodes))


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
        "biases": any(u.shift is not None for u in updates),
    }
    if found := [kind for kind, there in kinds.items() if there]:
        raise RewriteError(f"--adapter {adapter.folder} holds {found[0]}, which cannot be swapped at run time; {MERGE}")


def _names(out: Path, adapters: Sequence[Adapter]) -> list[str]:
    names: list[str] = []
    for adapter in adapters:
        stem, number = f"{out.stem}.{Path(adapter.folder).resolve().name}", 1
        while (name := f"{stem}{f'-{number}' * (number > 1)}.onnx_adapter") in names:
            number += 1
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


def _ranks(adapter: Adapter) -> str:
    ranks = sorted({len(update.down) for update in adapter.updates.values()})
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def running(session: Session, path: Path) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The session with an adapter active."""
    held, options = ort.LoraAdapter(), ort.RunOptions()  # type: ignore[attr-defined]
    held.Load(str(path))
    options.add_active_adapter(held)

    def run(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arrays = session.session.run(None, session.arrays(feeds), options)
        return {name: torch.from_numpy(array) for name, array in zip(session.output_names, arrays, strict=True)}

    run.held = held  # type: ignore[attr-defined]  # the options do not keep it
    return run


def _judged(source: Any, adapters: Sequence[Adapter], session: Session, files: Sequence[Path], options: Options) -> list[float]:
    """Of the base without an adapter, then with each."""
    samples = sampling.everything(source, options.data, options.samples, options.seed)
    found = []
    runs: list[tuple[str, Graph, Any]] = [("without an adapter", source.graph, session)]
    for adapter, path in zip(adapters, files, strict=True):
        beside = source.graph.clone()
        attach(beside, linears(beside), adapter)
        runs.append((f"with {adapter.folder}", beside, running(session, path)))
    for what, graph, run in runs:
        error = certify(graph.run, run, samples).upper
        allowed = max(EQUAL[torch.float32][0], *(EQUAL[t][0] for t in _dtypes(source.graph)))
        if not error <= allowed:
            raise RewriteError(f"{what} the session is off from the model by {error:.1e}, more than {allowed:g}; nothing was written")
        found.append(error)
    return found


def _dtypes(graph: Graph) -> list[torch.dtype]:
    return [d for d in {site.dtype for site in linears(graph)} if d in EQUAL] or [torch.float32]
