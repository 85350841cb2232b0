"""The torch target: a `.pt2` in plain aten that loads without this package."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from rewriter.backend import EmitOptions, Layer, Runner, Whole
from rewriter.backends.eager import EagerOps
from rewriter.backends.files.pt2 import load_pt2, save_pt2
from rewriter.backends.fx.custom_op import MAP, SITE, TorchOps, body, map_body
from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.fx.interpreter import run
from rewriter.backends.fx.trace import decomposed
from rewriter.backends.random_form import random_form
from rewriter.cache import measured
from rewriter.cost_model import by_form, measure_forms
from rewriter.errors import RewriteError
from rewriter.graph import Graph, Site
from rewriter.operator import AbstractMap, AbstractMatrix, AbstractOperator, flatten
from rewriter.timing import interleave

COLD_BYTES = 64 << 20  # weights that no cache holds, for calls of few tokens
FEW_TOKENS = 8


def lower(graph: FxGraph) -> ExportedProgram:
    """The program with every opaque site spelled in plain aten and nothing unused in it."""
    clean = graph.clone()
    clean.prune()
    return decomposed(clean.program, {SITE: body, MAP: map_body})


def as_module(program: ExportedProgram) -> GraphModule:
    """The program as a module whose parameters train, called by position or by name, whichever way it was exported."""
    module: GraphModule = program.module()
    in_spec = program.call_spec.in_spec
    names = list(in_spec.child(1).context) if in_spec is not None and in_spec.child(1).num_children else []

    def by_name(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {**dict(zip(names, args, strict=False)), **kwargs}

    if names and not in_spec.child(0).num_children:
        module.register_forward_pre_hook(by_name, with_kwargs=True, prepend=True)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    for name in ("train", "eval"):
        vars(module).pop(name, None)  # torch.export forbids both; here they set the flags, and the graph stays the one of eval mode
    return module


class TorchTarget:
    """See rewriter.backend.Target."""

    name = timed_as = "torch"
    suffix = ".pt2"
    accepts: tuple[str, ...] = ("torch",)

    def __init__(self, provider: str = "", kernels: bool = False) -> None:
        """Providers and kernels are ONNX Runtime's; torch runs on the CPU."""

    def stored(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def emit(self, graph: Graph, path: Path, options: EmitOptions) -> list[str]:
        if not isinstance(graph, FxGraph):
            said = "--target torch needs a torch model (.pt2, module or folder), the input is ONNX"
            raise RewriteError(f"{said}; use --target onnxruntime or onnx")
        save_pt2(lower(graph), path, dict(options.provenance))
        return []

    def open(self, path: Path, threads: int) -> Runner:
        program = load_pt2(path)
        names = FxGraph(program).output_names()
        return _Program(program, names, threads)

    def open_int8(self, path: Path, threads: int) -> Runner:
        from rewriter.backends.fx.int8 import quantised

        with single(threads):
            model = quantised(FxGraph.of(load_pt2(path)))

        def run_int8(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with single(threads):
                return model(feeds)

        return run_int8

    def measure(self, forms: Sequence[AbstractOperator], tokens: int, threads: int) -> list[float]:
        specs = [flatten(form)[1] for form in forms]
        return measured(len(forms), lambda: _time(specs, tokens, threads), f"torch {torch.__version__}", tokens, threads, *specs)

    def layers(self, graph: Graph, sites: Sequence[Site], feeds: Mapping[str, Tensor]) -> Counter[Layer]:
        """Linear layers alone: what stands behind them is not fused with them."""
        return by_form(graph, sites, feeds)

    def measure_layers(self, layers: Sequence[Layer], whole: Whole, threads: int) -> list[float]:
        return measure_forms(self, layers, whole, threads)


class _Program:
    """A reloaded program behind the Runner protocol."""

    def __init__(self, program: ExportedProgram, names: Sequence[str], threads: int) -> None:
        self.program, self.names, self.threads = program, names, threads

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with single(self.threads):
            return dict(zip(self.names, run(self.program, feeds, {}), strict=True))


class single:
    """torch on a given number of threads, for a while."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.threads)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


def _time(specs: Sequence[str], tokens: int, threads: int) -> list[float]:
    forms = [random_form(spec) for spec in specs]
    calls = [_sequence(f, tokens) if isinstance(f, AbstractMap) else _cold(f, s, tokens) for f, s in zip(forms, specs, strict=True)]
    with single(threads), torch.no_grad():
        timing = interleave(calls, seconds=0.2)
    return [timing.seconds(i) for i in range(len(forms))]


def _cold(form: AbstractMatrix, spec: str, tokens: int) -> Callable[[], object]:
    """A call on the next of several copies of the weights, so that few tokens meet weights that no cache holds."""
    nbytes = max(form.cost().nbytes, 1)
    copies = min(32, max(1, COLD_BYTES // nbytes)) if tokens <= FEW_TOKENS else 1
    forms = [form, *[random_form(spec, seed) for seed in range(1, copies)]]
    x = torch.randn(tokens, form.shape[1])
    turn = iter(range(1 << 62))
    return lambda: forms[next(turn) % copies].product(EagerOps(), x)


def _sequence(form: AbstractMap, tokens: int) -> Callable[[], object]:
    """A map on one sequence; softmax attention in torch's own kernel, which is what a program has for it."""
    sizes = form.lengths(tokens)
    shapes = {name: [n if isinstance(n, int) else sizes[n] for n in dims] for name, dims in form.inputs().items()}
    inputs = {name: torch.randn(shape) / 8 for name, shape in shapes.items()}
    inputs |= {name: inputs[name] > -1 for name in form.booleans()}
    if type(form).__name__ == "Attention":
        own: Any = form
        query, key, value, *masks = inputs.values()
        options = {"is_causal": own.causal and not masks, "scale": own.scale, "enable_gqa": own.heads != own.shared}
        mask = masks[0] if masks else None
        return functools.partial(torch.nn.functional.scaled_dot_product_attention, query, key, value, mask, **options)
    return lambda: form.apply(TorchOps(), *inputs.values())
