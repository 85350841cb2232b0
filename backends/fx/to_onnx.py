"""An exported program to onnx_ir: every opaque site becomes one `structured::Site` node, which the ONNX backend turns into a function call.

torch.onnx.export inlines functions always, so no body travels through it: only the opaque node, its spec and its factors.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from onnxscript import BFLOAT16, DOUBLE, FLOAT, FLOAT16, values

from rewriter.backends.files.archive import one_line
from rewriter.backends.files.onnx_file import whole_sizes
from rewriter.backends.fx.custom_op import MAP, SITE
from rewriter.backends.fx.trace import symbolic_recurrences
from rewriter.errors import RewriteError
from rewriter.operator import skeleton

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

T = TypeVar("T", FLOAT, FLOAT16, BFLOAT16, DOUBLE)
MAX_OPSET = 25


def _site_op(outputs: int = 1) -> values.Op:
    import onnx

    schema = onnx.defs.OpSchema
    formal = schema.FormalParameter
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    opaque = schema(
        "Site",
        "structured",
        1,
        inputs=[formal("values", "V", param_option=schema.FormalParameterOption.Variadic, is_homogeneous=False)],
        outputs=[formal(f"y{i}", "T") for i in range(outputs)],
        type_constraints=[("T", floats, ""), ("V", [*floats, "tensor(int64)", "tensor(uint8)", "tensor(bool)"], "")],
        attributes=[schema.Attribute(name, schema.AttrType.STRING, "") for name in ("spec", "site", "map")],
    )
    return values.Op(values.Opset("structured", 1), "Site", opaque)


def _translate(x: T, factors: Sequence[T], spec: str, width: int, name: str) -> T:
    return _site_op()(x, *factors, spec=spec, site=name, map="")  # type: ignore[no-any-return]


def _translate_map(inputs: Sequence[T], factors: Sequence[T], spec: str, name: str) -> Sequence[T]:
    count = len(skeleton(spec)[0].outputs())  # type: ignore[attr-defined]
    found = _site_op(count)(*inputs, *factors, spec=spec, site=name, map="map")
    return [found] if count == 1 else list(found)


def to_onnx(program: ExportedProgram, opset: int, output_names: Sequence[str]) -> ir.Model:
    """The model with its weights, opaque sites, dynamic dimensions and names; RewriteError when the exporter cannot say an operation."""
    with _quiet(), symbolic_recurrences():
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                output_names=list(output_names),
                custom_translation_table={SITE: _translate, MAP: _translate_map},
                verbose=False,
            )
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            first = one_line(cause) or type(error).__name__
            raise RewriteError(f"torch.onnx cannot export this model: {first}; write a .pt2 with --target torch instead") from error
    assert exported is not None
    whole_sizes(exported.model)
    return exported.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns of packages that this model does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
