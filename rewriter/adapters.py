"""Adapters on a graph: each module of an adapter finds its linear, or the run ends with both names.

A linear gets y + U (D x) (+ c) as plain operations beside it, which `merge-lora` may take in. DoRA's rows, whose lengths are set by
m / |W + U D|, are constants once it is trained: the weight is rescaled where it is stored, and U with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.graph import Graph, Site, is_turned, load_weight, put_matrix
from rewriter.thin import thin
from rewriter.tolerances import EXACT


@dataclass(frozen=True)
class Update:
    """What a linear's weight gains: U D, each scale folded into U."""

    down: Tensor  # (r, n)
    up: Tensor  # (m, r)
    shift: Tensor | None = None  # (m,), what its bias gains
    magnitude: Tensor | None = None  # (m,), the lengths of the rows of W + U D


@dataclass(frozen=True)
class Adapter:
    """An adapter as read: changes by module path, whole tensors by name."""

    folder: str
    scale: float
    updates: Mapping[str, Update]
    saved: Mapping[str, Tensor]

    def misfit(self, text: str) -> RewriteError:
        """What does not fit the model, both names in it."""
        return RewriteError(f"--adapter {self.folder}: {text}; give the base model that the adapter was made for")


@dataclass(frozen=True)
class Reduced:
    """An adapter at the least ranks that keep a share of its change."""

    adapter: Adapter
    ranks: tuple[int, int]  # before and after, summed over its linears
    lost: float  # |dW - dW'| / |dW| of all linears together


def reduced(adapter: Adapter, energy: float) -> Reduced:
    """Each linear's update at the least rank that keeps this share of |U D|^2. RewriteError where a factor holds NaN or inf."""
    updates, before, after, gone, norm = {}, 0, 0, 0.0, 0.0
    for path, update in adapter.updates.items():
        if not bool(update.down.isfinite().all() and update.up.isfinite().all()):
            raise RewriteError(f"--adapter {adapter.folder}: the factors of {path!r} hold NaN or inf; train it again")
        found, level = thin(update.down, update.up), EXACT[update.down.dtype]
        rank = min(len(update.down), max(1, found.keeping(energy, level)))
        down, up = (update.down, update.up) if rank == len(update.down) else (f.float() for f in found.truncated(rank))
        updates[path] = replace(update, down=down, up=up)
        before, after = before + len(update.down), after + rank
        gone, norm = math.hypot(gone, found.gone(rank)), math.hypot(norm, found.norm)
    return Reduced(replace(adapter, updates=updates), (before, after), gone / max(norm, 1e-300))


def matched(sites: Sequence[Site], adapter: Adapter) -> dict[str, Site]:
    """The linear of each module. RewriteError with both names where there is none, or one of another shape."""
    linears = [site for site in sites if site.kind == "linear"]
    found = {path: _named(adapter, path, linears, "linear") for path in adapter.updates}
    for path, update in adapter.updates.items():
        _check_fit(adapter, path, update, found[path])
    return found


def attach(graph: Graph, sites: Sequence[Site], adapter: Adapter) -> dict[str, str]:
    """In place; returns which stored parameter each key of the adapter went to. RewriteError with both names where one does not fit."""
    found = matched(sites, adapter)
    for path, site in found.items():
        _branch(graph, adapter, path, site, adapter.updates[path])
    manifest = {path: found[path].weights["weight"].name if found[path].weights else found[path].name for path in adapter.updates}
    linears = [site for site in sites if site.kind == "linear"]
    return manifest | {name: _replaced(graph, adapter, name, tensor, linears) for name, tensor in adapter.saved.items()}


def _named(adapter: Adapter, path: str, sites: Sequence[Site], what: str) -> Site:
    """By the longest tail of the path that one site's name ends with: the adapter, or the model, may have a prefix that the other lacks."""
    parts = path.split(".")
    for cut in range(len(parts)):
        tail = ".".join(parts[cut:])
        found = [site for site in sites if site.name == tail or site.name.endswith(f".{tail}")]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(site.name for site in found[:3])
            raise adapter.misfit(f"{path!r} fits {len(found)} of the model's sites ({names})")
        if cut + 2 >= len(parts) > 2:
            break  # one word says too little
    some = ", ".join(site.name for site in sites[:3])
    raise adapter.misfit(f"{path!r} is no {what} of the model, which has {some or 'none'}…")


def _check_fit(adapter: Adapter, path: str, update: Update, site: Site) -> None:
    assert site.shape is not None
    m, n = site.shape
    lengths = [len(t) for t in (update.shift, update.magnitude) if t is not None]
    if update.up.shape[0] != m or update.down.shape[1] != n or any(length != m for length in lengths):
        given = f"{path!r} maps {update.down.shape[1]} to {update.up.shape[0]} features"
        raise adapter.misfit(f"{given}, {site.name!r} of the model {n} to {m}")


def _branch(graph: Graph, adapter: Adapter, path: str, site: Site, update: Update) -> None:
    assert site.dtype is not None
    down, up = update.down.double(), update.up.double()
    if update.magnitude is not None:
        ref = site.weights["weight"]
        if site.reason or len(graph.storage_users(ref.value)) != len(site.places) or not is_turned(graph, ref.value):
            why = site.reason or "its weight is not stored for it alone"
            raise adapter.misfit(f"{path!r} is DoRA, which rescales the weight of {site.name!r}: {why}")
        weight = load_weight(graph, site).double()
        lengths = update.magnitude.double() / (weight + up @ down).norm(dim=1)
        put_matrix(graph, ref, (lengths[:, None] * weight).to(site.dtype))
        up = lengths[:, None] * up
    shift = None if update.shift is None else update.shift.to(site.dtype)
    graph.branch(site, down.to(site.dtype), up.to(site.dtype), shift)


def _replaced(graph: Graph, adapter: Adapter, name: str, tensor: Tensor, linears: Sequence[Site]) -> str:
    """A stored parameter under that name, or that of a linear whose weight lost its own, holds another tensor."""
    path, _, last = name.rpartition(".")
    stored = graph.parameters()
    tails = [".".join(name.split(".")[cut:]) for cut in range(name.count("."))]
    held = next((n for tail in tails for n in stored if n == tail or n.endswith(f".{tail}")), None)
    if held is not None:
        old = graph.const(stored[held])
        assert old is not None
        if old.shape != tensor.shape:
            raise adapter.misfit(f"{name!r} is {list(tensor.shape)}, {held!r} of the model {list(old.shape)}")
        graph.put(stored[held], tensor.to(old.dtype))
        return held
    if last == "weight" and tensor.dim() == 2:
        site = _named(adapter, path, linears, "parameter")
        if site.shape == tuple(tensor.shape) and is_turned(graph, site.weights["weight"].value):
            put_matrix(graph, site.weights["weight"], tensor.to(load_weight(graph, site).dtype))
            return site.weights["weight"].name
    raise adapter.misfit(f"{name!r} is no parameter of the model")
