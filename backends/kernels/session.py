"""An ordinary InferenceSession whose covered nodes run in the kernels. The file stays as it is: it is edited in memory."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from rewriter.backends.files.onnx_file import load_onnx
from rewriter.backends.kernels import naive
from rewriter.backends.kernels.covering import DOMAIN, Covered, chain_node, cover, recurrence_node
from rewriter.backends.kernels.heads import Heads
from rewriter.backends.kernels.library import Kernels, kernels
from rewriter.backends.kernels.pack import pack
from rewriter.backends.kernels.plan import Ending, plan
from rewriter.backends.kernels.recurrences import Sizes
from rewriter.backends.onnx.run import CPU, Session, loadable
from rewriter.backends.onnx.tensors import from_torch
from rewriter.backends.onnx.widen import needs_widening, widen
from rewriter.errors import RewriteError
from rewriter.quantised import quantised
from rewriter.tolerances import EQUAL

_registered: dict[int, Any] = {}  # options that know our operators, held so that no others get their id
OLDEST = (1, 17)  # the first ONNX Runtime whose function table has all that the kernels call


def inference_session(path: str | Path, sess_options: Any = None, providers: Sequence[Any] | None = None) -> Any:
    """See rewriter.api.inference_session."""
    import onnxruntime as ort

    options = sess_options if sess_options is not None else ort.SessionOptions()  # type: ignore[attr-defined]
    model = load_onnx(path)
    threads = options.intra_op_num_threads or cores()
    try:
        library = trusted()
    except RewriteError as problem:
        warnings.warn(f"{path} runs on stock operators: {problem}", RuntimeWarning, stacklevel=3)
        return ort.InferenceSession(str(path), options, providers=providers or [CPU])  # type: ignore[attr-defined]
    if all(c.reason for c in cover(model, library, threads)):
        return ort.InferenceSession(str(path), options, providers=providers or [CPU])  # type: ignore[attr-defined]
    if id(options) not in _registered:
        options.register_custom_ops_library(str(library.path))
        _registered[id(options)] = options
    with loadable(model) as source:
        return ort.InferenceSession(source, options, providers=providers or [CPU])  # type: ignore[attr-defined]


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_covered(path: str | Path, threads: int, provider: str = CPU) -> Session:
    """The model as a runner, covered layers in kernels; RewriteError where there are none."""
    model, library = load_onnx(path), trusted()
    if needs_widening(model):
        widen(model)
    cover(model, library, threads)
    with loadable(model) as source:
        return Session(source, threads, provider=provider, library=str(library.path))


def coverage(path: str | Path) -> list[Covered]:
    """What the kernels would take of a model, node by node."""
    return cover(load_onnx(path), trusted(), 1)


@functools.cache
def trusted() -> Kernels:
    """The library of this machine after a model of one node under this ONNX Runtime has matched its naive form; RewriteError otherwise."""
    found = tuple(int(part) for part in version("onnxruntime").split(".")[:2])
    if found < OLDEST:
        raise RewriteError(f"ONNX Runtime {version('onnxruntime')} is too old for kernels; they need {'.'.join(map(str, OLDEST))}")
    library = kernels()
    check(library)
    return library


def check(library: Kernels) -> None:
    """RewriteError unless one node of each kind gives what its naive form gives."""
    from rewriter.algebra import BlockDiagonal, Compose, Dense, Sparse

    rng = torch.Generator().manual_seed(0)
    floats = Compose((BlockDiagonal(torch.randn(3, 5, 21, generator=rng)), Dense(torch.randn(63, 70, generator=rng))))
    wide = Dense(torch.randn(96, 33, generator=rng))
    integers, halves = quantised(wide), quantised(wide, 4)
    assert integers is not None and halves is not None
    panel = library.layout.panel
    sparse = [Sparse.of(torch.randn(40, 2 * panel, generator=rng), 2, 4, shared) for shared in (1, panel)]
    for operator in (floats, integers, halves, *sparse):
        steps = plan(operator, Ending(torch.randn(operator.shape[0], generator=rng), "gelu"))
        x = torch.randn(39, steps.inputs, generator=rng)  # more than two matrix registers hold
        found = session_of(pack(steps, library.layout), steps.inputs, steps.outputs, library)({"x": x})["y"]
        _compared(found, naive.run(steps, x))
    sequences = {"decay": torch.rand(2, 9, 6, generator=rng), "drive": torch.randn(2, 9, 6, generator=rng)}
    entries = Sizes(0, heads=6, width=1)
    _compared(recurrence_session(entries, library)(sequences)["y"], naive.recurrence(entries, list(sequences.values()))[0])
    matrices = Sizes(1, heads=2, width=70, key=5, queries=4, keys=1, factors=2, delta=1, decay=1, carried=1, scale=0.5)
    for time in (3, 9):  # the kernel keeps states in two ways
        shapes = ((2, time, 20), (2, time, 10), (2, time, 280), (2, time, 2), (2, time, 4), (2, 2, 5, 70))
        inputs = [torch.randn(shape, generator=rng) / 4 for shape in shapes]
        wanted = naive.recurrence(matrices, inputs)
        for found, expected in zip(library.recur(matrices, inputs, [y.shape for y in wanted], 1), wanted, strict=True):
            _compared(found, expected)
    heads = Heads(heads=4, shared=2, key=5, width=70, scale=0.5, causal=True)
    query, key, value, mask = (torch.randn(shape, generator=rng) for shape in ((2, 4, 9, 5), (2, 2, 9, 5), (2, 2, 9, 70), (2, 1, 1, 9)))
    _compared(library.attend(heads, query, key, value, mask, 1), naive.attention(heads, query, key, value, mask))


def _compared(found: torch.Tensor, wanted: torch.Tensor) -> None:
    if not torch.allclose(found, wanted, *EQUAL[torch.float32]):
        off = (found - wanted).abs().max()
        raise RewriteError(f"the kernels are off by {off:.1e} from their plain form on this machine; they are not used")


def session_of(packed: torch.Tensor, inputs: int, outputs: int, library: Kernels, threads: int = 1) -> Session:
    """A model of one Chain, (rows, inputs) "x" -> (rows, outputs) "y"."""
    x = ir.val("x", ir.DataType.FLOAT, ["rows", inputs])
    weights = ir.Value(name="packed", const_value=from_torch(packed, "packed"))
    node = chain_node([x, weights], packed, threads)
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["rows", outputs]), x.type
    graph = ir.Graph([x], [y], nodes=[node], initializers=[weights], opset_imports={"": 20, DOMAIN: 1}, name="chain")
    return Session(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), threads, library=str(library.path))


def recurrence_session(sizes: Sizes, library: Kernels) -> Session:
    """A model of one Recurrence entry by entry, "decay" and "drive" (batch, time, heads) -> "y"."""
    inputs = [ir.val(name, ir.DataType.FLOAT, ["batch", "time", sizes.heads]) for name in ("decay", "drive")]
    node = recurrence_node(inputs, sizes, 1)
    y, state = node.outputs
    y.name, y.shape, y.type, state.name = "y", inputs[0].shape, inputs[0].type, "state"
    graph = ir.Graph(inputs, [y], nodes=[node], opset_imports={"": 20, DOMAIN: 1}, name="recurrence")
    return Session(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), 1, library=str(library.path))
