"""structured::site(x, factors, spec, width): one opaque node per rewritten site, until emission lowers it.

The spec (see rewriter.operator.flatten) names the operator, the factors are its tensors; so the node holds the operator and nothing else
has to. Importing this module defines the op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.backends.eager import EagerOps
from rewriter.operator import unflatten

LIBRARY = torch.library.Library("structured", "DEF")
LIBRARY.define("site(Tensor x, Tensor[] factors, str spec, int width, str name) -> Tensor")


def body(x: Tensor, factors: Sequence[Tensor], spec: str, width: int, name: str) -> Tensor:
    """The product in plain aten: what eager runs, what autograd sees, and what lowering traces."""
    (y,) = unflatten(spec, list(factors)).apply(EagerOps(), x)
    assert isinstance(y, Tensor)
    return y


def _fake(x: Tensor, factors: Sequence[Tensor], spec: str, width: int, name: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


LIBRARY.impl("site", body, "CompositeExplicitAutograd")
torch.library.register_fake("structured::site", _fake, lib=LIBRARY)
SITE = torch.ops.structured.site.default
