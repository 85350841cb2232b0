"""Features first or last, chosen for whole chains: a minimum cut.

A site takes (..., tokens, n) or, with features first, (..., n, tokens), where shuffles move whole rows and blocks need no turn. Where a
value's writer and a reader of it differ, it is transposed. With c(v, l) the seconds of node v in layout l and t the seconds of a transpose,

    minimise  sum_v c(v, l(v)) + sum_values t(width) * [its writer and a reader of it differ]

over the layouts l, which is a minimum cut between "last" and "first". Elementwise nodes between sites cost the same in both and hand the
layout on; everything else has features last. Sums of parts only propose, for they leave out what is still in the cache from the layer
before: each chain that is to have features first is timed as a whole both ways, and keeps them last unless it is faster so. Where the cut
proposes nothing, that is done with all of a chain.

No node moves: a body with features first has a transpose at either end, and ONNX Runtime's optimizer carries those past elementwise nodes
and cancels the ones that meet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, prod

import networkx as nx
import onnx_ir as ir

from rewriter.backends.onnx.constants import Constants
from rewriter.backends.onnx.emit import attach
from rewriter.backends.onnx.lowering import matrix_lowerings
from rewriter.backends.onnx.measure import FEW_TOKENS, RUNTIME, copies_of_bytes, measure_lowerings, measure_transposes, time_models
from rewriter.backends.onnx.opaque import SITE, is_opaque, matrix_skeleton, spec_of
from rewriter.backends.onnx.ops import COLUMNS
from rewriter.backends.onnx.part import part, text
from rewriter.cache import measured

ELEMENTWISE = {
    "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Sqrt", "Exp", "Pow", "Erf", "Gelu", "Relu", "Sigmoid", "Tanh", "Swish", "Identity",
}  # fmt: skip
NANO = 1e9  # capacities are whole nanoseconds: a flow of floats need not end


@dataclass(frozen=True)
class Form:
    """What a member writes, and what it takes in either layout, without the transposes at its ends."""

    rank: int
    width: int
    inputs: int  # features of what it reads
    last: float = 0.0  # seconds
    first: float = 0.0
    lowering: str = ""  # of a site with features last


@dataclass(frozen=True)
class Seconds:
    """Of a chain with features last and first, by token count."""

    last: tuple[float, ...]
    first: tuple[float, ...]

    @property
    def pays(self) -> bool:
        """Whether features are to come first. Token counts weigh alike: what hundreds gain is not to hide what a single one loses."""
        return prod(self.first) < prod(self.last)

    def ratios(self, tokens: Sequence[int]) -> str:
        """Speed with features first over that with features last."""
        return ", ".join(f"{a / b:.2f}x as fast at T={count}" for a, b, count in zip(self.last, self.first, tokens, strict=True))


Members = Mapping[ir.Node, Form]
Turns = Mapping[int, float]  # seconds of a transpose by width


@dataclass(frozen=True)
class Conditions:
    """What times are taken for."""

    tokens: tuple[int, ...]
    threads: int
    opset: int
    contrib: bool = False  # operators of com.microsoft are allowed


def layouts(model: ir.Model, conditions: Conditions) -> tuple[dict[ir.Node, str], list[str]]:
    """The lowerings of sites that gain or lose by their neighbours' layout, and what is to be said of it."""
    constants = Constants(conditions.opset)
    chosen: dict[ir.Node, str] = {}
    said: dict[str, dict[str, list[str]]] = {"first": {}, "last": {}}
    for chain in _chains(_members(model, constants)):
        if not any(COLUMNS in matrix_lowerings(*spec_of(node)) for node in chain if is_opaque(node)):
            continue
        timed, turns = _timed(chain, conditions)
        chosen |= {node: form.lowering for node, form in timed.items() if form.lowering}
        firsts = cut(timed, turns) or _all_together(timed)
        for run in _chains({node: form for node, form in timed.items() if node in firsts}):
            seconds = _as_it_stands(list(run), timed, constants, conditions)
            if seconds.pays:
                chosen |= {node: COLUMNS for node in run if is_opaque(node)}
            said["first" if seconds.pays else "last"].setdefault(seconds.ratios(conditions.tokens), []).append(_names(run))
        if rest := _names(node for node in timed if node not in firsts):
            said["last"].setdefault("by the sum of parts", []).append(rest)
    return chosen, [_told(where, runs) for where, runs in said.items() if runs]


