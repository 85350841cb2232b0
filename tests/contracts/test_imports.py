"""The dependency law and the documentation law, read from the source; and what `rewrite --help` may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = sorted((ROOT / "rewriter").glob("*.py"))
PASSES = sorted((ROOT / "passes").rglob("*.py"))
BACKENDS = sorted((ROOT / "backends").rglob("*.py"))
GRAPH_LIBRARIES = ("torch.fx", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that import statements anywhere in the tree name; `from a import b` names a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called_by_name(tree: ast.AST) -> Iterator[str]:
    """Strings handed to import_module, literal beginnings of f-strings included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ("import_module", "__import__") and node.args:
                first = node.args[0]
                first = first.values[0] if isinstance(first, ast.JoinedStr) else first
                if isinstance(first, ast.Constant):
                    yield str(first.value)


def attributes(tree: ast.AST) -> Iterator[str]:
    """Dotted names as they are used, such as torch.fx.Node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def under(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_searches_find_what_they_look_for() -> None:
    text = "import torch.fx as f\nfrom torch import fx\nfrom rewriter.backends.fx import graph\nimport_module(f'onnx.{x}')\ntorch.fx.Node"
    tree = ast.parse(text)
    assert {"torch.fx", "rewriter.backends.fx.graph"} <= set(imported(tree))
    assert list(called_by_name(tree)) == ["onnx."]
    assert "torch.fx.Node" in attributes(tree)
    assert len(ENGINE) > 20 and len(PASSES) > 10 and len(BACKENDS) > 20


@pytest.mark.parametrize("path", PASSES, ids=identity)
def test_passes_know_no_graph_library_and_no_backend(path: Path) -> None:
    tree = parsed(path)
    forbidden = (*GRAPH_LIBRARIES, "rewriter.backends", "backends")
    names = [*imported(tree), *called_by_name(tree), *(a for a in attributes(tree) if a.startswith("torch."))]
    assert not [n for n in names if under(n, forbidden)]


@pytest.mark.parametrize("path", BACKENDS, ids=identity)
def test_backends_know_no_pass(path: Path) -> None:
    tree = parsed(path)
    assert not [n for n in [*imported(tree), *called_by_name(tree)] if under(n, ("rewriter.passes", "passes"))]


@pytest.mark.parametrize("path", ENGINE, ids=identity)
def test_the_engine_names_neither_room_in_an_import(path: Path) -> None:
    assert not [n for n in imported(parsed(path)) if under(n, ("rewriter.passes", "rewriter.backends", "passes", "backends"))]


@pytest.mark.parametrize("path", [*ENGINE, *PASSES, *BACKENDS], ids=identity)
def test_every_module_opens_with_its_idea(path: Path) -> None:
    assert not path.read_text().strip() or ast.get_docstring(parsed(path))


WANTING = {"transform", "dim_size", "print_lines", "change"}  # each of these says nothing yet; none is to join them


def undocumented(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            yield node.name


@pytest.mark.parametrize("path", ENGINE, ids=identity)
def test_every_public_name_of_the_engine_is_documented(path: Path) -> None:
    assert set(undocumented(parsed(path))) <= WANTING


@pytest.mark.parametrize("path", PASSES, ids=identity)
def test_every_public_name_of_the_passes_is_documented(path: Path) -> None:
    assert not list(undocumented(parsed(path)))


HEAVY = ("torch", "onnx", "onnxruntime", "onnx_ir", "transformers", "scipy")
LIGHT = f"import sys; {{act}}; heavy = set({HEAVY}) & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
ACTS = ("import rewriter", "from rewriter import cli; cli.run(['--help'])", "from rewriter import cli; cli.run(['passes', '--help'])")


@pytest.mark.parametrize("act", ACTS)
def test_the_door_loads_nothing_heavy(act: str) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT.format(act=act)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_light_door_would_see_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT.format(act="import torch")], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "torch" in done.stderr
