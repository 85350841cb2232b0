"""An ONNX file may point at other files and declare any size: what it says is compared with what is there before anything is allocated.

Saving never leaves half a pair: the data file takes a name that nothing uses, the model that refers to it is renamed into
place last, and only then does the data file of the old model go.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, TensorProto

from rewriter.backends.files.archive import one_line
from rewriter.backends.files.atomic import publish, scratch_beside
from rewriter.backends.files.sniff import Kind, recognise
from rewriter.errors import RewriteError

MAX_INLINE_NBYTES = 1_900_000_000  # protobuf stops at 2 GiB, names and nodes included
MAX_RANK = 64
MAX_NESTING = 20
_EXTERNAL_TENSOR_ABOVE = 1024  # bytes; smaller tensors stay in the model
_FIELDS = {
    **dict.fromkeys(("FLOAT", "COMPLEX64"), "float_data"),
    **dict.fromkeys(("DOUBLE", "COMPLEX128"), "double_data"),
    **dict.fromkeys(("INT64",), "int64_data"),
    **dict.fromkeys(("UINT32", "UINT64"), "uint64_data"),
    **dict.fromkeys(("STRING",), "string_data"),
}


def load_onnx(path: Path | str) -> ir.Model:
    """The model, its external data memory-mapped on use and proven to lie inside the model's folder."""
    path = Path(os.path.abspath(path))
    if (kind := recognise(path)) is not Kind.ONNX:
        raise RewriteError(f"{path}: a {kind.value} file and no ONNX model; load it as what it is")
    proto = _parse(path)
    _Judge(path).model(proto)
    _check(path)
    try:
        model = ir.from_proto(proto)
    except Exception as problem:
        raise RewriteError(f"{path}: onnx_ir cannot read the model ({one_line(problem)}); export it again") from problem
    ir.external_data.set_base_dir(model.graph, path.parent)
    whole_sizes(model)
    return model


def whole_sizes(model: ir.Model) -> None:
    """In place: a size that is called "2" is 2. torch.onnx spells one as a name where a guard fixed a symbol."""
    for graph in model.graphs():
        for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]:
            sizes = {axis: dim.value or "" for axis, dim in enumerate(value.shape or ()) if isinstance(dim, ir.SymbolicDim)}
            whole = {axis: int(said) for axis, said in sizes.items() if re.fullmatch(r"[0-9]{1,18}", said)}
            if whole and value.shape is not None:
                value.shape = value.shape.copy()  # what was read may be frozen
                for axis, size in whole.items():
                    value.shape[axis] = size


def save_onnx(model: ir.Model, path: Path | str, external_above: int = MAX_INLINE_NBYTES) -> None:
    """Write the model; weights of more than `external_above` bytes in all go to a data file beside it. `model` stays as it is."""
    path = Path(os.path.abspath(path))
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values() if value.const_value is not None]
    external = sum(tensor.nbytes for tensor in tensors) > min(external_above, MAX_INLINE_NBYTES)
    stale = stale_data(path)
    with scratch_beside(path) as scratch:
        written, data = scratch / "model.onnx", _free_data_name(path) if external else None
        try:
            if data is None:
                with _in_memory(model):
                    ir.save(model, written, format="protobuf")
            else:
                ir.save(model, written, format="protobuf", external_data=data, size_threshold_bytes=_EXTERNAL_TENSOR_ABOVE)
        except OSError:
            raise
        except Exception as problem:
            raise RewriteError(f"{path}: onnx_ir cannot write the model ({one_line(problem)}); nothing was replaced") from problem
        _check(written, shown=path)
        _keep_mapped(tensors, stale)
        _publish_pair(scratch, written, data, path)
    for name in stale:
        (path.parent / name).unlink(missing_ok=True)


