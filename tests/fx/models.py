"""Modules from a function and its parts, their graphs, and the law of a site: y = unfold(fold(x) W^T + bias)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rewriter import registry
from rewriter.algebra import Dense
from rewriter.backends.files.recurrent import whole_recurrences
from rewriter.backends.fx.graph import FxGraph
from rewriter.graph import Place, Site, load_weight
from rewriter.tolerances import EQUAL

BATCH = 4  # traced with; OTHER is run at
OTHER = 3


class Net(nn.Module):
    """forward(x) = function(self, x); tensors among the parts become parameters."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part.clone()) if isinstance(part, Tensor) and part.is_floating_point() else part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Together(nn.Module):
    """Many nets on one input: one export for all of them; net i is called `nets.i`."""

    def __init__(self, nets: Iterable[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> list[Any]:
        return [net(x) for net in self.nets]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def export(module: nn.Module, x: Tensor, dynamic: bool = True) -> ExportedProgram:
    with torch.no_grad(), whole_recurrences():
        return torch.export.export(module.eval(), (x,), dynamic_shapes=({0: Dim.AUTO},) if dynamic else None, strict=False)


def graph(function: Callable[[Any, Tensor], Any] | nn.Module, x: Tensor, dynamic: bool = True, **parts: Any) -> FxGraph:
    module = function if isinstance(function, nn.Module) else Net(function, **parts)
    return FxGraph.of(export(module, x, dynamic))


def sites(g: FxGraph, kind: str = "") -> list[Site]:
    return [s for s in registry.sites(g) if not kind or s.kind == kind]


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal within the dtype's row of the table; values of order one."""
    rtol, atol = EQUAL[expected.dtype] if expected.is_floating_point() else (0.0, 0.0)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        close(actual[name], expected[name])


def product(place: Place, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a place computes, by its layout."""
    layout = place.layout
    x = x.permute(layout.before) if layout.before else x
    y = x.flatten(-layout.join) @ weight.T if layout.join > 1 else x @ weight.T
    y = y if bias is None else y + bias * place.bias_scale
    y = y.unflatten(-1, layout.spread) if layout.spread else y
    return y.permute(layout.after) if layout.after else y


def obeys_law(g: FxGraph, site: Site, feeds: Mapping[str, Tensor]) -> None:
    """load_weight applied to what each place reads equals what it gives."""
    seen: dict[Any, Tensor] = {}
    for place in site.places:
        wanted = {v for v in (place.x, place.y, place.bias) if v is not None and not g.is_const(v)}
        g.run(feeds, {v: lambda t, v=v: seen.__setitem__(v, t) for v in wanted})  # type: ignore[misc]
        weight = load_weight(g, site)
        assert weight.shape == site.shape
        bias = None if place.bias is None else g.const(place.bias) if g.is_const(place.bias) else seen[place.bias]
        close(product(place, seen[place.x], weight, bias), seen[place.y])


def dense(g: FxGraph, site: Site) -> Dense:
    return Dense(load_weight(g, site).T.contiguous())


def splices(g: FxGraph, found: list[Site], feeds: Mapping[str, Tensor]) -> FxGraph:
    """Dense forms of all these sites: same outputs under the same names, the old weights gone; gives the pruned clone."""
    before = g.run(feeds)
    forms = [dense(g, site) for site in found]
    for site, form in zip(found, forms, strict=True):
        g.splice(site, form)
    same(g.run(feeds), before)
    clean = g.clone()
    clean.prune()
    same(clean.run(feeds), before)
    held = [n for n in clean.nodes() if clean.op(n) == "structured"]
    assert len(held) == sum(len(site.places) for site in found)
    stored = {name for site in found for name in [site.weights["weight"].name] if not site.weights["weight"].shared_by}
    assert not stored & set(clean.program.state_dict)
    return clean
