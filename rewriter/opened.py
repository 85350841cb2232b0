"""What commands begin with: the model that was named, the target that was asked for, and the model as a file of that target."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewriter import registry
from rewriter.adapters import Adapter, attach
from rewriter.backend import EmitOptions, Target
from rewriter.errors import RewriteError
from rewriter.options import Options


def open_model(model: Any, options: Options) -> Any:
    """A source: its graph, specs, path and format, the adapters that were asked for beside it; RewriteError for what is none."""
    load = importlib.import_module("rewriter.backends.files.load")
    source = load.open_source(model, options)
    if not options.adapters:
        return source
    adapters, graph, notes, placed = load.open_adapters(options.adapters), source.graph.clone(), [], []
    for adapter in adapters:
        manifest = attach(graph, registry.sites(graph), adapter)
        notes.append(f"adapter {adapter.folder} on {len(adapter.updates)} linears at scale {adapter.scale:g}" + _whole(adapter, manifest))
        placed.append({"folder": adapter.folder, "scale": adapter.scale, "placed": manifest})
    return dataclasses.replace(source, graph=graph, notes=(*source.notes, *notes), placed=tuple(placed))


def _whole(adapter: Adapter, manifest: Mapping[str, str]) -> str:
    """The tensors that it replaces."""
    names = [manifest[name] for name in adapter.saved]
    return f", in place of {', '.join(names[:8])}{' …' * (len(names) > 8)}" if names else ""


def as_file(source: Any, target: Target, path: Path, options: Options) -> Path:
    """The model as a file that the target opens: the user's own where it is one."""
    if source.path and not source.placed and Path(source.path).is_file() and source.graph.format == "onnx" and target.suffix == ".onnx":
        return Path(source.path)
    target.emit(source.graph, path, EmitOptions(options.opset, False, options.token_counts, options.threads))
    return path


def target_of(options: Options, source: Any, out: str | None) -> Target:
    """--target, else OUT's suffix, else the input's format; RewriteError for what cannot be emitted from this input."""
    name = options.target
    if name is None:
        suffix = Path(out).suffix if out else ""
        name = {".onnx": "onnxruntime", ".pt2": "torch"}.get(suffix) or ("onnxruntime" if source.graph.format == "onnx" else "torch")
    if name not in registry.targets():
        raise RewriteError(f"--target {name} is unknown; give one of {', '.join(registry.targets())}")
    if options.kernels and name != "onnxruntime":
        raise RewriteError(f"--kernels is for --target onnxruntime, not {name}; leave it out, or give that target")
    target: Target = registry.targets()[name](options.provider, options.kernels)
    if source.graph.format not in target.accepts:
        raise RewriteError(f"--target {name} needs a torch model, this one is ONNX; give --target onnxruntime or onnx")
    return target
