"""The difference of two graphs: operations counted, nodes paired by what they are and where they stand, parameters by name and content.

Node names shift when a file is written again, so a node is known by its operation, scope, output shape and stored operands; dynamic sizes
compare as equal whatever they are called.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.errors import RewriteError

if TYPE_CHECKING:
    from rewriter.graph import Graph, Node, Value

Shape = tuple[int | str, ...] | None
_NO_OPERATION = ("placeholder", "get_attr", "output")


@dataclass(frozen=True)
class NodeRow:
    """A node as it can be recognised in another file."""

    op: str
    scope: str  # "" where unknown
    shape: Shape  # of its first output, "*" where dynamic
    stored: tuple[str, ...]  # the parameters that it reads
    name: str = field(compare=False)


@dataclass(frozen=True)
class Parameter:
    """A stored tensor that the graph uses."""

    name: str
    shape: Shape
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Difference:
    """B against A."""

    ops: Mapping[str, tuple[int, int]]  # operation -> before, after
    removed: tuple[NodeRow, ...]
    added: tuple[NodeRow, ...]
    parameters_removed: tuple[Parameter, ...]
    parameters_added: tuple[Parameter, ...]
    parameters_changed: tuple[tuple[Parameter, Parameter], ...]  # another shape or dtype, or other numbers
    nbytes: tuple[int, int]  # of all parameters, tied ones once
    inputs: tuple[tuple[str, ...], tuple[str, ...]]
    outputs: tuple[tuple[str, ...], tuple[str, ...]]
    provenance: Mapping[str, Any] = field(default_factory=dict)  # the report that B stores

    @property
    def same(self) -> bool:
        """Whether nothing differs but what is stored about it."""
        changes = (self.removed, self.added, self.parameters_removed, self.parameters_added, self.parameters_changed)
        return not any(changes) and self.inputs[0] == self.inputs[1] and self.outputs[0] == self.outputs[1]


def diff(a: Graph, b: Graph, provenance: Mapping[str, Any] | None = None) -> Difference:
    """Compare two graphs of one format; parameters are loaded two at a time."""
    stored_a, stored_b = parameters(a), parameters(b)
    rows_a, rows_b = _rows(a), _rows(b)
    counts_a, counts_b = Counter(r.op for r in rows_a), Counter(r.op for r in rows_b)
    both = [name for name in stored_a if name in stored_b]
    return Difference(
        ops={op: (counts_a[op], counts_b[op]) for op in sorted({*counts_a, *counts_b})},
        removed=_without(rows_a, rows_b),
        added=_without(rows_b, rows_a),
        parameters_removed=tuple(p for name, (p, _) in stored_a.items() if name not in stored_b),
        parameters_added=tuple(p for name, (p, _) in stored_b.items() if name not in stored_a),
        parameters_changed=tuple((stored_a[n][0], stored_b[n][0]) for n in both if _changed(a, b, stored_a[n], stored_b[n])),
        nbytes=(a.nbytes(), b.nbytes()),
        inputs=(tuple(map(str, a.specs())), tuple(map(str, b.specs()))),
        outputs=(tuple(a.output_names()), tuple(b.output_names())),
        provenance=provenance or {},
    )


def parameters(graph: Graph) -> dict[str, tuple[Parameter, Value]]:
    """The stored tensors that some node reads, by name."""
    found: dict[str, tuple[Parameter, Value]] = {}
    for node in graph.nodes():
        for value in _stored(graph, node):
            name, shape, dtype = graph.name(value), graph.shape(value), graph.dtype(value)
            nbytes = dtype.itemsize if dtype is not None else 0
            for size in shape or ():
                nbytes *= size if isinstance(size, int) else 1
            found.setdefault(name, (Parameter(name, shape, str(dtype).removeprefix("torch."), nbytes), value))
    return found


def _stored(graph: Graph, node: Node) -> list[Value]:
    """The operands that are stored tensors themselves, not computed from some."""
    operands = [v for v in graph.inputs(node) if v is not None] if graph.op(node) not in _NO_OPERATION else []
    return [v for v in operands if graph.producer(v) is None and graph.is_const(v)]


def _rows(graph: Graph) -> list[NodeRow]:
    return [_row(graph, node) for node in graph.nodes() if graph.op(node) not in _NO_OPERATION]


def _row(graph: Graph, node: Node) -> NodeRow:
    outputs = graph.outputs(node)
    shape = graph.shape(outputs[0]) if outputs else None
    fixed = tuple(s if isinstance(s, int) else "*" for s in shape) if shape is not None else None
    stored = tuple(graph.name(v) for v in _stored(graph, node))
    return NodeRow(graph.op(node), graph.scope(node), fixed, stored, graph.name(outputs[0]) if outputs else "")


def _without(rows: list[NodeRow], others: list[NodeRow]) -> tuple[NodeRow, ...]:
    """The rows that have no partner; of several alike, those whose names the other side lacks, in their order."""
    spare = Counter(rows)
    spare.subtract(Counter(others))
    names = {row.name for row in others}
    left = []
    for row in sorted(rows, key=lambda r: r.name in names):
        if spare[row] > 0:
            spare[row] -= 1
            left.append(row)
    order = {id(row): i for i, row in enumerate(rows)}
    return tuple(sorted(left, key=lambda r: order[id(r)]))


def _changed(a: Graph, b: Graph, before: tuple[Parameter, Value], after: tuple[Parameter, Value]) -> bool:
    if before[0] != after[0]:
        return True
    first, second = a.const(before[1]), b.const(after[1])
    return first is None or second is None or not _same_bits(first, second)


def _same_bits(a: Any, b: Any) -> bool:
    """Equal numbers, NaN in the same places."""
    return bool(a.equal(b)) or (a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all()))


def diff_files(a: Path, b: Path) -> Difference:
    """Read two model files and compare them; RewriteError unless they are of one format."""
    first, second = _open(a), _open(b)
    if first.graph.format != second.graph.format:
        raise RewriteError(f"{a} is {first.format} and {b} is {second.format}; diff compares .onnx with .onnx, or .pt2 with .pt2")
    return diff(first.graph, second.graph, stored_report(b, second.graph))


def _open(path: Path) -> Any:
    from rewriter.options import Options

    kind = importlib.import_module("rewriter.backends.files.sniff").recognise(path)
    if kind.value not in ("pt2", "onnx"):
        raise RewriteError(f"{path} is no .pt2 or .onnx file ({kind.value}); diff compares .onnx with .onnx, or .pt2 with .pt2")
    return importlib.import_module("rewriter.backends.files.load").open_source(path, Options())


def stored_report(path: Path, graph: Graph) -> Mapping[str, Any]:
    """The report that an emitted model carries; empty where it carries none that can be read."""
    if graph.format == "onnx":
        text = graph.model.metadata_props.get("rewriter.report")  # type: ignore[attr-defined]
    else:
        text = importlib.import_module("rewriter.backends.files.pt2").read_extra(path).get("report")
    if text is None:
        return {}
    from rewriter.report import validate

    try:
        content = json.loads(text)
        validate(content)
    except ValueError:
        return {}
    return content  # type: ignore[no-any-return]
