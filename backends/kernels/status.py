"""What `rewrite kernels` says: how kernels are built here, whether they are right, and what they would take of a model."""

from __future__ import annotations

from rewriter.backends.kernels.library import build, described
from rewriter.backends.kernels.session import coverage, trusted
from rewriter.backends.triton_kernels import device
from rewriter.table import clean, columns

WIDTH = 120
ACTIONS = ("status", "build")


def said(action: str, model: str | None) -> str:
    """The whole text; RewriteError where there is no compiler, or the kernels do not compile or are wrong."""
    if action == "build":
        build(force=True)
    found = described()
    machine = next((flag for flag in found.flags if flag.startswith("-m")), "any CPU of this kind")
    lines = [
        f"compiler  {found.compiler}",
        f"for       {machine}, threads {'by OpenMP' if '-fopenmp' in found.flags else 'only under ONNX Runtime'}",
        f"library   {found.path}",
        f"GPU       {device.said()}",
    ]
    if not found.ready and model is None:
        return "\n".join([*lines, "built     no; `rewrite kernels build` does it, as does the first session that needs them"])
    library = trusted()
    wide = f"{library.layout.lanes} floats a vector{', AMX for 8 bits' * library.matrices()}"
    lines.append(f"built     yes, {wide}; one layer under ONNX Runtime equals its plain form")
    return "\n".join([*lines, *(_covered(model) if model else [])])


def _covered(model: str) -> list[str]:
    """Each layer and its kernel, or why it has none."""
    found = coverage(model)
    if not found:
        return ["", f"{model} has no structured layers: kernels change nothing there"]
    rows = [(clean(c.site), clean(c.kind), _what(c.reason, c.fused)) for c in found]
    head, body = columns(("site", "structure", "kernel"), rows, WIDTH, [(0, 30)])
    taken = sum(not c.reason for c in found)
    outcome = f"{taken} of {len(found)} structured layers run in kernels under rewriter.inference_session"
    return ["", *head, *(line for row in body for line in row), "", outcome]


def _what(reason: str, fused: tuple[str, ...]) -> str:
    return f"no: {reason}" if reason else " + ".join(["yes", *fused])
