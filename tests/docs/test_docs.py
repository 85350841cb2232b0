"""The pages say what the code does: options, passes, report fields and refusals are all there; links resolve and examples parse."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewriter import cli, registry
from rewriter.inputs import parse_dims, parse_input
from rewriter.options import Options
from rewriter.report import schema
from rewriter.versions import versions
from tests.docs.pages import ROOT, Page, pages
from tests.examples.conftest import imported

PAGES = pages()
LETTERS = {"R": ("rewrite", "plan"), "V": ("verify",), "B": ("bench",), "P": ("replay",), "A": ("adapters",)}
every_page = pytest.mark.parametrize("page", PAGES, ids=str)


def page(name: str) -> Page:
    return next(p for p in PAGES if p.name == name)


def own(kinds: dict[str, Any]) -> dict[str, Any]:
    """Those of this package: plug-ins bring their own pages."""
    return {name: kind for name, kind in kinds.items() if kind.__module__.startswith("rewriter.")}


STRUCTURES, PASSES = own(registry.structures()), own(registry.passes())


@pytest.fixture(scope="module", autouse=True)
def examples() -> Iterator[None]:
    """Examples may be named in examples."""
    kronecker, my_pass = imported("kronecker"), imported("my_pass")
    next(kronecker), next(my_pass)
    yield
    assert not list(my_pass)
    assert not list(kronecker)


def flags(command: str) -> set[str]:
    """The options of a command, without the one that shows its help."""
    options = [p for p in cli._commands()[command].params if p.param_type_name == "option"]
    return {flag for p in options for flag in [*p.opts, *p.secondary_opts]} - {"--help"}


def documented(command: str) -> set[str]:
    """The options whose row in docs/cli.md has the command's letter."""
    letter = next(letter for letter, names in LETTERS.items() if command in names)
    rows = [line.split(" | ") for line in page("docs/cli.md").text.splitlines() if line.startswith("| `-")]
    chosen = [row[0] for row in rows if row[1] == "all" or letter in row[1].split()]
    return {flag for cell in chosen for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", cell)}


@pytest.mark.parametrize("command", [name for names in LETTERS.values() for name in names])
def test_every_option_stands_under_its_command(command: str) -> None:
    assert documented(command) == flags(command)


def test_every_command_is_documented() -> None:
    said = page("docs/cli.md").text
    for name in cli._commands():
        assert f"rewrite {name}" in said or name == "rewrite"


def test_defaults_are_the_options_defaults() -> None:
    lines = [line for line in page("docs/cli.md").text.splitlines() if "| `--" in line]
    rows = {line.split("`")[1].split()[0]: line.split(" | ")[2].strip("`") for line in lines}
    for field in dataclasses.fields(Options):
        said = rows.get("--" + field.name.replace("_", "-"))
        if said is not None and field.default not in (None, ()) and not isinstance(field.default, bool):
            assert said == str(field.default), field.name


@pytest.mark.parametrize("name", [*PASSES, *STRUCTURES])
def test_every_pass_has_its_page_with_its_options(name: str) -> None:
    text = page(f"docs/passes/{name}.md").text
    kind = {**PASSES, **STRUCTURES}[name]
    wanted = {field.name for field in dataclasses.fields(kind)} | ({"params"} if name in STRUCTURES else set())
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)) == {option.replace("_", "-") for option in wanted}
    for listing in ("README.md", "docs/passes/README.md", "CHANGELOG.md"):
        assert name in page(listing).text


def test_no_page_is_of_a_pass_that_is_not() -> None:
    there = {p.path.stem for p in PAGES if p.name.startswith("docs/passes/")} - {"README"}
    assert there == {*PASSES, *STRUCTURES}


@every_page
def test_links_resolve(page: Page) -> None:
    for target in page.links():
        where, _, anchor = target.partition("#")
        path = (page.path.parent / where).resolve() if where else page.path
        assert path.exists(), target
        if anchor:
            assert anchor in Page(path.relative_to(ROOT).as_posix()).anchors(), target


@every_page
def test_named_files_exist(page: Page) -> None:
    for name in re.findall(r"`((?:rewriter|passes|backends|tests|examples|tools)/[\w/.]+)`", page.prose):
        assert (ROOT / name).exists(), name


