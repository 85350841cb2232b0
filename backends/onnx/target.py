"""The ONNX targets: `onnx` is portable, `onnxruntime` may use com.microsoft operators.

Both write standard bodies in model-local functions; a registered kernel of the same name replaces a body without a change to the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.backend import EmitOptions, Layer, Runner, Whole
from rewriter.backends.files.onnx_file import load_onnx, save_onnx
from rewriter.backends.kernels.session import open_covered, trusted
from rewriter.backends.onnx.emit import finish
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.backends.onnx.int8 import open_int8
from rewriter.backends.onnx.layout import Conditions, layouts
from rewriter.backends.onnx.lowering import chooser
from rewriter.backends.onnx.measure import measure, measure_layers
from rewriter.backends.onnx.opaque import DOMAIN
from rewriter.backends.onnx.run import CPU, Session, check_provider, loadable
from rewriter.backends.onnx.stretch import layers
from rewriter.backends.onnx.widen import needs_widening, widen
from rewriter.errors import RewriteError
from rewriter.graph import Graph, Site
from rewriter.operator import AbstractOperator

PORTABLE = {"", "ai.onnx", "ai.onnx.ml", DOMAIN}


class OnnxTarget:
    """See rewriter.backend.Target. Standard operators only: what this package adds never needs another domain's."""

    name = "onnx"
    suffix = ".onnx"
    accepts = ("onnx", "torch")
    contrib = False  # whether com.microsoft operators may be used

    def __init__(self, provider: str = CPU, kernels: bool = False) -> None:
        """`kernels`: what is timed and opened runs as under rewriter.inference_session; RewriteError where there are none."""
        check_provider(provider)
        self.provider, self.kernels = provider, kernels
        self.timed_as = f"{self.name} on {provider}{f' with kernels {trusted().path.stem}' if kernels else ''}"

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def emit(self, graph: Graph, path: Path, options: EmitOptions) -> list[str]:
        model = source_model(graph, options)
        self.prepare(model)
        opset = max(options.opset, model.graph.opset_imports[""])
        choose = chooser(options.tokens, options.threads, self.contrib, opset)
        notes: list[str] = []

        def together(model: ir.Model) -> dict[ir.Node, str]:
            chosen, said = layouts(model, Conditions(tuple(options.tokens), options.threads, opset, self.contrib))
            notes.extend(said)
            return chosen

        save_onnx(finish(model, options.opset, options.flatten, choose, options.provenance, together), path)
        return notes

    def prepare(self, model: ir.Model) -> None:
        """Make the model one that this target runs; here: refuse what is not portable."""
        own = {identifier[0] for identifier in model.functions}
        for node in model.graph.all_nodes():
            if node.domain not in PORTABLE | own:
                name = f"{node.domain}.{node.op_type}"
                raise RewriteError(f"--target onnx is portable and the model itself uses {name}; give --target onnxruntime")

    def open(self, path: Path, threads: int) -> Runner:
        if self.kernels:
            return open_covered(path, threads, self.provider)
        model = load_onnx(path)  # what the file says about itself and its data is checked before ONNX Runtime reads it
        if not needs_widening(model):
            return Session(str(path), threads, provider=self.provider)
        widen(model)
        with loadable(model) as source:
            return Session(source, threads, provider=self.provider)

    def open_int8(self, path: Path, threads: int) -> Runner:
        return open_int8(path, threads)

    def measure(self, forms: Sequence[AbstractOperator], tokens: int, threads: int) -> list[float]:
        return measure(forms, tokens, threads, self.provider, self.contrib, self.kernels)

    def layers(self, graph: Graph, sites: Sequence[Site], feeds: Mapping[str, Tensor]) -> Counter[Layer]:
        """Layers with their endings, attention and other maps, see backends/onnx/stretch.py."""
        if not isinstance(graph, OnnxGraph):
            raise RewriteError(f"a {graph.format} graph has no ONNX layers; emit it first")
        return layers(graph, sites, feeds)

    def measure_layers(self, layers: Sequence[Layer], whole: Whole, threads: int) -> list[float]:
        return measure_layers(layers, whole, threads, self.provider, self.kernels)


class OnnxRuntimeTarget(OnnxTarget):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    contrib = True

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if dtype == torch.bfloat16 else dtype

    def prepare(self, model: ir.Model) -> None:
        """Its CPU has no bfloat16 product; every domain that it knows is welcome."""
        if needs_widening(model):
            widen(model)


def source_model(graph: Graph, options: EmitOptions) -> ir.Model:
    """The graph with its sites as opaque nodes and nothing unused, free to be edited."""
    if isinstance(graph, OnnxGraph):
        copy = graph.clone()
        copy.prune()
        return copy.model
    convert = getattr(graph, "to_onnx", None)
    if convert is None:
        raise RewriteError(f"a {graph.format} graph cannot be written as ONNX")
    model = convert(options.opset)
    assert isinstance(model, ir.Model)
    return model
