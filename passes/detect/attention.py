"""Attention sites: every softmax between a product of two values and one with a third, and attention that is one operation already.

Normalised first (products by letters, axes by atoms), matched once, then compared: what a region computes, in float64 on random inputs, has
to be what its Attention gives. A site that cannot be read is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from rewriter.graph import Graph, Node, Place, Port, Region, Site, Value
from rewriter.operator import Dims
from rewriter.passes.detect.agreement import disagreement
from rewriter.passes.detect.axes import Axes, Group
from rewriter.passes.detect.linear import unique
from rewriter.passes.detect.masks import Masks, masks_of
from rewriter.passes.detect.operation import of_operation
from rewriter.passes.detect.peel import State, broadcast, followed, peeled, taken
from rewriter.passes.detect.scores import Core, leads_back, leads_on, of_softmax
from rewriter.passes.structures.attention import Attention

Groups = tuple[Group, Group, Group]  # batch, heads, queries
Taken = tuple[Port, State]


def detect(graph: Graph) -> Iterator[Site]:
    """Every attention site, read or not."""
    names: set[str] = set()
    for node in graph.nodes():
        op, y = graph.op(node), next(iter(graph.outputs(node)), None)
        if op != "attention" and not (op in ("softmax", "safe_softmax") and _between_products(graph, node)):
            continue
        name = unique(f"{graph.scope(node) or graph.name(y)} (attention)", names)
        place = Place((node,), next((v for v in graph.inputs(node) if v is not None), None), y)
        core = of_operation(graph, node) if op == "attention" else of_softmax(graph, node)
        found = core if isinstance(core, str) else read(graph, core, node)
        form, region = (None, None) if isinstance(found, str) else found
        reason = found if isinstance(found, str) else f"{said(found[0])}: fuse-attention makes it one operation"
        yield Site(name, name, "attention", None, graph.dtype(y), (place,), reason=reason, region=region, form=form)


def said(form: Attention) -> str:
    """`softmax attention, 8 heads of 64 on 2`."""
    shared = f" on {form.shared}" if form.shared != form.heads else ""
    masks = ["causal"] if form.causal else []
    masks += ["masked" if form.boolean else "mask added"] if form.mask else []
    masks += ["bias added"] if form.bias else []
    return ", ".join(["softmax attention", f"{form.heads} heads of {form.key}{shared}", *masks])


def _between_products(graph: Graph, softmax: Node) -> bool:
    return leads_back(graph, next(iter(graph.inputs(softmax)))) and leads_on(graph, graph.outputs(softmax)[0])


@dataclass(frozen=True)
class States:
    """What could be taken for each operand, and given."""

    query: Sequence[State]
    key: Sequence[State]
    value: Sequence[State]
    out: Sequence[State]
    masks: Sequence[Sequence[State]]


def read(graph: Graph, core: Core, node: Node) -> tuple[Attention, Region] | str:
    """The operator and what it stands for, or why there is none."""
    masks = masks_of(graph, core)
    if isinstance(masks, str):
        return masks
    frame, own = core.frame, {graph.dtype(x.value) for x in (core.query, core.key, core.value, core.out)}
    if len(own) > 1:
        return f"its operands are of types {', '.join(sorted(str(t).removeprefix('torch.') for t in own))}"
    states = States(
        query=peeled(graph, frame, core.query, factors=True),
        key=peeled(graph, frame, core.key, factors=True),
        value=peeled(graph, frame, core.value),
        out=followed(graph, frame, core.out),
        masks=[peeled(graph, frame, mask.at) for mask in masks.all],
    )
    wrong = "its axes are none of batch, heads, queries and keys"
    for groups in _groups(core):
        found = _fitted(core, masks, states, groups)
        if isinstance(found, str):
            wrong = found
            continue
        operator, ports, axes, out = found
        region = Region(inside(graph, out.value, core.begin or node), tuple(ports), (out,))
        wrong = disagreement(graph, operator, region, axes, frame.resolve(core.keys), core.begin is None)
        if not wrong:
            return operator, region
    return wrong


def _groups(core: Core) -> Iterator[Groups]:
    """Batch, heads and queries, the likeliest reading first. One axis may turn out to hold both batch and heads."""
    frame = core.frame
    in_key = {a for group in frame.axes(core.key.axes) for a in group}
    outer = [group for group in map(frame.resolve, core.outer) if group]
    alone = [group for group in outer if not set(group) & in_key]  # of the queries only: their own axis comes last, or varies
    others = [group for group in alone[:-1] if _named(group) and group is not outer[0]]
    for time in [*alone[-1:], *others] or [()]:
        rest = [group for group in outer if group is not time]
        if len(rest) == 1 and len(rest[0]) > 1:
            yield rest[0][:-1], rest[0][-1:], time
        named = [i for i, group in enumerate(rest) if _named(group)]
        batch = rest[: named[-1] + 1] if len(named) > 1 else [rest[named[0] if named else 0]] if rest else []
        heads = [group for group in rest if group not in batch]
        yield tuple(a for g in batch for a in g), tuple(a for g in heads for a in g), time


def _named(group: Group) -> bool:
    return any(isinstance(a.size, str) for a in group)


def _fitted(core: Core, masks: Masks, states: States, groups: Groups) -> tuple[Attention, list[Port], list[Axes], Port] | str:
    """The operator with its ports, and the axes of what they take; else what does not fit."""
    frame, keys = core.frame, core.frame.resolve(core.keys)
    batch, heads, time = groups
    depth, width = frame.resolve(core.depth), frame.resolve(core.width)
    query = taken(frame, states.query, (batch, heads, time, depth))
    out = taken(frame, states.out, (batch, heads, time, width), given=True)
    pairs = (_shared(core, states, batch, heads[:n]) for n in range(len(heads) + 1))
    pair = next((found for found in pairs if found is not None), None)
    if query is None or out is None or pair is None:
        parts = {"queries": query, "result": out, "keys and values": pair}
        return f"its {next(name for name, part in parts.items() if part is None)} cannot be told apart by batch, heads and tokens"
    chosen, dims = [query, *pair[1:]], list[Dims]()
    many, shared, own, wide = (_size(group) for group in (heads, pair[0], depth, width))
    if many is None or shared is None or own is None or wide is None:
        return "its heads or their widths vary"
    for mask, ways in zip(masks.all, states.masks, strict=True):
        found = broadcast(frame, ways, (batch, heads, time, keys))
        if found is None:
            return "its mask cannot be told apart by batch, heads, queries and keys"
        chosen.append((replace(found[0], negated=mask.negated), found[1]))
        names: Dims = ("batch", many, "time", "keys")
        dims.append(tuple(n if has else 1 for n, has in zip(names, found[2], strict=True)))
    scale = core.scale * query[1].factor * pair[1][1].factor
    first, second = [*dims, (), ()][:2]
    operator = Attention(many, shared, own, wide, scale, core.causal, first, masks.boolean, masks.hidden, second, masks.empty)
    return operator, [port for port, _ in chosen], [frame.axes(state.axes) for _, state in chosen], out[0]


def _shared(core: Core, states: States, batch: Group, heads: Group) -> tuple[Group, Taken, Taken] | None:
    """Keys and values with these heads alone, where they can be had."""
    frame, keys = core.frame, core.frame.resolve(core.keys)
    key = taken(frame, states.key, (batch, heads, keys, frame.resolve(core.depth)))
    value = taken(frame, states.value, (batch, heads, keys, frame.resolve(core.width)))
    return None if key is None or value is None else (heads, key, value)


def _size(group: Group) -> int | None:
    """None where it varies."""
    sizes = [a.size for a in group if isinstance(a.size, int)]
    return prod(sizes) if len(sizes) == len(group) else None


def inside(graph: Graph, out: Value, begin: Node) -> tuple[Node, ...]:
    """The nodes from the product of queries and keys to the result, in order."""
    depends: dict[int, bool] = {}
    order: list[Node] = []
    stack: list[tuple[Node, bool]] = [(graph.producer(out), False)]
    while stack:
        node, settled = stack.pop()
        before = [] if node is begin else [n for v in graph.inputs(node) if v is not None and (n := graph.producer(v)) is not None]
        if settled:
            depends[id(node)] = node is begin or any(depends[id(n)] for n in before)
            order += [node] if depends[id(node)] else []
        elif id(node) not in depends:
            depends[id(node)] = False
            stack.append((node, True))
            stack += [(n, False) for n in before]
    return tuple(order)
