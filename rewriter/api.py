"""The Python API: the command line's job on models in memory or on disk, and single passes on graphs that you hold."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rewriter import pipeline
from rewriter.errors import RewriteError
from rewriter.inputs import InputSpec
from rewriter.options import Options
from rewriter.pipeline import Result
from rewriter.rule import AbstractPass

Passes = str | Sequence[str | AbstractPass]
Inputs = Sequence[str | InputSpec | Tensor] | Mapping[str, Tensor] | None


def rewrite(
    model: Any, passes: Passes = "auto,pre-merge", inputs: Inputs = None, target: str | None = None, data: Any = None, **options: Any
) -> Result:
    """Rewrite a model: a path, nn.Module, GraphModule, ExportedProgram or onnx_ir.Model.

    passes: as on the command line, or a list of such and of pass objects. inputs: specifications such as "ids:int64[batch,seq]", or example
    tensors whose first axis then is dynamic; formats that know their inputs need none. data: a path as for --data, a mapping of arrays
    (axis 0 counts samples), or a list of lines for a folder with a tokenizer. Other options are those of `Options` (tokens may be numbers
    too); with `out` the file is written there, else `result.save(path)` writes it. Raises RewriteError for bad input; a run that found
    nothing has `result.exit_code` 1.
    """
    objects, given = _objects(passes), _options(model, passes, inputs, target, data, options)
    return pipeline.rewrite(model, given, _data(data), publish_to_out=given.out is not None, passes=objects)


def plan(
    model: Any, passes: Passes = "auto,pre-merge", inputs: Inputs = None, target: str | None = None, data: Any = None, **options: Any
) -> Result:
    """What `rewrite` would do, without emitting anything; arguments as there."""
    objects = _objects(passes)
    return pipeline.plan(model, _options(model, passes, inputs, target, data, options), _data(data), passes=objects)


def apply(passes: Passes, model: Any, inputs: Inputs = None, data: Any = None, **options: Any) -> Any:
    """Run passes alone on a GraphModule, Module, ExportedProgram or onnx_ir.Model and give back the same kind, rewritten: no file, no
    timing.

    An ExportedProgram comes back in plain aten, a module as a GraphModule, an onnx_ir.Model with one function for each structure.
    """
    result = plan(model, passes, inputs, data=data, **options)
    assert result.graph is not None
    if result.graph.format == "onnx" or isinstance(model, nn.Module):
        return result.module
    torch_target = importlib.import_module("rewriter.backends.fx.target")
    return torch_target.lower(result.graph)


def dynamic_adapters(model: Any, adapters: Sequence[str | Path], out: str | Path, inputs: Inputs = None, **options: Any) -> list[Path]:
    """The model as an .onnx with room for adapters, and a .onnx_adapter beside it for each of peft's folders: the files, the model first.

    A session of the model runs the base; with `run_options.add_active_adapter(adapter)`, an onnxruntime.LoraAdapter of one of the files, it
    runs that adapter, whatever its rank. Strengths are written as on the command line, "DIR=0.5"; other options are those of `Options`,
    such as energy=0.95: each linear's update at the least rank that keeps this share of it.
    Raises RewriteError for bad input, for an adapter that does not fit or cannot be swapped at run time (DoRA, whole modules), and
    where a session is off from the model with the adapter beside its linears; nothing is written then.
    """
    given = _options(model, "", inputs, None, None, {**options, "adapters": tuple(map(str, adapters)), "out": str(out)})
    return [file.path for file in importlib.import_module("rewriter.backends.onnx.dynamic").write(model, given)]


def block_lora(
    module: nn.Module, targets: Sequence[str], rank: int = 8, blocks: int = 2, alpha: float | None = None, reading: str = "rank"
) -> Any:
    """Block-LoRA on linears of a module, to be trained: in place; all else is frozen. Gives what has parameters, fold, save, counts.

    targets: paths of linears, or how they end. reading: "rank", dW = (B_1 + ... + B_n) A_s, which folds to a LoRA of rank rank / blocks; or
    "input", A_s on the sum of the input's blocks, which keeps the rank. s = alpha / rank, 1 by default. `save(folder)` writes the folded
    adapter as peft does, for peft and for --adapter. RewriteError where nothing matches, or blocks do not divide what they are blocks of.
    """
    tuning: Any = importlib.import_module("rewriter.backends.tuning.block_lora")
    return tuning.block_lora(module, targets, rank, blocks, alpha, reading)


def inference_session(path: str | Path, sess_options: Any = None, providers: Sequence[Any] | None = None) -> Any:
    """An ordinary onnxruntime.InferenceSession of a rewritten .onnx whose structured layers run in this package's kernels.

    Arguments as onnxruntime.InferenceSession has them; the file is not changed. The kernels are compiled on first use; where they cannot be
    had (no compiler, an old ONNX Runtime) a RuntimeWarning says why and everything runs on stock operators, as do layers that no kernel
    covers. Raises RewriteError for a file that is no proper ONNX model.
    """
    return importlib.import_module("rewriter.backends.kernels.session").inference_session(path, sess_options, providers)


def _objects(passes: Passes) -> list[AbstractPass] | None:
    """The passes as objects where some were given as such."""
    from rewriter.registry import parse_passes

    if isinstance(passes, str):
        return None
    for item in passes:
        if not isinstance(item, str | AbstractPass):
            raise RewriteError(f"passes holds a {type(item).__name__}; give spellings such as 'low-rank:rank=8', or pass objects")
    return [p for item in passes for p in ([item] if isinstance(item, AbstractPass) else parse_passes(item))]


def _options(model: Any, passes: Passes, inputs: Inputs, target: str | None, data: Any, options: dict[str, Any]) -> Options:
    spelled = passes if isinstance(passes, str) else ",".join(p if isinstance(p, str) else p.spelling() for p in passes)
    path = str(data) if isinstance(data, str | Path) else None
    plain: dict[str, Any] = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    if isinstance(counts := plain.get("tokens"), int | Sequence) and not isinstance(counts, str):
        plain["tokens"] = ",".join(map(str, [counts] if isinstance(counts, int) else counts))
    plain = {"quiet": True, **plain, "passes": spelled, "inputs": _specs(model, inputs), "target": target, "data": path}
    try:
        return Options(**plain)
    except TypeError as error:
        raise RewriteError(
            f"{str(error).replace('Options.__init__()', 'rewrite()')}; the options are the fields of rewriter.Options"
        ) from None


def _data(data: Any) -> Any:
    return None if isinstance(data, str | Path) else data


def _specs(model: Any, inputs: Inputs) -> tuple[str, ...]:
    """Specifications from what was given; example tensors take the names of forward's parameters."""
    if inputs is None:
        return ()
    if isinstance(inputs, Mapping):
        return tuple(_of_tensor(name, tensor) for name, tensor in inputs.items())
    names = list(inspect.signature(model.forward).parameters) if isinstance(model, nn.Module) else []
    found = []
    for position, item in enumerate(inputs):
        if isinstance(item, Tensor):
            found.append(_of_tensor(names[position] if position < len(names) else f"input_{position}", item))
        else:
            found.append(str(item))
    return tuple(found)


def _of_tensor(name: str, tensor: Tensor) -> str:
    dims = ["batch", *map(str, tensor.shape[1:])] if tensor.dim() else []
    return f"{name}:{str(tensor.dtype).removeprefix('torch.')}[{','.join(dims)}]"
