"""Seconds of a form under ONNX Runtime: models of nothing but the form, interleaved in one process.

A model layer of few tokens streams its weights from memory, so there the figure is taken over copies that no cache holds together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch

from rewriter.backends.onnx.emit import attach
from rewriter.backends.onnx.opaque import opaque, skeleton
from rewriter.backends.onnx.ops import LOWERINGS
from rewriter.backends.onnx.run import CPU, Session
from rewriter.backends.onnx.tensors import from_torch
from rewriter.cache import default_folder, digest, hardware, measured, write_atomically
from rewriter.operator import AbstractMatrix, flatten, unflatten
from rewriter.timing import interleave

COLD_BYTES = 64 << 20  # weights that no cache holds
FEW_TOKENS = 8
MOST_COPIES = 32
MANY_TOKENS_COPIES = 2
SECONDS = 0.2  # for each form
RUNTIME = f"onnxruntime {version('onnxruntime')}, {' '.join(LOWERINGS)}"  # a new lowering is a new comparison


def measure(forms: Sequence[AbstractMatrix], tokens: int, threads: int, provider: str = CPU) -> list[float]:
    """Seconds per call of each form on `tokens` rows, each in the lowering that is fastest there."""
    known: dict[str, list[AbstractMatrix]] = {}
    for form in forms:
        known.setdefault(flatten(form)[1], []).append(form)

    def time() -> list[float]:
        from rewriter.backends.onnx.lowering import chooser

        choose = chooser((tokens,), threads)
        specs = list(known)
        seconds = dict(zip(specs, time_bodies([(s, choose(s, 2)) for s in specs], 2, tokens, threads, provider), strict=True))
        return [seconds[flatten(form)[1]] for form in forms]

    return measured(f"{RUNTIME} {provider}", forms, tokens, threads, time)


def measure_lowerings(spec: str, rank: int, lowerings: Sequence[str], tokens: int, threads: int) -> list[float]:
    """Seconds of one form in each lowering, at the rank that it is emitted for."""
    path = default_folder() / "timings" / f"{digest(RUNTIME, hardware(), 'lowerings', spec, rank, *lowerings, tokens, threads)}.json"
    stored = _stored(path)
    if len(stored) == len(lowerings):
        return stored
    seconds = time_bodies([(spec, lowering) for lowering in lowerings], rank, tokens, threads)
    try:
        write_atomically(path, lambda temporary: _write(temporary, seconds))
    except OSError:
        return seconds
    return seconds


def _write(path: Path, seconds: list[float]) -> None:
    path.write_text(json.dumps(seconds))


def _stored(path: Path) -> list[float]:
    try:
        return [float(s) for s in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return []


def time_bodies(bodies: Sequence[tuple[str, str]], rank: int, tokens: int, threads: int, provider: str = CPU) -> list[float]:
    """Seconds of (spec, lowering) pairs, interleaved; never stored."""
    copies = [_copies(spec, tokens) for spec, _ in bodies]
    calls = [_call(spec, lowering, rank, tokens, threads, count, provider) for (spec, lowering), count in zip(bodies, copies, strict=True)]
    timing = interleave(calls, seconds=SECONDS)
    return [timing.seconds(i) / count for i, count in enumerate(copies)]


def _copies(spec: str, tokens: int) -> int:
    if tokens > FEW_TOKENS:
        return MANY_TOKENS_COPIES
    operator, _ = skeleton(spec)
    return max(MANY_TOKENS_COPIES, min(MOST_COPIES, -(-COLD_BYTES // max(operator.cost().nbytes, 1))))


def _call(spec: str, lowering: str, rank: int, tokens: int, threads: int, copies: int, provider: str) -> Callable[[], object]:
    """A session over several copies with weights of their own, each reading the same x."""
    operator, _ = skeleton(spec)
    model = stacked([_random(spec, seed) for seed in range(copies)], rank)
    attach(model, lambda _spec, _rank: lowering)
    session = Session(ir.to_proto(model).SerializeToString(), threads, provider=provider)
    feeds = session.arrays({"x": torch.randn(*[1] * (rank - 2), *[tokens][: rank - 1], operator.shape[1])})
    return lambda: session.session.run(None, feeds)


def stacked(forms: Sequence[AbstractMatrix], rank: int) -> ir.Model:
    """One x through each form, each image an output."""
    n, m = forms[0].shape[1], forms[0].shape[0]
    leading = [f"d{i}" for i in range(rank - 1)]
    x = ir.val("x", ir.DataType.FLOAT, [*leading, n])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="measured")
    for i, form in enumerate(forms):
        leaves, spec = flatten(form)
        factors = []
        for j, leaf in enumerate(leaves):
            held = from_torch(leaf, f"w{i}_{j}")
            factors.append(ir.Value(name=held.name, shape=held.shape, type=ir.TensorType(held.dtype), const_value=held))  # type: ignore[arg-type]
            graph.register_initializer(factors[-1])
        node = opaque(x, factors, spec, f"form{i}", rank)
        graph.append(node)
        node.outputs[0].name = f"y{i}"
        node.outputs[0].shape, node.outputs[0].type = ir.Shape([*leading, m]), x.type
        graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=10)


def _random(spec: str, seed: int) -> AbstractMatrix:
    """The form with numbers of its own; indices stay within every axis."""
    rng = torch.Generator().manual_seed(seed)
    _, leaves = skeleton(spec)
    indices = _indices(spec)
    filled = [indices[i] if i in indices else torch.randn(leaf.shape, generator=rng) for i, leaf in enumerate(leaves)]
    operator = unflatten(spec, filled)
    assert isinstance(operator, AbstractMatrix)
    return operator


def _indices(spec: str) -> dict[int, torch.Tensor]:
    """Which tensors the product gathers by: found by spelling it."""
    from rewriter.cost import CostOps, Width

    operator, leaves = skeleton(spec)
    found: dict[int, torch.Tensor] = {}

    class Watch(CostOps):
        def const(self, tensor: torch.Tensor) -> Width:
            width = super().const(tensor)
            order[id(width)] = (width, next(i for i, leaf in enumerate(leaves) if leaf is tensor))
            return width

        def gather(self, x: Width, index: Width) -> Width:
            size = index.shape[0]
            found[order[id(index)][1]] = torch.arange(size) % x.features
            return super().gather(x, index)

    order: dict[int, tuple[Width, int]] = {}
    operator.product(Watch(1), Width((operator.shape[1],)))
    return found
