"""The dynamic int8 form that a user already has: onnxruntime's own quantiser on the dense model, weights per channel, MatMul and Gemm.

A weight behind constant operations, such as the transposed table of a tied output layer, is stored as what they make of it, as exporters
and the quantiser's own preparation do: of a weight that is computed the quantiser knows nothing.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from rewriter.backends.files.archive import one_line
from rewriter.backends.files.onnx_file import load_onnx
from rewriter.backends.onnx.constants import Constants
from rewriter.backends.onnx.edit import Names, store
from rewriter.backends.onnx.run import MAX_PROTO, Session
from rewriter.backends.onnx.shapes import infer
from rewriter.backends.onnx.widen import HALVES, widen
from rewriter.errors import RewriteError


def open_int8(path: Path, threads: int) -> Session:
    """A session over the quantised model; RewriteError where it cannot be had."""
    with tempfile.TemporaryDirectory(prefix="rewriter-") as folder:
        return Session(str(quantise(path, Path(folder) / "int8.onnx")), threads)


def quantise(path: Path, result: Path) -> Path:
    """The quantised model as the file `result`; RewriteError where it cannot be had."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory(prefix="rewriter-") as folder:
        source = Path(folder) / "dense.onnx"
        model, large = _prepared(path, source)
        before = logging.root.level
        logging.root.setLevel(logging.ERROR)  # the quantiser warns on the root logger
        try:
            quantize_dynamic(
                source,
                result,
                ["MatMul", "Gemm"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=_batched(model),
                use_external_data_format=large,
                extra_options={"MatMulConstBOnly": True},
            )
            return result
        except Exception as problem:
            raise RewriteError(f"onnxruntime cannot quantise the dense model: {one_line(problem)}") from problem
        finally:
            logging.root.setLevel(before)


def _batched(model: ir.Model) -> list[str]:
    """Products with stored weights of more than two axes: quantised per channel, they load and then fail at run time."""
    products = [node for node in model.graph.all_nodes() if node.op_type == "MatMul"]
    stored = {n.name or "": [v.const_value.shape for v in n.inputs if v is not None and v.const_value is not None] for n in products}
    return [name for name, shapes in stored.items() if any(shape.rank() > 2 for shape in shapes)]


def _store_computed(model: ir.Model) -> None:
    """Weights of products that are computed from stored tensors alone become stored ones."""
    constants, names = Constants(model.graph.opset_imports.get("", 20)), Names(model)
    made: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph.all_nodes()):
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") and not node.domain else None
        if weight is None or weight.is_initializer() or not constants.is_const(weight):
            continue
        if weight not in made:
            made[weight] = store(model, names, constants.load(weight), f"{weight.name}.stored")
        node.replace_input_with(1, made[weight])
    passes.RemoveUnusedNodesPass()(model)


def _prepared(path: Path, target: Path) -> tuple[ir.Model, bool]:
    """The model with its functions inlined (their bodies are not quantised), saved at `target`. True where it is large."""
    model = load_onnx(path)
    passes.InlinePass()(model)
    _store_computed(model)
    widen(model, HALVES)  # the quantiser's operators take float32 alone
    infer(model)
    passes.NameFixPass()(model)
    large = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None) > MAX_PROTO
    if large:
        ir.save(model, target, external_data=f"{target.name}.data")
    else:
        ir.external_data.load_to_model(model)
        ir.save(model, target)
    return model, large
