"""Models under ONNX Runtime on the CPU: torch tensors in, torch tensors out, one line where it fails."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor

from rewriter.backends.files.archive import one_line
from rewriter.backends.onnx.emit import attach
from rewriter.backends.onnx.tensors import array_to_torch
from rewriter.backends.onnx.widen import needs_widening, widen
from rewriter.errors import RewriteError

MAX_PROTO = 512 << 20  # bytes of weights that go through memory; more goes through a file that ONNX Runtime maps
CPU = "CPUExecutionProvider"
TAPPED_BYTES = 256 << 20  # of tapped values that are held at once
_FLOATS = {"tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16}


def check_provider(provider: str) -> None:
    """RewriteError unless this build of ONNX Runtime has the execution provider."""
    import onnxruntime as ort

    if provider not in (known := ort.get_available_providers()):  # type: ignore[attr-defined]
        raise RewriteError(f"--provider {provider} is not in this ONNX Runtime; it has {', '.join(known)}")


def no_gradients(grad: bool) -> None:
    """RewriteError where gradients are asked for."""
    if grad:
        raise RewriteError("ONNX Runtime records no gradients; give the torch model (.pt2, module or folder)")


class Session:
    """An InferenceSession that speaks torch. No library of custom operators is loaded but `library`, which is ours.

    As a user gets it; `faithful`: quantised weights are multiplied in the model's own float type, and waiting threads sleep.
    """

    def __init__(self, model: str | bytes, threads: int, faithful: bool = False, provider: str = CPU, library: str = "") -> None:
        import onnxruntime as ort  # heavy, and only a run needs it

        options = ort.SessionOptions()  # type: ignore[attr-defined]
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # what fails is raised, and said once
        options.add_session_config_entry("session.force_spinning_stop", "1")  # else threads of one session take the cores of the next
        if faithful:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # else activations are rounded to int8
        if library:
            options.register_custom_ops_library(library)
        try:
            self.session = ort.InferenceSession(model, options, providers=list(dict.fromkeys([provider, CPU])))  # type: ignore[attr-defined]
        except Exception as problem:
            raise RewriteError(f"ONNX Runtime cannot load the model: {one_line(problem)}") from problem
        self.input_types = {i.name: i.type for i in self.session.get_inputs()}
        self.output_names = [o.name for o in self.session.get_outputs()]

    def __call__(self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None, options: Any = None) -> dict[str, Tensor]:
        """`options`: onnxruntime.RunOptions."""
        names = list(self.output_names if outputs is None else outputs)
        try:
            arrays: Any = self.session.run(names, self.arrays(feeds), options)
        except Exception as problem:
            raise RewriteError(f"ONNX Runtime cannot run the model: {one_line(problem)}") from problem
        return {name: array_to_torch(array) for name, array in zip(names, arrays, strict=True)}

    def bound(self, feeds: Mapping[str, Tensor]) -> Callable[[], None]:
        """A call on these feeds that leaves its outputs where they are: what it takes is the model's time, not that of handing over."""
        binding, arrays = self.session.io_binding(), self.arrays(feeds)
        for name, array in arrays.items():
            binding.bind_cpu_input(name, array)
        for name in self.output_names:
            binding.bind_output(name)

        def call(_held: object = arrays) -> None:  # they are read where they lie
            self.session.run_with_iobinding(binding)

        return call

    def arrays(self, feeds: Mapping[str, Tensor]) -> dict[str, Any]:
        """The feeds as numpy has them, in the model's float types."""
        missing = [name for name in self.input_types if name not in feeds]
        if missing:
            raise RewriteError(f"no value is given for input {missing[0]!r}; the model takes {', '.join(self.input_types)}")
        return {name: self.array(feeds[name], kind) for name, kind in self.input_types.items()}

    @staticmethod
    def array(tensor: Tensor, kind: str) -> Any:
        """As numpy has it, floats in ONNX Runtime's type."""
        wanted = _FLOATS.get(kind, tensor.dtype)
        tensor = tensor.detach().cpu()
        return (tensor.to(wanted) if tensor.is_floating_point() else tensor).contiguous().numpy()


