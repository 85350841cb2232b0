"""Anything a user hands over becomes a Source: a graph, its inputs, and how text becomes samples. Files are recognised by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rewriter.adapters import Adapter
from rewriter.backends.files.lengths import narrow
from rewriter.backends.files.sniff import Kind, recognise
from rewriter.errors import RewriteError
from rewriter.graph import Graph
from rewriter.inputs import InputSpec, fill_sizes, parse_dims, parse_input
from rewriter.options import Options

if TYPE_CHECKING:
    from rewriter.backends.fx.graph import FxGraph

AS_TRACED = "use it at such sizes alone, or trace it at another with --dim"
AGAIN = "give the model's folder or module, whose known recurrences are raised before they are traced"


@dataclass(frozen=True)
class Source:
    """A model as read, whatever it was stored as."""

    graph: Graph
    format: str  # pt2 | onnx | module | state-dict | safetensors | folder
    path: str | None
    sha256: str | None
    specs: Sequence[InputSpec]
    sizes: Mapping[str, int]  # of the dynamic dimensions, for examples and timing
    encode: Callable[[list[str]], Mapping[str, Tensor]] | None = None  # text -> feeds
    notes: tuple[str, ...] = field(default=())
    placed: tuple[Mapping[str, Any], ...] = ()  # the adapters that the graph has and its file has not, as the report says them


def open_source(model: Any, options: Options) -> Source:
    """Read a path, or take a Module, ExportedProgram, GraphModule or onnx_ir.Model as it is; RewriteError in one line where that fails."""
    if isinstance(model, str | Path):
        return _open_path(Path(model), options)
    if isinstance(model, torch.export.ExportedProgram):
        return _program(model, "pt2", None, options)
    if isinstance(model, torch.nn.Module):
        return _module(model, "module", None, options)
    if type(model).__module__.startswith("onnx_ir"):
        return _onnx(model, None, options)
    raise RewriteError(
        f"cannot rewrite a {type(model).__name__}; give a path, an nn.Module, an ExportedProgram, a GraphModule or an onnx_ir.Model"
    )


def _open_path(path: Path, options: Options) -> Source:
    kind = recognise(path)
    _check_flags(path, kind, options)
    if kind is Kind.FOLDER:
        return _folder(path, options)
    if kind is Kind.PT2:
        from rewriter.backends.files.pt2 import load_pt2

        return _program(load_pt2(path), "pt2", path, options)
    if kind is Kind.ONNX:
        from rewriter.backends.files.onnx_file import load_onnx

        return _onnx(load_onnx(path), path, options)
    if kind is Kind.SAFETENSORS:
        from rewriter.backends.files.arch import load_safetensors

        return _state(load_safetensors(path), "safetensors", path, options)
    from rewriter.backends.files.torch_zip import load_torch

    loaded = load_torch(path, options.trust_pickle)
    if isinstance(loaded, torch.nn.Module):
        return _module(loaded.eval(), "module", path, options)
    return _state(loaded, "state-dict", path, options)


def _check_flags(path: Path, kind: Kind, options: Options) -> None:
    """An option that this kind of model has no use for is refused, not forgotten."""
    if kind is Kind.FOLDER:
        if options.inputs:
            raise RewriteError(f"--input {options.inputs[0]}: {path} is a Hugging Face folder, which knows its inputs; leave --input out")
        if options.arch:
            raise RewriteError(f"--arch is for state dicts, {path} is a Hugging Face folder; leave it out, or choose a head with --task")
        return
    if options.task:
        raise RewriteError(f"--task needs a Hugging Face folder, {path} is a file; leave it out, or give the folder")
    if options.arch and kind in (Kind.PT2, Kind.ONNX):
        raise RewriteError(f"--arch is for state dicts, {path} holds a whole model; leave it out")


def _state(state: dict[str, Tensor], kind: str, path: Path, options: Options) -> Source:
    from rewriter.backends.files.arch import build

    if options.arch is None:
        raise RewriteError(
            f"{path} holds weights without a model ({len(state)} tensors); give --arch MODULE:FACTORY, a function that builds the module"
        )
    return _module(build(options.arch, state), kind, path, options)


def _module(module: torch.nn.Module, kind: str, path: Path | None, options: Options) -> Source:
    from rewriter.backends.files.export import export_module

    specs = [parse_input(text) for text in options.inputs]
    if not specs:
        raise RewriteError(
            "a module does not say what it takes; give each input as --input NAME:DTYPE[DIM,...], for example --input ids:int64[batch,seq]"
        )
    given = parse_dims(options.dims) if options.dims else {}
    sizes = fill_sizes(specs, given)
    notes: list[str] = []
    program = export_module(module, specs, given, notes)
    notes += narrow(program, specs, AS_TRACED)
    return replace(_source(_fx(program, specs), kind, path, specs, sizes), notes=tuple(notes))


def _program(program: torch.export.ExportedProgram, kind: str, path: Path | None, options: Options) -> Source:
    graph = _fx(program)
    source = _known(graph, kind, path, options)
    graph.call_sizes(source.specs)
    return replace(source, notes=(*source.notes, *narrow(program, source.graph.specs(), AGAIN)))


def _onnx(model: Any, path: Path | None, options: Options) -> Source:
    from rewriter.backends.onnx.graph import OnnxGraph

    source = _known(OnnxGraph(model), "onnx", path, options)
    room = [v for v in model.graph.inputs if v.is_initializer() and v.const_value is not None and not v.const_value.size]
    lost = f"room for adapters is lost: {len(room)} inputs are taken at their defaults; make it again with `rewrite adapters`"
    return replace(source, notes=(*source.notes, lost)) if room else source


def _fx(program: torch.export.ExportedProgram, specs: Sequence[InputSpec] = ()) -> FxGraph:
    """Its sizes are called as in `specs`, where there are any."""
    from rewriter.backends.fx.graph import FxGraph

    graph = FxGraph.of(program)
    if specs:
        graph.call_sizes(specs)
    return graph


def _known(graph: Graph, kind: str, path: Path | None, options: Options) -> Source:
    """A format that knows its inputs; --input may only rename its dimensions."""
    specs = graph.specs()
    if options.inputs:
        given = {s.name: s for s in map(parse_input, options.inputs)}
        unknown = [name for name in given if name not in {s.name for s in specs}]
        if unknown:
            raise RewriteError(f"--input {unknown[0]}: the model has no such input; it takes {', '.join(map(str, specs))}")
        for spec in specs:
            if spec.name in given and not _renames(spec, given[spec.name]):
                raise RewriteError(f"--input {given[spec.name]}: the model takes {spec}; here --input may only rename dynamic dimensions")
        specs = [given.get(s.name, s) for s in specs]
    sizes = fill_sizes(specs, parse_dims(options.dims) if options.dims else {})
    return _source(graph, kind, path, specs, sizes)


def _renames(own: InputSpec, given: InputSpec) -> bool:
    """Whether two specifications differ in the names of dynamic dimensions alone."""
    fixed = [[dim if isinstance(dim, int) else None for dim in spec.dims] for spec in (own, given)]
    return own.dtype == given.dtype and fixed[0] == fixed[1]


def _folder(path: Path, options: Options) -> Source:
    from rewriter.backends.files.folder import export_folder, load_folder

    model = load_folder(path, options.task)
    given = parse_dims(options.dims) if options.dims else {}
    program = export_folder(model, given)
    sizes = fill_sizes(model.specs, given)
    encode = model.encode if model.tokenizer is not None else None
    notes = (model.describe, *model.notes, *narrow(program, model.specs, AS_TRACED))
    return replace(_source(_fx(program, model.specs), "folder", path, model.specs, sizes, encode), notes=notes)


def open_adapters(texts: Sequence[str]) -> list[Adapter]:
    """Each DIR or DIR=SCALE, read."""
    from rewriter.backends.files.folder import check_links
    from rewriter.backends.files.peft import load_adapter

    found = []
    for text in texts:
        path, equals, scale = text.rpartition("=")
        try:
            folder, strength = (Path(path), float(scale)) if equals else (Path(text), 1.0)
        except ValueError:
            raise RewriteError(f"--adapter {text} cannot be read; give DIR or DIR=SCALE with a number") from None
        check_links(folder)
        found.append(load_adapter(folder, strength))
    return found


def _source(graph: Graph, kind: str, path: Path | None, specs: Sequence[InputSpec], sizes: Mapping[str, int], encode: Any = None) -> Source:
    return Source(graph, kind, str(path) if path else None, file_hash(path) if path else None, specs, sizes, encode)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files with their names, in order."""
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        total.update(file.name.encode() if len(files) > 1 else b"")
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()
