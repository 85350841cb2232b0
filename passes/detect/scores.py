"""From a softmax back to the product of queries and keys, and forward to the product with the values: scales, masks and casts between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rewriter.graph import Graph, Node, Value
from rewriter.passes.detect import axes as layouts
from rewriter.passes.detect.axes import Axes, Frame, Group, fresh
from rewriter.passes.detect.magnitudes import operand
from rewriter.passes.detect.products import Product, is_product, product

SAYS_NOTHING = "aten._assert_tensor_metadata"
_THROUGH = {
    "cast", "identity", "reshape", "expand", "mul", "div", "add", "sub", "slice", "getitem", "transpose", "unsqueeze", "squeeze", "where",
    "masked_fill", "tanh", "relu", "sigmoid", "neg", "abs", "pow", "concat", "aten.clamp", "Clip",
}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """A value whose axes are known."""

    value: Value
    axes: Axes


@dataclass(frozen=True)
class Mask:
    """Added to the scores, or boolean: true where a key is seen (`negated`: hidden), the others score `hidden`."""

    at: Operand
    boolean: bool = False
    negated: bool = False
    hidden: float = -math.inf


@dataclass(frozen=True)
class Core:
    """softmax(scale query key^T, masks) value, the axes of all operands in one frame."""

    frame: Frame
    query: Operand
    key: Operand
    value: Operand
    out: Operand
    scale: float
    outer: tuple[Group, ...]  # the queries' axes but their features, as the scores have them
    keys: Group  # the softmax's axis
    depth: Group  # features of queries and keys
    width: Group  # features of values
    masks: tuple[Mask, ...] = ()  # the last one first
    causal: bool = False
    zero: bool = False  # rows that see no key are zero
    begin: Node | None = None  # the product of queries and keys; None where all is one node


@dataclass
class Scores:
    """What lies between a product and a softmax, gathered from the softmax backwards."""

    frame: Frame
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)
    found: Product | None = None
    axes: Axes = ()

    def mask(self, graph: Graph, value: Value, axes: Axes, boolean: bool = False, negated: bool = False, hidden: float = -math.inf) -> str:
        shape = graph.shape(value)
        if shape is None or len(shape) > len(axes):
            return "its mask has more axes than its scores"
        if self.scale <= 0 or (self.scale != 1 and not boolean):
            return "its scores are scaled after a mask was added"
        aligned = tuple(group if n != 1 else () for group, n in zip(axes[len(axes) - len(shape) :], shape, strict=True))
        self.masks.append(Mask(Operand(value, aligned), boolean, negated, hidden * self.scale))
        return ""


def behind(graph: Graph, frame: Frame, value: Value, axes: Axes) -> Scores | str:
    """The product that the scores come from."""
    scores = Scores(frame)
    while True:
        node = graph.producer(value)
        found = product(graph, node)
        if node is None:
            return "its scores are no product of queries and keys"
        if [group != () for group in axes] != [n != 1 for n in graph.shape(value) or ()]:
            return "a mask repeats its scores along an axis"
        if found is not None:
            said = "" if found.added is None else scores.mask(graph, found.added, axes)
            scores.scale, scores.found, scores.axes = scores.scale * found.scale, found, axes
            return said or scores
        step = _step(graph, scores, node, axes)
        if isinstance(step, str):
            return step
        value, axes = step


def _step(graph: Graph, scores: Scores, node: Node, axes: Axes) -> tuple[Value, Axes] | str:
    op, operands = graph.op(node), list(graph.inputs(node))
    if op in ("mul", "div"):
        factor = scaled(graph, node)
        if factor is None:
            return f"its scores are {'multiplied' if op == 'mul' else 'divided'} by what is not one number"
        scores.scale *= factor[1]
        return factor[0], axes
    if op in ("add", "sub"):
        return _added(graph, scores, node, axes)
    if op == "masked_fill":
        said = _filled(graph, scores, operands[1], operand(graph, node, 2), True, axes)
        return said or (operands[0], axes)
    if op == "where":
        return _chosen(graph, scores, node, axes)
    if op == "cast" and _floats(graph, node):
        return operands[0], axes
    moved = layouts.before(graph, scores.frame, node, axes)
    return moved if moved is not None else f"{op} stands between the product and the softmax"


def scaled(graph: Graph, node: Node) -> tuple[Value, float] | None:
    """(value, factor) of a product or a quotient with one number."""
    op = graph.op(node)
    if op not in ("mul", "div") or graph.attributes(node).get("rounding"):
        return None
    a, b = list(graph.inputs(node))[:2]
    if a is not None and (by := operand(graph, node, 1)):
        return a, by if op == "mul" else 1 / by
    if op == "mul" and b is not None and (by := operand(graph, node, 0)):
        return b, by
    return None


def _added(graph: Graph, scores: Scores, node: Node, axes: Axes) -> tuple[Value, Axes] | str:
    a, b = list(graph.inputs(node))[:2]
    if graph.op(node) == "sub" or graph.attributes(node).get("alpha", 1) != 1:
        return "something is subtracted from its scores"
    if a is None or b is None:
        return (b if a is None else a), axes  # one number for all keys of a row changes no weight
    score, mask = (a, b) if leads_back(graph, a) else (b, a)
    said = scores.mask(graph, mask, axes)
    return said or (score, axes)


def _chosen(graph: Graph, scores: Scores, node: Node, axes: Axes) -> tuple[Value, Axes] | str:
    condition, a, b = graph.inputs(node)
    negated = a is None or (b is not None and not leads_back(graph, a))
    said = _filled(graph, scores, condition, operand(graph, node, 1 if negated else 2), negated, axes)
    return said or (b if negated else a, axes)


def _filled(graph: Graph, scores: Scores, mask: Value, hidden: float | None, negated: bool, axes: Axes) -> str:
    if hidden is None:
        return "its hidden keys do not all score one number"
    return scores.mask(graph, mask, axes, True, negated, hidden)


def _floats(graph: Graph, node: Node) -> bool:
    """A cast from one float type to another."""
    types = [graph.dtype(v) for v in (next(iter(graph.inputs(node))), graph.outputs(node)[0])]
    return all(t is not None and t.is_floating_point for t in types)


def leads_back(graph: Graph, value: Value | None, depth: int = 6) -> bool:
    """Whether a product of two values that vary lies a few steps behind."""

    def made(values: Iterable[Value | None]) -> list[Node]:
        return [node for v in values if v is not None and (node := graph.producer(v)) is not None]

    return _meets(graph, made([value]), lambda node: made(graph.inputs(node)), depth)


def leads_on(graph: Graph, value: Value, depth: int = 4) -> bool:
    """Whether a product of two values that vary lies a few steps ahead."""
    return _meets(graph, graph.users(value), lambda node: graph.users(graph.outputs(node)[0]), depth)


def _meets(graph: Graph, nodes: Iterable[Node], onward: Callable[[Node], Iterable[Node]], depth: int) -> bool:
    """Whether a product is among the nodes or up to `depth` steps onward: level by level, each node once, by however many ways."""
    seen, level = set[Node](), set(nodes)
    for _ in range(depth + 1):
        if any(is_product(graph, node) for node in level):
            return True
        seen |= level
        level = {n for node in level if graph.op(node) in _THROUGH for n in onward(node)} - seen
    return False


def readers(graph: Graph, value: Value) -> list[Node]:
    """What uses a value and computes something."""
    return [user for user in graph.users(value) if graph.op(user) != SAYS_NOTHING]


def of_softmax(graph: Graph, softmax: Node) -> Core | str:
    """softmax between two products, or why it is no attention."""
    frame, inner = Frame(), next(iter(graph.inputs(softmax)))
    shape = graph.shape(inner)
    if shape is None:
        return "the shape of its scores is unknown"
    axes = fresh(shape)
    axis = int(graph.attributes(softmax)["axis"]) % len(shape)
    scores = behind(graph, frame, inner, axes)
    if isinstance(scores, str):
        return scores
    assert scores.found is not None
    pair = scores.found.operand_axes(graph, scores.axes)
    if pair is None:
        return "the product before its softmax is none of queries and keys"
    ahead = _ahead(graph, frame, graph.outputs(softmax)[0], axes)
    if isinstance(ahead, str):
        return ahead
    found, which, weights, zero = ahead
    other, made = found.other_axes(graph, which, weights)
    keys = frame.resolve(axes[axis])
    if not keys or [frame.resolve(g) for c, g in zip(found.terms[which], weights, strict=True) if c not in found.out] != [keys]:
        return "the product after its softmax does not sum over the softmax's axis"
    sides = [any(set(keys) & set(frame.resolve(g)) for g in side) for side in pair]
    if sides == [True, True] or sides == [False, False]:
        return "its softmax is over no axis of the keys alone"
    key = sides.index(True)
    operands = [Operand(v, a) for v, a in zip(scores.found.operands, pair, strict=True)]
    value, out = Operand(found.operands[1 - which], other), Operand(graph.outputs(found.node)[0], made)
    zero = zero or graph.op(softmax) == "safe_softmax"
    of_query = dict(zip(scores.found.terms[1 - key], pair[1 - key], strict=True))
    depth = tuple(a for c, g in of_query.items() if c not in scores.found.out for a in g)
    outer = tuple(of_query[c] for c in scores.found.out if c in of_query)
    width = tuple(a for c, g in zip(found.terms[1 - which], other, strict=True) if c not in found.terms[which] for a in g)
    masks, begin = tuple(scores.masks), scores.found.node
    return Core(frame, operands[1 - key], operands[key], value, out, scores.scale, outer, keys, depth, width, masks, zero=zero, begin=begin)


def _ahead(graph: Graph, frame: Frame, value: Value, axes: Axes) -> tuple[Product, int, Axes, bool] | str:
    """The product with the values, which operand of it the weights are, their axes there, and whether empty rows were made zero."""
    zero = False
    while True:
        users = readers(graph, value)
        node = next((u for u in users if product(graph, u)), None) or next((u for u in users if _on_the_way(graph, u)), None)
        if node is None:
            return "its weights meet no product with values"
        found = product(graph, node)
        if found is not None:
            if found.operands[0] is found.operands[1] or found.scale != 1 or found.added is not None:
                return "the product after its softmax does more than weigh values"
            return found, 0 if found.operands[0] is value else 1, axes, zero
        op, operands = graph.op(node), list(graph.inputs(node))
        if op in ("where", "masked_fill"):
            filled = operand(graph, node, 2 if op == "masked_fill" or operands[1] is value else 1)
            if filled != 0:
                return f"{op} stands between the softmax and the product"
            zero = True
        elif not (op == "cast" and _floats(graph, node)):
            moved = layouts.after(graph, frame, node, axes)
            if moved is None:
                return f"{op} stands between the softmax and the product"
            axes = moved
        value = graph.outputs(node)[0]


def _on_the_way(graph: Graph, node: Node) -> bool:
    return graph.op(node) in _THROUGH and leads_on(graph, graph.outputs(node)[0])