def _told(where: str, runs: Mapping[str, Sequence[str]]) -> str:
    """A sentence for the report; chains of one figure share it."""
    head = "come first from layer to layer" if where == "first" else "stay last where first would be slower"
    listed = [f"{', '.join(names)} ({figures})" for figures, names in runs.items()]
    return f"features {head}: {'; '.join(listed)}"


def _all_together(timed: Members) -> set[ir.Node]:
    """What may have features first, unless it is a single site, which was timed as it stands."""
    able = {node for node, form in timed.items() if form.first < inf}
    return able if sum(map(is_opaque, able)) > 1 else set()


def _names(nodes: Iterable[ir.Node]) -> str:
    return " . ".join(node.metadata_props.get(SITE, node.name or "") for node in nodes if is_opaque(node))


def _members(model: ir.Model, constants: Constants) -> dict[ir.Node, Form]:
    """Sites, and the elementwise nodes that read nothing but members and constants of one number for each feature."""
    found: dict[ir.Node, Form] = {}
    for node in model.graph.all_nodes():
        if is_opaque(node):
            spec, rank = spec_of(node)
            if rank > 1:
                m, n = matrix_skeleton(spec)[0].shape
                found[node] = Form(rank, m, n)
        elif node.domain in ("", "ai.onnx") and node.op_type in ELEMENTWISE and len(node.outputs) == 1:
            forms = {_written(v, node, found) for v in node.inputs if v is None or not constants.is_const(v)}
            form = forms.pop() if len(forms) == 1 else None
            if form is not None and all(_narrow(v, *form, constants) for v in node.inputs if v is not None and constants.is_const(v)):
                found[node] = Form(form[0], form[1], form[1])
    return found


def _written(value: ir.Value | None, reader: ir.Node, members: Members) -> tuple[int, int] | None:
    """Rank and width of a value that a member of the same body writes."""
    writer = None if value is None else value.producer()
    if writer is None or writer not in members or writer.graph is not reader.graph:
        return None
    return members[writer].rank, members[writer].width


def _narrow(value: ir.Value, rank: int, width: int, constants: Constants) -> bool:
    """Whether a constant is one number, or one for each feature."""
    shape = constants.load(value).shape
    return len(shape) <= rank and (shape.numel() == 1 or (shape.numel() == width and shape[-1] == width))


def _writer(value: ir.Value | None, reader: ir.Node, members: Collection[ir.Node]) -> ir.Node | None:
    """The member that a member reads from."""
    writer = None if value is None else value.producer()
    return writer if writer in members and writer is not None and writer.graph is reader.graph else None


def _chains(members: Members) -> Iterator[dict[ir.Node, Form]]:
    """Members that are joined, each run in the model's order."""
    joined = nx.Graph()
    joined.add_nodes_from(members)
    joined.add_edges_from((w, node) for node in members for v in node.inputs if (w := _writer(v, node, members)) is not None)
    for run in nx.connected_components(joined):
        yield {node: form for node, form in members.items() if node in run}


def _timed(chain: Members, conditions: Conditions) -> tuple[dict[ir.Node, Form], dict[int, float]]:
    """The same with seconds, summed over the asked token counts; and those of transposes."""
    rank = next(iter(chain.values())).rank
    widths = sorted({width for form in chain.values() for width in (form.inputs, form.width)})
    table = [measure_transposes(widths, rank, count, conditions.threads, conditions.opset) for count in conditions.tokens]
    turns = {width: sum(column) for width, *column in zip(widths, *table, strict=True)}
    return {node: _form(node, form, turns, conditions) if is_opaque(node) else form for node, form in chain.items()}, turns


def _form(node: ir.Node, form: Form, turns: Turns, conditions: Conditions) -> Form:
    spec, rank = spec_of(node)
    among = matrix_lowerings(spec, rank, conditions.contrib, chained=True)
    table = [measure_lowerings(spec, rank, among, count, conditions.threads, conditions.opset) for count in conditions.tokens]
    seconds = {lowering: sum(column) for lowering, *column in zip(among, *table, strict=True)}
    first = max(0.0, seconds.pop(COLUMNS, inf) - turns[form.inputs] - turns[form.width])
    best = min(seconds, key=seconds.__getitem__)
    return Form(rank, form.width, form.inputs, seconds[best], first, best)


