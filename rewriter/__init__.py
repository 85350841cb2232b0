"""A structure compiler for trained models: finds dense linears, replaces them by structured equivalents, certifies and measures what that
did.

    import rewriter
    result = rewriter.rewrite(module, passes=["auto:params=0.5"], inputs=["ids:int64[batch,seq]"])
    result.module, result.report, result.save("model.pt2")

Names are imported when first used, so that `import rewriter` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewriter.api import apply as apply
    from rewriter.api import block_lora as block_lora
    from rewriter.api import dynamic_adapters as dynamic_adapters
    from rewriter.api import inference_session as inference_session
    from rewriter.api import plan as plan
    from rewriter.api import rewrite as rewrite
    from rewriter.errors import RewriteError as RewriteError
    from rewriter.operator import AbstractMatrix as AbstractMatrix
    from rewriter.options import Options as Options
    from rewriter.pipeline import Result as Result
    from rewriter.rule import AbstractPass as AbstractPass
    from rewriter.structure import AbstractStructure as AbstractStructure

_WHERE = {
    "apply": "api",
    "block_lora": "api",
    "dynamic_adapters": "api",
    "inference_session": "api",
    "plan": "api",
    "rewrite": "api",
    "RewriteError": "errors",
    "AbstractMatrix": "operator",
    "Options": "options",
    "Result": "pipeline",
    "AbstractPass": "rule",
    "AbstractStructure": "structure",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rewriter' has no attribute '{name}'")
    return getattr(importlib.import_module(f"rewriter.{_WHERE[name]}"), name)