@contextlib.contextmanager
def loadable(model: ir.Model) -> Iterator[str | bytes]:
    """The model as ONNX Runtime takes it: bytes, or a file where it is too large for them."""
    nbytes = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if nbytes <= MAX_PROTO:
        whole = ir.external_data.load_to_model(model.clone())  # bytes have no folder in which external data could lie
        yield ir.to_proto(whole).SerializeToString()
        return
    with tempfile.TemporaryDirectory(prefix="rewriter-") as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        yield str(path)


class Tapped:
    """A model whose tapped values are outputs too. They are fetched a few at a time, so that what is held stays bounded."""

    def __init__(self, model: ir.Model, taps: tuple[str, ...]) -> None:
        self.taps = taps
        copy = model.clone()
        values = _values(copy)
        self.outputs = [v.name or "" for v in copy.graph.outputs]
        self.fed = {v.name or "" for v in copy.graph.inputs}
        for name in taps:
            if name not in self.outputs and name not in self.fed:
                copy.graph.outputs.append(values[name])
        self.shapes = {name: values[name].shape for name in taps}
        self.inputs = {v.name or "": v.shape for v in copy.graph.inputs}
        self.session = _session(copy)

    def __call__(self, feeds: Mapping[str, Tensor], callbacks: Sequence[Callable[[Tensor], None]]) -> dict[str, Tensor]:
        waiting = dict(zip(self.taps, callbacks, strict=True))
        for name in [n for n in waiting if n in self.fed]:
            waiting.pop(name)(feeds[name])
        chunks = self._chunks(list(waiting), feeds) or [[]]
        found: dict[str, Tensor] = {}
        for i, chunk in enumerate(chunks):
            results = self.session(feeds, list(dict.fromkeys([*(self.outputs if i == 0 else []), *chunk])))
            found = {name: results[name] for name in self.outputs} if i == 0 else found
            for name in chunk:
                waiting[name](results.pop(name) if name not in self.outputs else results[name])
        return found

    def _chunks(self, taps: list[str], feeds: Mapping[str, Tensor]) -> list[list[str]]:
        """Taps in order, each chunk as much as may be held."""
        given = [(shape, feeds[name].shape) for name, shape in self.inputs.items() if shape and name in feeds]
        sizes = {str(dim): size for shape, fed in given for dim, size in zip(shape, fed, strict=False)}
        chunks: list[list[str]] = []
        room = 0
        for name in taps:
            nbytes = 4
            for dim in self.shapes[name] or ():
                nbytes *= dim if isinstance(dim, int) else sizes.get(str(dim), max(sizes.values(), default=1))
            if not chunks or nbytes > room:
                chunks.append([])
                room = TAPPED_BYTES
            chunks[-1].append(name)
            room -= nbytes
        return chunks


class Part:
    """Some values from the inputs and from given values; what only those need is cut away."""

    def __init__(self, model: ir.Model, given: tuple[str, ...], wanted: tuple[str, ...]) -> None:
        self.given, self.wanted = given, wanted
        copy = model.clone()
        values = _values(copy)
        fed = {v.name or "" for v in copy.graph.inputs} | {*given}
        copy.graph.outputs[:] = [values[name] for name in dict.fromkeys(wanted) if name not in fed]
        for i, name in enumerate(given):
            old = values[name]
            new = ir.Value(name=f"given.{i}", shape=old.shape, type=old.type or ir.TensorType(ir.DataType.FLOAT))
            copy.graph.inputs.append(new)
            old.replace_all_uses_with(new)
        self.session = _session(copy) if copy.graph.outputs else None

    def __call__(self, feeds: Mapping[str, Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        """`given` in the order of the names."""
        fed = {f"given.{i}": tensor for i, tensor in enumerate(given)}
        found = self.session({**feeds, **fed}) if self.session is not None else {}
        return [{**feeds, **dict(zip(self.given, given, strict=True)), **found}[name] for name in self.wanted]


def _values(model: ir.Model) -> dict[str | None, ir.Value]:
    return {v.name: v for v in [*model.graph.inputs, *(o for node in model.graph for o in node.outputs)]}


def _session(model: ir.Model) -> Session:
    """Of a copy that may be changed."""
    passes.RemoveUnusedNodesPass()(model)
    if needs_widening(model):
        widen(model)
    attach(model)
    with loadable(model) as source:
        return Session(source, torch.get_num_threads(), faithful=True)