def _publish_pair(scratch: Path, written: Path, data: str | None, path: Path) -> None:
    """Data first, model last: a crash between the two leaves the old model with its own data."""
    if data is None or not (scratch / data).exists():
        publish(written, path)
        return
    beside = path.parent / data
    publish(scratch / data, beside)
    try:
        publish(written, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _parse(path: Path) -> ModelProto:
    try:
        return onnx.load(str(path), format="protobuf", load_external_data=False)
    except Exception as problem:
        raise RewriteError(f"{path}: a truncated or damaged ONNX file ({one_line(problem)}); fetch or write it again") from problem


def _check(path: Path, shown: Path | None = None) -> None:
    try:
        onnx.checker.check_model(str(path))
    except Exception as problem:
        text = one_line(problem).replace(str(path), path.name)
        raise RewriteError(f"{shown or path}: onnx.checker refuses the model ({text}); export it again") from problem


class _Judge:
    """Every tensor of a model, wherever it stands, against the bytes that it claims."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._folder = path.parent

    def model(self, model: ModelProto) -> None:
        self._graph(model.graph, depth=0, may_be_external=True)
        for function in model.functions:  # onnx_ir leaves the base folder of what lies in them to the current one: no data file there
            self._nodes(function, depth=0, may_be_external=False)
            self._attributes(function.attribute_proto, depth=0, may_be_external=False)
        if model.training_info:
            raise self._refusal("it carries training graphs", "export it for inference")

    def _graph(self, graph: GraphProto, depth: int, may_be_external: bool) -> None:
        for sparse in graph.sparse_initializer:
            raise self._sparse(f"initialiser {sparse.values.name!r}")
        names = Counter(tensor.name for tensor in graph.initializer)
        if twice := [name for name, count in names.items() if count > 1]:
            raise self._refusal(f"initialiser {twice[0]!r} is given {names[twice[0]]} times", "each name is allowed once, export it again")
        for tensor in graph.initializer:
            self._tensor(tensor, may_be_external)
        self._nodes(graph, depth, may_be_external)

    def _nodes(self, body: GraphProto | FunctionProto, depth: int, may_be_external: bool) -> None:
        if depth > MAX_NESTING:
            raise self._refusal(f"graphs nested deeper than {MAX_NESTING}", "export it again")
        for node in body.node:
            self._attributes(node.attribute, depth, may_be_external)

    def _attributes(self, attributes: Iterable[AttributeProto], depth: int, may_be_external: bool) -> None:
        for attribute in attributes:
            if attribute.sparse_tensors or attribute.HasField("sparse_tensor"):
                raise self._sparse(f"attribute {attribute.name!r}")
            for tensor in [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]:
                self._tensor(tensor, may_be_external=False)
            for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                self._graph(graph, depth + 1, may_be_external)

    def _sparse(self, what: str) -> RewriteError:
        """onnx_ir drops sparse tensors without a word; refused whole, their sizes are never believed either."""
        return self._refusal(f"{what} is a sparse tensor", "only dense ones are allowed, export it dense")

    def _tensor(self, tensor: TensorProto, may_be_external: bool) -> None:
        if len(tensor.dims) > MAX_RANK or any(not 0 <= size < 1 << 48 for size in tensor.dims):
            raise self._refusal(f"tensor {tensor.name!r} has shape {list(tensor.dims)[:8]}", "sizes from 0 to 2^48 are allowed")
        dtype = ir.DataType(tensor.data_type) if tensor.data_type in set(ir.DataType) else ir.DataType.UNDEFINED
        if dtype == ir.DataType.UNDEFINED:
            raise self._refusal(f"tensor {tensor.name!r} has the unknown data type {tensor.data_type}", "export it again")
        count = 1
        for size in tensor.dims:
            count *= size
        if tensor.data_location == TensorProto.EXTERNAL:
            if not may_be_external or dtype == ir.DataType.STRING:
                way_on = "only numeric initialisers outside functions may, export it again"
                raise self._refusal(f"tensor {tensor.name!r} lies in another file", way_on)
            self._external(tensor, _nbytes(count, dtype))
        else:
            self._inline(tensor, count, dtype)

    def _inline(self, tensor: TensorProto, count: int, dtype: ir.DataType) -> None:
        if tensor.HasField("raw_data"):
            have, need, unit = len(tensor.raw_data), _nbytes(count, dtype), "bytes"
        else:
            have, need, unit = len(getattr(tensor, _FIELDS.get(dtype.name, "int32_data"))), _values(count, dtype), "values"
        if have != need:
            shape = list(tensor.dims)
            raise self._refusal(f"tensor {tensor.name!r} of shape {shape} needs {need} {unit} and holds {have}", "export it again")

    def _external(self, tensor: TensorProto, need: int) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        data = self._inside(tensor.name, entries.get("location", ""))
        have = data.stat().st_size
        try:
            offset = int(entries.get("offset") or 0)
            length = int(entries["length"]) if entries.get("length") else have - offset
        except ValueError as problem:
            raise self._refusal(f"tensor {tensor.name!r} has an offset or length that is no number", "export it again") from problem
        if length != need:
            raise self._refusal(f"tensor {tensor.name!r} needs {need} bytes and declares {length} in {data.name}", "export it again")
        if offset < 0 or offset + length > have:
            end = offset + length
            raise self._refusal(f"tensor {tensor.name!r} ends at byte {end} of {data.name}, which has {have}", "fetch the data file again")

    def _inside(self, name: str, location: str) -> Path:
        """The data file: relative, below the model's folder after every link is followed, and with no second name elsewhere."""
        parts = PurePosixPath(location).parts
        if not parts or location.startswith("/") or ".." in parts or "\\" in location or ":" in location or "\x00" in location:
            raise self._refusal(f"tensor {name!r} lies in {location!r}", "data must be in the model's own folder, do not use this model")
        data = self._folder / location
        real, home = os.path.realpath(data), os.path.realpath(self._folder)
        if os.path.commonpath([real, home]) != home:
            raise self._refusal(f"tensor {name!r} lies in {location!r}, a link that leaves the model's folder", "copy the data file there")
        if not os.path.isfile(real):
            raise self._refusal(f"tensor {name!r} lies in {location!r}, which is missing", "put the data file beside the model")
        if os.stat(real).st_nlink > 1:
            raise self._refusal(f"tensor {name!r} lies in {location!r}, which has a second name (hard link)", "copy the data file")
        return data

    def _refusal(self, given: str, way_on: str) -> RewriteError:
        return RewriteError(f"{self._path}: {given}; {way_on}")


def _nbytes(count: int, dtype: ir.DataType) -> int:
    return 0 if dtype == ir.DataType.STRING else (count * dtype.bitwidth + 7) // 8


def _values(count: int, dtype: ir.DataType) -> int:
    """How many entries of the typed field hold `count` elements."""
    if dtype.name in ("COMPLEX64", "COMPLEX128"):
        return 2 * count
    return (count * dtype.bitwidth + 7) // 8 if dtype != ir.DataType.STRING and dtype.bitwidth < 8 else count


@contextmanager
def _in_memory(model: ir.Model) -> Iterator[None]:
    """External weights as memory-mapped arrays for the time of a save, so that they end up in the model itself."""
    initializers = [value for graph in model.graphs() for value in graph.initializers.values()]
    values = [value for value in initializers if isinstance(value.const_value, ir.ExternalTensor)]
    originals = [value.const_value for value in values]
    try:
        for value, tensor in zip(values, originals, strict=True):
            assert tensor is not None
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name)  # type: ignore[arg-type]
        yield
    finally:
        for value, tensor in zip(values, originals, strict=True):
            value.const_value = tensor


def _own_data(path: Path) -> re.Pattern[str]:
    return re.compile(rf"{re.escape(path.name)}(\.\d+)?\.data")


def _free_data_name(path: Path) -> str:
    """`<name>.data`, or the first numbered one that no file has: the old model keeps its own until it is replaced."""
    names = [f"{path.name}.data", *(f"{path.name}.{number}.data" for number in range(2, 10_000))]
    return next(name for name in names if not os.path.lexists(path.parent / name))


def stale_data(path: Path) -> list[str]:
    """The data files of the model that is about to be replaced, as far as this module gave them their names."""
    if not path.is_file():
        return []
    try:
        proto = _parse(path)
    except RewriteError:
        return []
    entries = [entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    return sorted({name for name in entries if _own_data(path).fullmatch(name)})


def _keep_mapped(tensors: list[ir.TensorProtocol], stale: list[str]) -> None:
    """A model that is saved over the file it came from goes on reading its old data: mapped pages outlive the name."""
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor) and os.path.basename(tensor.location) in stale:
            tensor.numpy()