@dataclass(frozen=True)
class Value:
    """Who writes and who reads it; None is whoever is no member, and has features last."""

    width: int
    writer: ir.Node | None
    readers: frozenset[ir.Node | None]


def values(chain: Members) -> list[Value]:
    """What members read and write."""
    found: dict[ir.Value, Value] = {}
    for node, form in chain.items():
        written = node.outputs[0]
        readers = {use.node if _writer(written, use.node, chain) and use.node in chain else None for use in written.uses()}
        found[written] = Value(form.width, node, frozenset(readers | ({None} if written.is_graph_output() else set())))
    for node, form in chain.items():
        for given in (node.inputs[0],) if is_opaque(node) else ():
            if given is not None and _writer(given, node, chain) is None:
                others = found[given].readers if given in found and found[given].writer is None else frozenset()
                found[given] = Value(form.inputs, None, others | {node})
    return list(found.values())


def energy(chain: Members, turns: Turns, firsts: Collection[ir.Node]) -> float:
    """Seconds of the chain, by its parts, with these nodes' features first."""
    nodes = sum(form.first if node in firsts else form.last for node, form in chain.items())
    turned = [v for v in values(chain) if any((reader in firsts) != (v.writer in firsts) for reader in v.readers)]
    return nodes + sum(turns[v.width] for v in turned)


def cut(chain: Members, turns: Turns) -> set[ir.Node]:
    """Whose features come first where `energy` is least; last, where it makes no difference."""
    flow = nx.DiGraph()
    flow.add_nodes_from(("last", "first"))
    for node, form in chain.items():
        if form.first == inf:
            flow.add_edge("last", node)  # an edge without a capacity is never cut
        else:
            flow.add_edge("last", node, capacity=round(form.first * NANO))
        flow.add_edge(node, "first", capacity=round(form.last * NANO))
    for i, value in enumerate(values(chain)):
        writer, seconds = "last" if value.writer is None else value.writer, round(turns[value.width] * NANO)
        flow.add_edge(writer, ("first of", i), capacity=seconds)
        flow.add_edge(("last of", i), writer, capacity=seconds)
        for reader in value.readers:
            who = "last" if reader is None else reader
            flow.add_edge(("first of", i), who)
            flow.add_edge(who, ("last of", i))
    _, (_, first) = nx.minimum_cut(flow, "last", "first")
    return {node for node in chain if node in first}


def dims_of(members: Members, rank: int) -> dict[ir.Value, Sequence[int | str | None]]:
    """Of everything that members read or write, constants too."""
    widths = {v: form.inputs for node, form in members.items() for v in node.inputs if v is not None}
    widths |= {node.outputs[0]: form.width for node, form in members.items()}
    return {value: [*(f"d{i}" for i in range(rank - 1)), width] for value, width in widths.items()}


def _as_it_stands(run: Sequence[ir.Node], timed: Members, constants: Constants, conditions: Conditions) -> Seconds:
    """The run as it stands in the model, both ways."""
    rank = timed[run[0]].rank
    dims = dims_of(timed, rank)
    nbytes = sum(matrix_skeleton(spec_of(node)[0])[0].cost().nbytes for node in run if is_opaque(node))
    lowered = {spec_of(node): timed[node].lowering for node in run if is_opaque(node)}

    def time(tokens: int) -> list[float]:
        # copies of many tokens would take each other's values out of the cache, which in the model nobody does
        copies = copies_of_bytes(nbytes, tokens) if tokens <= FEW_TOKENS else 1
        models = [part(run, dims, constants, conditions.opset, copies) for _ in range(2)]
        attach(models[0], lambda spec, rank: lowered[spec, rank])
        attach(models[1], lambda _spec, _rank: COLUMNS)
        return [seconds / copies for seconds in time_models(models, tokens, conditions.threads)]

    key = (RUNTIME, "layout", text(run, constants), *sorted(lowered.values()), rank, conditions.threads, conditions.opset)
    table = [measured(2, partial(time, count), *key, count) for count in conditions.tokens]
    last, first = zip(*table, strict=True)
    return Seconds(last, first)
