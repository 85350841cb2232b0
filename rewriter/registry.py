"""Finds structures, passes, detectors, readers and targets by walking the rooms and by entry points; nothing is registered by hand.

A third-party package adds a structure or a pass as one file named by an entry point in the group `rewriter.plugins`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pkgutil
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from rewriter.errors import RewriteError

if TYPE_CHECKING:
    from rewriter.graph import Graph, Site

TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _import_folder(package: str) -> list[Any]:
    root = importlib.import_module(package)
    return [importlib.import_module(f"{package}.{m.name}") for m in pkgutil.iter_modules(root.__path__) if not m.name.startswith("_")]


@functools.cache
def load_structures() -> None:
    """Import every structure: the core's atoms, passes/structures/, and installed plug-ins."""
    importlib.import_module("rewriter.algebra")
    importlib.import_module("rewriter.quantised")
    _import_folder("rewriter.passes.structures")
    load_plugins()


@functools.cache
def load_plugins() -> None:
    """Import what installed packages name under `rewriter.plugins`."""
    for entry in entry_points(group="rewriter.plugins"):
        entry.load()


def eager_ops() -> Any:
    """The oracle interpretation."""
    return importlib.import_module("rewriter.backends.eager").EagerOps()


def counted(operator: Any, tokens: int) -> Any:
    """The cost of a map."""
    return importlib.import_module("rewriter.backends.counting").counted(operator, tokens)


def structures() -> dict[str, Any]:
    """Every structure family by its name on the command line."""
    from rewriter.structure import AbstractStructure

    load_structures()
    return dict(sorted(AbstractStructure.kinds.items()))


def passes() -> dict[str, Any]:
    """Every pass class by name, without the generic one that structures share."""
    from rewriter.rule import AbstractPass

    load_structures()
    _import_folder("rewriter.passes")
    return {name: kind for name, kind in sorted(AbstractPass.kinds.items()) if name != "structure"}


def detectors() -> list[Any]:
    """Every `detect(graph) -> sites` function in passes/detect/."""
    return [m.detect for m in _import_folder("rewriter.passes.detect") if hasattr(m, "detect")]


def sites(graph: Graph) -> list[Site]:
    """All that they find in a graph."""
    return [site for detect in detectors() for site in detect(graph)]


def targets() -> dict[str, Any]:
    """Every target by name; the runtimes are imported when one is used."""
    modules = {"torch": "fx.target:TorchTarget", "onnx": "onnx.target:OnnxTarget", "onnxruntime": "onnx.target:OnnxRuntimeTarget"}
    return {name: functools.partial(_make, where) for name, where in modules.items()}


def _make(where: str, provider: str = "CPUExecutionProvider", kernels: bool = False) -> Any:
    module, kind = where.split(":")
    return getattr(importlib.import_module(f"rewriter.backends.{module}"), kind)(provider, kernels)


def parse_passes(text: str) -> list[Any]:
    """`auto:params=0.5,pre-merge` as passes; RewriteError names what is unknown and what there is."""
    return [_parse_pass(part.strip()) for part in text.split(",") if part.strip()]


def _parse_pass(text: str) -> Any:
    name, *options = text.split(":")
    if name in passes():
        return _construct(passes()[name], name, options)
    if name not in structures():
        known = ", ".join([*passes(), *structures()])
        raise RewriteError(f"unknown pass '{name}'; there are: {known}")
    generic = importlib.import_module("rewriter.passes.structured").StructurePass
    share = [o for o in options if o.startswith("params=")]
    structure = _construct(structures()[name], name, [o for o in options if o not in share], ("params",))
    if len(share) > 1:
        raise RewriteError(f"{name}:params is given twice; give it once")
    params = _value(name, "params", share[-1].partition("=")[2], "float") if share else None
    return generic(structure=structure, params=params)


def _construct(kind: Any, name: str, options: list[str], besides: tuple[str, ...] = ()) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    given = {}
    for option in options:
        key, equals, value = option.partition("=")
        field = fields.get(key.replace("-", "_"))
        if field is None or not equals:
            allowed = ", ".join([*(f.replace("_", "-") for f in fields), *besides]) or "none"
            raise RewriteError(f"'{option}' is no option of {name}; options are written {name}:OPTION=VALUE and there are: {allowed}")
        if field.name in given:
            raise RewriteError(f"{name}:{key} is given twice; give it once")
        given[field.name] = _value(name, key, value, str(field.type))
    return kind(**given)


def _value(name: str, key: str, text: str, kind: str) -> Any:
    convert: Any = int if "int" in kind else float if "float" in kind else str
    if "bool" in kind:
        if text.lower() not in TRUTHS:
            raise RewriteError(f"{name}:{key}={text} cannot be read; give true or false")
        return TRUTHS[text.lower()]
    try:
        value = convert(text)
    except ValueError:
        raise RewriteError(f"{name}:{key}={text} cannot be read; give {'a whole number' if convert is int else 'a number'}") from None
    if convert is float and not math.isfinite(value):
        raise RewriteError(f"{name}:{key}={text} is out of range; give a finite number")
    if convert is int and value < 1:
        raise RewriteError(f"{name}:{key}={text} is out of range; give a whole number of at least 1")
    return value
