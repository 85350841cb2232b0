"""Where samples come from: the user's data, text through the model's tokenizer, or invention; split into calibration and held-out ones.

Figures in a certificate are taken on samples that no fit has seen: every eighth sample of the user's is held out, and invented ones are
drawn afresh, in replications that are scramblings of their own and can be drawn on until an interval is as narrow as it was asked to be.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewriter.cache import digest
from rewriter.calibrate import Feeds, Samples
from rewriter.errors import RewriteError
from rewriter.graph import Graph, Value
from rewriter.inputs import InputLaw, InputSpec, batches, invent

BATCH = 16
HOLD_OUT = 8  # every eighth
LEAST_TO_SPLIT = 32
REPLICATIONS = 16
EACH_FIRST = 4  # samples of a replication in the first round
CAP = 64  # times --samples, where a precision was asked for
_THROUGH = {
    "cast",
    "identity",
    "reshape",
    "expand",
    "slice",
    "unsqueeze",
    "squeeze",
    "transpose",
    "add",
    "aten.clamp",
    "aten.lift_fresh_copy",
}


@dataclass(frozen=True)
class Replicated:
    """Samples without end: each of REPLICATIONS is a scrambling of its own, and is drawn on by doubling."""

    draw: Callable[[int, int, int], Sequence[Feeds]]  # (replication, start, count) -> batches
    law: str
    first: int  # samples of a replication in the first round
    cap: int  # samples of all replications together


@dataclass(frozen=True)
class Split:
    """Calibration samples and held-out ones; the same ones where there are too few to split, which the law then says."""

    calibration: Samples
    held_out: Samples | Replicated


def index_bounds(graph: Graph, specs: Sequence[InputSpec]) -> dict[str, int]:
    """For each integer input, the size of the smallest table that it indexes."""
    names = {spec.name for spec in specs}
    bounds: dict[str, int] = {}
    for node in graph.nodes():
        if graph.op(node) in ("embedding", "gather"):
            table, index = list(graph.inputs(node))[:2]
            shape = graph.shape(table) if table is not None and graph.is_const(table) else None
            name = _input_behind(graph, index, names)
            if name and shape and isinstance(shape[0], int):
                bounds[name] = min(bounds.get(name, shape[0]), shape[0])
    return bounds


def _input_behind(graph: Graph, value: Value | None, names: set[str]) -> str:
    """The graph input that an index value comes from, through casts and views; "" where it is computed."""
    for _ in range(8):
        if value is None:
            return ""
        if graph.name(value) in names:
            return graph.name(value)
        node = graph.producer(value)
        if node is None or graph.op(node) not in _THROUGH:
            return ""
        value = next((v for v in graph.inputs(node) if v is not None and not graph.is_const(v)), None)
    return ""


def invented(graph: Graph, specs: Sequence[InputSpec], sizes: Mapping[str, int], count: int, seed: int, batch: int = 0) -> Samples:
    """Samples made up by the law that the specs imply."""
    bounds = index_bounds(graph, specs)
    law = str(InputLaw.invented(specs, bounds))
    feeds = invent(specs, sizes, bounds, count, seed)
    key = digest("invented", law, sorted(sizes.items()), count, seed)
    return Samples(list(batches(feeds, batch or _step(specs))), law, key, invented=True)


def replicated(source: Any, count: int, seed: int, precise: bool = False) -> Replicated:
    """Replications of invented samples: about `count` together at the most, `precise` CAP times as many, and more in the first round.

    A replication's count is a power of two, times a first dimension that is fixed: so its points are a net.
    """
    specs, sizes, bounds = source.specs, source.sizes, index_bounds(source.graph, source.specs)
    fixed = next((spec.dims[0] for spec in specs if spec.dims and isinstance(spec.dims[0], int)), 1)

    def draw(replication: int, start: int, count: int) -> list[Feeds]:
        return list(batches(invent(specs, sizes, bounds, count, seed, 1 + replication, start), _step(specs)))

    share = max(1, min(EACH_FIRST * (4 if precise else 1), count // REPLICATIONS))
    first = fixed << max(0, (share // fixed).bit_length() - 1)
    return Replicated(draw, str(InputLaw.invented(specs, bounds)), first, count * (CAP if precise else 1))


def _step(specs: Sequence[InputSpec]) -> int:
    """The batch size: the fixed first dimension where there is one."""
    fixed = [spec.dims[0] for spec in specs if spec.dims and isinstance(spec.dims[0], int)]
    return int(fixed[0]) if fixed else BATCH


def surrogate(source: Any, seed: int) -> Replicated:
    """Invented samples to stand beside the user's: as few as make an interval."""
    return replicated(source, REPLICATIONS * EACH_FIRST, seed)


def collect(source: Any, data: Any, count: int, seed: int, precise: bool = False) -> Split:
    """The samples of a run: `data` is None, a path, a mapping of arrays or a list of lines; `precise`: as in `replicated`."""
    if data is None:
        first = invented(source.graph, source.specs, source.sizes, count, seed)
        return Split(first, replicated(source, count, seed, precise))
    return _given(source, data)


