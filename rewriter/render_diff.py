"""The difference of two models as text: counts by operation, nodes by scope, parameters, inputs and outputs, provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import IO

from rich.text import Text

from rewriter.diff import Difference, NodeRow, Parameter
from rewriter.render import console, print_lines
from rewriter.table import change, clean, columns, fold, nbytes


def show_difference(a: str, b: str, found: Difference, stream: IO[str] | None = None) -> None:
    """What `rewrite diff` found."""
    out = console(stream)
    print_lines(out, difference_lines(a, b, found, out.width))


def difference_lines(a: str, b: str, found: Difference, width: int) -> list[str | Text]:
    """Counts by operation, nodes by scope, parameters, interface, provenance."""
    lines: list[str | Text] = [*fold(f"{clean(b)} against {clean(a)}", width, "", "    ")]
    if found.same:
        lines.append(f"no difference in operations, parameters ({nbytes(found.nbytes[1])}), inputs or outputs")
    cells = [[clean(op), str(x), str(y), f"{y - x:+d}"] for op, (x, y) in found.ops.items() if x != y]
    same = sum(x == y for x, y in found.ops.values())
    if cells:
        head, body = columns(["operation", "before", "after", "change"], cells, width, [(0, 24)])
        lines += ["", *(Text(line, "bold") for line in head), *(line for block in body for line in block)]
        lines += [f"{same} other operations occur as often as before"] if same else []
    for title, sign, nodes in (("nodes removed", "-", found.removed), ("nodes added", "+", found.added)):
        if nodes:
            lines += ["", Text(f"{title}: {len(nodes)}", "bold"), *_by_scope(sign, nodes, width)]
    lines += [] if found.same else _parameter_lines(found, width)
    for title, (before, after) in (("inputs", found.inputs), ("outputs", found.outputs)):
        if before != after:
            lines += ["", *fold(f"{title}: {', '.join(map(clean, before))} became {', '.join(map(clean, after))}", width, "", "    ")]
    return [*lines, *_provenance_lines(found, width)]


def _by_scope(sign: str, nodes: Sequence[NodeRow], width: int) -> list[str | Text]:
    """One line for each scope: its operations, counted, with the parameters that they read."""
    scopes: dict[str, Counter[str]] = {}
    for node in nodes:
        reads = f" of {', '.join(map(clean, node.stored))}" if node.stored else ""
        said = f"{clean(node.op)} [{', '.join(map(str, node.shape or ()))}]{reads}"
        scopes.setdefault(node.scope, Counter())[said] += 1
    lines: list[str | Text] = []
    for scope, counts in scopes.items():
        said = "; ".join(f"{n} x {text}" if n > 1 else text for text, n in counts.items())
        lines += fold(f"{clean(scope) or '(no scope)'}: {said}", width, f"  {sign} ", "      ")
    return lines


def _parameter_lines(found: Difference, width: int) -> list[str | Text]:
    def said(p: Parameter) -> str:
        return f"{clean(p.name)} {p.dtype}[{', '.join(map(str, p.shape or ()))}] {nbytes(p.nbytes)}"

    rows = [f"- {said(p)}" for p in found.parameters_removed] + [f"+ {said(p)}" for p in found.parameters_added]
    for x, y in found.parameters_changed:
        rows.append(f"~ {said(x)}: " + ("other numbers" if x == y else f"became {said(y)}"))
    counts = f"{len(found.parameters_removed)} removed, {len(found.parameters_added)} added, {len(found.parameters_changed)} changed"
    title = f"parameters: {change(*found.nbytes, 'nbytes')}; {counts}"
    return ["", Text(title, "bold"), *(line for row in rows for line in fold(row, width, "  ", "      "))]


def _provenance_lines(found: Difference, width: int) -> list[str | Text]:
    stored = found.provenance
    if not stored:
        return ["", "provenance: B carries no report of a rewrite"]
    model = stored["model"]
    said = f"{model['path'] or 'a model in memory'} (sha256 {str(model['sha256'])[:12]})"
    said += f", passes {', '.join(stored['passes'])}, seed {stored['seed']}"
    said += f", {stored['matched']['rewritten']} of {stored['matched']['sites']} sites, rewriter {stored['versions']['rewriter']}"
    return ["", *fold(f"provenance: B was rewritten from {clean(said)}", width, "", "    ")]
