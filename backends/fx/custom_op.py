"""structured::site(x, factors, spec, width), for maps structured::map(inputs, factors, spec): one opaque node per rewritten site, until
emission lowers it.

The spec (see rewriter.operator.flatten) names the operator, the factors are its tensors; so the node holds the operator and nothing else
has to. Importing this module defines the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.backends.eager import EagerOps
from rewriter.backends.fx.native import NATIVE
from rewriter.operator import AbstractMap, unflatten

LIBRARY = torch.library.Library("structured", "DEF")
LIBRARY.define("site(Tensor x, Tensor[] factors, str spec, int width, str name) -> Tensor")


def body(x: Tensor, factors: Sequence[Tensor], spec: str, width: int, name: str) -> Tensor:
    """The product in plain aten: what eager runs, what autograd sees, and what lowering traces."""
    (y,) = unflatten(spec, list(factors)).apply(EagerOps(), x)
    assert isinstance(y, Tensor)
    return y


class TorchOps(EagerOps):
    """With torch's own operators for what stands inside a map."""

    def attend(self, attention: Any, *inputs: Tensor) -> Tensor:
        return NATIVE["Attention"](attention, *inputs)[0]


def map_body(inputs: Sequence[Tensor], factors: Sequence[Tensor], spec: str, name: str) -> list[Tensor]:
    """The same for a map: by torch's own operator, else in the form that is meant to be fast."""
    operator = unflatten(spec, list(factors))
    native = NATIVE.get(type(operator).__name__)
    found = native(operator, *inputs) if native else operator.apply(TorchOps(), *inputs)
    # an operator of torch may give no input back, nor one tensor twice
    return [y.clone() if any(y is x for x in inputs) else y for y in found]


def fake_map(inputs: Sequence[Tensor], factors: Sequence[Tensor], spec: str, name: str) -> list[Tensor]:
    """Its outputs' shapes."""
    operator = unflatten(spec, list(factors))
    assert isinstance(operator, AbstractMap)
    given = reversed(list(zip(inputs, operator.inputs().values(), strict=True)))  # the first says it: masks may bring a batch of their own
    sizes = {dim: n for x, dims in given for dim, n in zip(dims, x.shape, strict=True)}
    return [inputs[0].new_empty([n if isinstance(n, int) else sizes[n] for n in dims]) for dims in operator.outputs().values()]


def _fake(x: Tensor, factors: Sequence[Tensor], spec: str, width: int, name: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], width))


LIBRARY.define("map(Tensor[] inputs, Tensor[] factors, str spec, str name) -> Tensor[]")
LIBRARY.impl("map", map_body, "CompositeExplicitAutograd")
torch.library.register_fake("structured::map", fake_map, lib=LIBRARY)
LIBRARY.impl("site", body, "CompositeExplicitAutograd")
torch.library.register_fake("structured::site", _fake, lib=LIBRARY)
SITE = torch.ops.structured.site.default
MAP = torch.ops.structured.map.default
