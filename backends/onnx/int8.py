"""The dynamic int8 form that a user already has: onnxruntime's own quantiser on the dense model, weights per channel, MatMul and Gemm."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as passes

from rewriter.backends.files.archive import one_line
from rewriter.backends.files.onnx_file import load_onnx
from rewriter.backends.onnx.run import MAX_PROTO, Session
from rewriter.backends.onnx.shapes import infer
from rewriter.backends.onnx.widen import HALVES, widen
from rewriter.errors import RewriteError


def open_int8(path: Path, threads: int) -> Session:
    """A session over the quantised model; RewriteError where it cannot be had."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[attr-defined]

    with tempfile.TemporaryDirectory(prefix="rewriter-") as folder:
        source, result = Path(folder) / "dense.onnx", Path(folder) / "int8.onnx"
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
            return Session(str(result), threads)
        except Exception as problem:
            raise RewriteError(f"onnxruntime cannot quantise the dense model: {one_line(problem)}") from problem
        finally:
            logging.root.setLevel(before)


def _batched(model: ir.Model) -> list[str]:
    """Products with stored weights of more than two axes: quantised per channel, they load and then fail at run time."""
    products = [node for node in model.graph.all_nodes() if node.op_type == "MatMul"]
    stored = {n.name or "": [v.const_value.shape for v in n.inputs if v is not None and v.const_value is not None] for n in products}
    return [name for name, shapes in stored.items() if any(shape.rank() > 2 for shape in shapes)]


def _prepared(path: Path, target: Path) -> tuple[ir.Model, bool]:
    """The model with its functions inlined (their bodies are not quantised), saved at `target`. True where it is large."""
    model = load_onnx(path)
    passes.InlinePass()(model)
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
