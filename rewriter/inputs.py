"""What goes into a model: how a user spells an input, and how samples are invented where there are none.

A specification is `NAME:DTYPE[DIM,...]`; a number is a fixed dimension, a word a dynamic one, and `past+seq` the sum of two.
Invented floats are standard normals, invented ids are uniform over the table that they index, both from scrambled Sobol' points over all
inputs together; invented masks are ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.points import uniform_points

Dim = int | str
_SPEC = re.compile(r"\s*([A-Za-z_][\w.]*)\s*:\s*(\w+)\s*\[([^\[\]]*)\]\s*")
_DIM = re.compile(r"\d+|[A-Za-z_]\w*(\+[A-Za-z_]\w*)*")
_SHAPE_OF_SPEC = "NAME:DTYPE[DIM,...], for example ids:int64[batch,seq]"
DEFAULT_SIZE = 32


@dataclass(frozen=True)
class InputSpec:
    """One input of a model. A word in `dims` names a dynamic dimension; the same word is the same size everywhere."""

    name: str
    dtype: str  # as torch spells it: float32, int64, bool
    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name}:{self.dtype}[{','.join(map(str, self.dims))}]"

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype, None)
        if not isinstance(found, torch.dtype):
            raise RewriteError(f"input {self.name!r}: {self.dtype!r} is no dtype; write it as torch does: float32, int64, bool")
        return found

    @property
    def is_mask(self) -> bool:
        return self.torch_dtype == torch.bool or "mask" in self.name.lower()

    @property
    def is_position(self) -> bool:
        return not self.torch_dtype.is_floating_point and "position" in self.name.lower()

    @property
    def is_token_type(self) -> bool:
        return not self.torch_dtype.is_floating_point and any(w in self.name.lower() for w in ("token_type", "segment"))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(dim_size(dim, sizes) for dim in self.dims)


@dataclass(frozen=True)
class InputLaw:
    """How samples were drawn, as the report says it. A figure without its law is not a figure."""

    text: str

    def __str__(self) -> str:
        return self.text

    @classmethod
    def data(cls, path: str) -> InputLaw:
        return cls(f"data: {path}")

    @classmethod
    def lines(cls, path: str) -> InputLaw:
        return cls(f"text: {path} through the folder's tokenizer")

    @classmethod
    def invented(cls, specs: Sequence[InputSpec], bounds: Mapping[str, int]) -> InputLaw:
        parts = list(dict.fromkeys(_law_of(spec, bounds) for spec in specs))
        drawn = any(_is_drawn(spec, bounds) for spec in specs)
        return cls("invented: " + ", ".join(parts) + ("; scrambled Sobol' points" if drawn else ""))


def _is_drawn(spec: InputSpec, bounds: Mapping[str, int]) -> bool:
    """Whether chance has a say in the input: a float, or an id of a table that bounds it."""
    return not (spec.is_mask or spec.is_position) and (spec.torch_dtype.is_floating_point or spec.name in bounds)


def _law_of(spec: InputSpec, bounds: Mapping[str, int]) -> str:
    if spec.is_mask:
        return "masks of ones"
    if spec.is_position:
        return "positions in order"
    if spec.torch_dtype.is_floating_point:
        return "standard normals"
    if spec.name not in bounds:
        return "token types of zero"
    return f"uniform {'token types' if spec.is_token_type else 'token ids'} below {bounds[spec.name]}"


def parse_input(text: str) -> InputSpec:
    """`ids:int64[batch,seq]` -> InputSpec."""
    found = _SPEC.fullmatch(text)
    if found is None:
        raise RewriteError(f"--input {text!r} cannot be read; write {_SHAPE_OF_SPEC}")
    name, dtype, inside = found.groups()
    dims = [part.strip() for part in inside.split(",")] if inside.strip() else []
    for dim in dims:
        if not _DIM.fullmatch(dim):
            raise RewriteError(f"--input {text!r}: {dim!r} is no dimension; give a number, a name, or a sum of names such as past+seq")
        if dim.isdigit() and int(dim) < 1:
            raise RewriteError(f"--input {text!r}: a fixed dimension is at least 1; name it to make it dynamic")
    spec = InputSpec(name, dtype, tuple(int(dim) if dim.isdigit() else dim for dim in dims))
    try:
        return InputSpec(name, str(spec.torch_dtype).removeprefix("torch."), spec.dims)
    except RewriteError:
        raise RewriteError(f"--input {text!r}: {dtype!r} is no dtype; write it as torch does: float32, int64, bool") from None


def parse_dims(text: str) -> dict[str, int]:
    """`batch=4,seq=64` -> sizes of the dynamic dimensions, for examples and timing."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*(\d+)\s*", part)
        if found is None:
            raise RewriteError(f"--dim {text!r}: {part.strip()!r} cannot be read; write NAME=SIZE,..., for example batch=4,seq=64")
        name, size = found[1], int(found[2])
        if size == 0 and name != "past":
            raise RewriteError(f"--dim {text!r}: {name} is 0; give at least 1 (only past may be empty)")
        if sizes.setdefault(name, size) != size:
            raise RewriteError(f"--dim {text!r}: {name} is given twice")
    return sizes