def everything(source: Any, data: Any, count: int, seed: int, precise: bool = False) -> Samples | Replicated:
    """All samples, where nothing has to be held out."""
    if data is None:
        return replicated(source, count, seed, precise)
    split = _given(source, data)
    if split.calibration is split.held_out:
        return split.calibration
    law = split.calibration.law
    assert isinstance(split.held_out, Samples)
    return Samples([*split.calibration.batches, *split.held_out.batches], law, digest(split.calibration.key, split.held_out.key))


def _given(source: Any, data: Any) -> Split:
    if isinstance(data, str | Path):
        return _from_file(source, Path(data))
    if isinstance(data, Mapping):
        return _from_arrays(source, {k: torch.as_tensor(v) for k, v in data.items()}, "data: given in memory")
    if isinstance(data, Tensor) or not all(isinstance(line, str) for line in data):
        raise RewriteError(f"data is a {type(data).__name__}; give a path, a mapping of arrays by input name, or a list of lines of text")
    return _from_lines(source, list(data), "text: given in memory")


def _from_file(source: Any, path: Path) -> Split:
    files = importlib.import_module("rewriter.backends.files.samples")
    if not path.exists():
        raise RewriteError(f"--data {path} does not exist; give a .npz of inputs or a text file with one sentence a line")
    if path.is_dir():
        raise RewriteError(f"--data {path} is a folder; give a .npz of inputs or a text file with one sentence a line")
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"PK"
    if zipped:
        arrays = {k: torch.as_tensor(v) for k, v in files.load_npz(path).items()}
        return _from_arrays(source, arrays, f"data: {path.name}")
    return _from_lines(source, files.load_lines(path), f"text: {path.name} through the folder's tokenizer")


def _from_arrays(source: Any, arrays: Mapping[str, Tensor], law: str) -> Split:
    wanted = [spec.name for spec in source.specs]
    if missing := [name for name in wanted if name not in arrays]:
        raise RewriteError(f"--data lacks input '{missing[0]}'; it has {', '.join(arrays)} and the model takes {', '.join(wanted)}")
    for spec in source.specs:
        if arrays[spec.name].is_floating_point() and not spec.torch_dtype.is_floating_point:
            given = str(arrays[spec.name].dtype).removeprefix("torch.")
            raise RewriteError(f"--data: '{spec.name}' is {given} and the model takes {spec}; give whole numbers")
    feeds = {spec.name: arrays[spec.name].to(spec.torch_dtype) for spec in source.specs}
    if extra := [name for name in arrays if name not in wanted]:
        law = f"{law} (without {', '.join(extra)}, which the model does not take)"
    for spec in source.specs:
        fixed = [(a, d) for a, d in enumerate(spec.dims) if a and isinstance(d, int)]
        shape = feeds[spec.name].shape
        if len(shape) != len(spec.dims) or any(shape[a] != d for a, d in fixed):
            raise RewriteError(f"--data: '{spec.name}' has shape {list(shape)} and the model takes {spec}; axis 0 counts samples")
    key = digest("arrays", *[(k, tuple(v.shape), _bytes(v)) for k, v in sorted(feeds.items())])
    found = list(batches(feeds, _step(source.specs)))
    if not found:
        raise RewriteError("--data holds no samples; axis 0 of every input counts them, give at least one")
    return _split(found, law, key)


def _bytes(tensor: Tensor) -> str:
    return digest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _from_lines(source: Any, lines: list[str], law: str) -> Split:
    if source.encode is None:
        raise RewriteError(
            "--data is text, and this model has no tokenizer; give a Hugging Face folder, or --data FILE.npz with the inputs"
        )
    if not lines:
        raise RewriteError("--data holds no text; give one sentence a line")
    chosen = lines[HOLD_OUT - 1 :: HOLD_OUT]
    fit = [line for i, line in enumerate(lines) if i % HOLD_OUT != HOLD_OUT - 1]
    key = digest("lines", *lines)
    if len(lines) < LEAST_TO_SPLIT:
        every = Samples(_encoded(source, lines), f"{law} (the calibration samples themselves)", key)
        return Split(every, every)
    held = Samples(_encoded(source, chosen), f"{law}, held out", digest(key, "held out"))
    return Split(Samples(_encoded(source, fit), law, key), held)


def _encoded(source: Any, lines: Sequence[str]) -> list[Mapping[str, Tensor]]:
    """Batches of lines of like length, so that there is little padding."""
    ordered = sorted(lines, key=len)
    return [source.encode(ordered[i : i + BATCH]) for i in range(0, len(ordered), BATCH)]


def _split(given: list[dict[str, Tensor]], law: str, key: str) -> Split:
    count = sum(len(next(iter(b.values()))) for b in given)
    if count < LEAST_TO_SPLIT or len(given) < 2:
        every = Samples(given, f"{law} (the calibration samples themselves)", key)
        return Split(every, every)
    held = given[HOLD_OUT - 1 :: HOLD_OUT] or given[-1:]
    fit = [b for b in given if all(b is not h for h in held)]
    return Split(Samples(fit, law, key), Samples(held, f"{law}, held out", digest(key, "held out")))