@every_page
def test_command_lines_parse(page: Page) -> None:
    commands = cli._commands()
    for words in page.commands():
        name = words[0] if words[0] in commands else "rewrite"
        context = commands[name].make_context(name, words[name != "rewrite" :])
        options = cli._options(context.params)
        assert registry.parse_passes(options.passes)
        assert [parse_input(text) for text in options.inputs] or not options.inputs
        assert options.dims is None or parse_dims(options.dims)


@every_page
def test_python_examples_compile(page: Page) -> None:
    for block in page.blocks("python"):
        ast.parse(block)


def keys(node: Any) -> Iterator[str]:
    """Every property in a JSON schema, at any depth."""
    if isinstance(node, dict):
        yield from node.get("properties", {})
        for inner in node.values():
            yield from keys(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from keys(inner)


def test_every_report_field_is_explained() -> None:
    text = page("docs/report.md").text
    missing = [key for key in {*keys(schema())} if f"`{key}`" not in text]
    assert not missing
    assert not [name for name in versions() if name not in text]


def sources() -> str:
    """The code's text with adjacent string literals joined and interpolations cut out."""
    files = [p for room in ("rewriter", "passes", "backends") for p in (ROOT / room).rglob("*.py")]
    text = "\n".join(p.read_text(encoding="utf-8") for p in files)
    text = re.sub(r"\"\s*\n\s*f?\"", "", text)
    return re.sub(r"\{[^{}\"]*\}", "…", text)


def refusals(page: Page) -> list[str]:
    """Quoted reasons: bullets that open with code, under the headings that promise them."""
    parts = re.split(r"^## ", page.text, flags=re.MULTILINE)
    chosen = [part for part in parts if part.startswith(("When it refuses", "Reasons that every pass"))]
    lines = [line for part in chosen for line in part.splitlines() if line.startswith("- ")]
    return [text for line in lines for text in re.findall(r"`([^`]{12,})`", line)]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name.startswith("docs/passes/")], ids=str)
def test_quoted_reasons_are_the_codes(page: Page) -> None:
    code, quoted = sources(), refusals(page)
    assert quoted
    for text in quoted:
        for fragment in fragments(text):
            assert fragment in code, f"{text}: the code does not say {fragment!r}"


def fragments(text: str) -> list[str]:
    """What stands between the figures and the names that the code fills in."""
    names = "|".join(sorted([*PASSES, *STRUCTURES], key=len, reverse=True))
    parts = re.split(rf"…|(?<![\w-])(?:{names})(?::[a-z]+)?(?![\w-])", text)
    return [part.strip(" ,:=") for part in parts if part.strip(" ,:=")]


LOOPS = [
    f"passes/detect/{name}.py"
    for name in ("step", "reading", "recurrence", "matrix_state", "vector_state", "gated_state", "recurrent_node")
]
LOOPS += [f"backends/{room}/{name}.py" for room in ("fx", "onnx") for name in ("loops", "counted", "region")]


@pytest.mark.parametrize("name", LOOPS)
def test_reasons_of_loops_are_on_the_page(name: str) -> None:
    text = page("docs/passes/raise-recurrence.md").text
    said = re.sub(r"\s+", " ", text)
    for reason in reasons(ROOT / name):
        short = reason.removeprefix("torch's while_loop ").removeprefix("a linear state ")
        assert short in said, f"{name} may say {reason!r}"


def reasons(path: Path) -> Iterator[str]:
    """What a detector's file gives as a refusal: the text of a NoMatch, or a line that is returned in a loop's stead."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {t.id: n.value for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    for node in ast.walk(tree):
        given: ast.AST | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "NoMatch":
            given = node.args[0]
        elif isinstance(node, ast.Return) and path.parent.parent.name == "backends":
            given = node.value
        for choice in [given.body, given.orelse] if isinstance(given, ast.IfExp) else [given]:
            text = template(constants.get(choice.id, choice) if isinstance(choice, ast.Name) else choice)
            if " " in text:
                yield text


def template(node: ast.AST | None) -> str:
    """A string as the pages quote it, … for what is filled in; "" for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@every_page
def test_no_path_of_a_machine(page: Page) -> None:
    assert not re.search(r"(?<![\w.])/(work|root|home|tmp|Users)/", page.text)