def dim_names(specs: Sequence[InputSpec]) -> tuple[str, ...]:
    """The dynamic dimensions, in order of appearance; a sum counts as its parts."""
    words = [word for spec in specs for dim in spec.dims if isinstance(dim, str) for word in dim.split("+")]
    return tuple(dict.fromkeys(words))


def dim_size(dim: Dim, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    missing = [word for word in dim.split("+") if word not in sizes]
    if missing:
        raise RewriteError(f"dimension {missing[0]!r} has no size; give one with --dim {missing[0]}=N")
    return sum(sizes[word] for word in dim.split("+"))


def fill_sizes(specs: Sequence[InputSpec], sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes for every dynamic dimension: those given, then 1 for an input's first dimension, `DEFAULT_SIZE` for any other."""
    names = dim_names(specs)
    unknown = [name for name in sizes if name not in names]
    if unknown:
        allowed = ", ".join(names) or "none, all dimensions are fixed"
        raise RewriteError(f"--dim {unknown[0]}: no input has that dimension; the model's dynamic dimensions are: {allowed}")
    first = {spec.dims[0] for spec in specs if spec.dims}
    return {name: sizes.get(name, 1 if name in first else DEFAULT_SIZE) for name in names}


def invent(
    specs: Sequence[InputSpec],
    sizes: Mapping[str, int],
    bounds: Mapping[str, int],
    samples: int,
    seed: int,
    replication: int = 0,
    start: int = 0,
) -> dict[str, Tensor]:
    """Samples start to start + samples of a replication, along axis 0 of every input; replications are scramblings of their own.

    A fixed first dimension of k rounds their number up to a multiple of k.
    """
    for spec in specs:
        _check_inventable(spec, bounds)
    rows = _rows(specs, samples)
    shapes = {spec.name: (rows, *(dim_size(dim, sizes) for dim in spec.dims[1:])) for spec in specs}
    widths = [torch.Size(shapes[spec.name][1:]).numel() if _is_drawn(spec, bounds) else 0 for spec in specs]
    points = uniform_points(rows, max(sum(widths), 1), (seed, replication), start)[:, : sum(widths)]
    drawn = {}
    for spec, columns in zip(specs, points.split(widths, 1), strict=True):
        shape, dtype = shapes[spec.name], spec.torch_dtype
        if spec.is_mask:
            drawn[spec.name] = torch.ones(shape, dtype=dtype)
        elif spec.is_position:
            drawn[spec.name] = _positions(spec, specs, sizes, shape, bounds)
        elif dtype.is_floating_point:
            drawn[spec.name] = torch.special.ndtri(columns).to(dtype).reshape(shape)
        elif spec.name in bounds:
            drawn[spec.name] = (columns * bounds[spec.name]).to(dtype).reshape(shape)  # rounded down
        else:
            drawn[spec.name] = torch.zeros(shape, dtype=dtype)
    return drawn


def _check_inventable(spec: InputSpec, bounds: Mapping[str, int]) -> None:
    dtype = spec.torch_dtype
    if not spec.dims:
        raise RewriteError(f"input {spec.name!r} is a scalar and has no sample axis; give one value for all samples with --data FILE.npz")
    if dtype.is_complex:
        raise RewriteError(f"input {spec.name!r} is {spec.dtype}, which cannot be invented; give samples with --data FILE.npz")
    free = dtype.is_floating_point or spec.is_mask or spec.is_position or spec.is_token_type
    if not free and spec.name not in bounds:
        raise RewriteError(f"input {spec.name!r} is {spec.dtype} and indexes no table that bounds it; give samples with --data FILE.npz")


def _rows(specs: Sequence[InputSpec], samples: int) -> int:
    fixed = {dim for spec in specs if isinstance(dim := spec.dims[0], int)}
    if len(fixed) > 1:
        said = ", ".join(map(str, sorted(fixed)))
        raise RewriteError(f"the inputs' first dimensions are fixed to different sizes ({said}); give samples with --data FILE.npz")
    step = next(iter(fixed), 1)
    return -(-samples // step) * step


def _positions(
    spec: InputSpec, specs: Sequence[InputSpec], sizes: Mapping[str, int], shape: tuple[int, ...], bounds: Mapping[str, int]
) -> Tensor:
    """0, 1, 2, ... along the last axis, after the cached tokens where another input's length is `past+` this one's."""
    last = spec.dims[-1]
    sums = (dim for other in specs for dim in other.dims if isinstance(dim, str) and dim.endswith(f"+{last}"))
    whole = next(sums, last)
    start = dim_size(whole, sizes) - dim_size(last, sizes) if len(shape) > 1 else 0
    row = torch.arange(start, start + shape[-1]).clamp(max=bounds.get(spec.name, start + shape[-1]) - 1)
    return row.to(spec.torch_dtype).expand(shape).clone()


def batches(samples: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """The samples in order, `size` rows at a time; the last batch may be smaller, and scalars are the same in all."""
    lengths = {name: len(value) for name, value in samples.items() if value.dim()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise RewriteError(f"the inputs have different numbers of samples along axis 0 ({said}); give each the same number")
    if size < 1:
        raise RewriteError(f"a batch of {size} rows is empty; give at least 1")
    for start in range(0, next(iter(lengths.values()), 0), size):
        yield {name: value[start : start + size] if value.dim() else value for name, value in samples.items()}
