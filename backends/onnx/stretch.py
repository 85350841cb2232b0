"""What rewriting exchanges in a model, stretch by stretch, so that the time of each can be taken alone.

A stretch is a layer with what a kernel does along with it (bias, activation, a sum, LayerNorm), or attention or another map with the
transposes and scalings at its ends. They are found alike in dense and in rewritten models, so what no rewrite touched is the same in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor

from rewriter.backend import Layer
from rewriter.backends.kernels.following import following
from rewriter.backends.onnx.constants import SMALL
from rewriter.backends.onnx.graph import OnnxGraph
from rewriter.backends.onnx.opaque import is_opaque, lowering_of, matrix_skeleton, spec_of
from rewriter.backends.onnx.part import leaves, part, text
from rewriter.graph import Site
from rewriter.order import in_order

ENDS = {"Transpose", "Reshape", "Mul", "Div"}  # what stands between a map and the layers around it

Nodes = Sequence[ir.Node]


@dataclass(frozen=True)
class Stretch:
    """One of them alone."""

    model: Callable[[int], ir.Model]  # of so many copies, each with inputs and weights of its own
    given: Sequence[Tensor]  # to one copy, in order; of large floats the shape alone
    nbytes: int  # of its weights
    together: int  # bytes of the weights of all stretches of its model: what has passed through the caches before it runs again


def layers(graph: OnnxGraph, sites: Iterable[Site], feeds: Mapping[str, Tensor]) -> Counter[Layer]:
    """How often each stretch stands in the main body, with the shapes that values have on this batch."""
    found = list(stretches(graph, sites))
    shapes = _tapped(graph, {v for nodes in found for node in nodes for v in (*node.inputs, *node.outputs) if v is not None}, feeds)
    together = sum(_nbytes(graph, nodes) for nodes in found)
    return Counter(_layer(graph, nodes, shapes, together) for nodes in found if all(v in shapes for v in _outside(graph, nodes)))


def stretches(graph: OnnxGraph, sites: Iterable[Site]) -> Iterator[list[ir.Node]]:
    """In no order; a node belongs to one of them at most."""
    owned = set[ir.Node]()
    for nodes in _all(graph, list(sites), owned):
        if not owned & set(nodes):
            owned |= set(nodes)
            yield nodes


def _all(graph: OnnxGraph, sites: Sequence[Site], owned: set[ir.Node]) -> Iterator[list[ir.Node]]:
    main = [node for node in graph.model.graph if is_opaque(node)]
    for node in main:
        if spec_of(node)[1]:
            yield _ended(graph, [node], node.outputs[0], matrix_skeleton(spec_of(node)[0])[0].shape[0])
    for site in sites:
        for place in site.places if site.kind == "linear" and site.shape is not None else ():
            if place.y.graph is graph.model.graph:
                yield _ended(graph, place.nodes, place.y, site.shape[0])  # type: ignore[index]
    for node in main:
        if not spec_of(node)[1]:
            yield _widened(graph, [node], owned)
    for site in sites:
        if site.kind == "attention" and site.region is not None and not any(map(is_opaque, site.region.nodes)):
            yield _widened(graph, site.region.nodes, owned)


def _ended(graph: OnnxGraph, nodes: Nodes, y: ir.Value, width: int) -> list[ir.Node]:
    """The nodes, and those from their result to the end of what follows it."""
    end = following(y, width, graph.constants)
    beside = (end.skip, *(end.reshape.inputs[1:] if end.reshape is not None else ()))
    stop = {y, *(v for v in beside if v is not None)}

    def before(value: ir.Value) -> list[ir.Value]:
        node = value.producer()
        return [] if node is None else [v for v in node.inputs if v is not None and not graph.is_const(v)]

    return [*nodes, *(node for v in in_order(end.end, before, stop) if (node := v.producer()) is not None)]


def _widened(graph: OnnxGraph, nodes: Nodes, owned: set[ir.Node]) -> list[ir.Node]:
    """The nodes, with moves and scalings before and behind that serve nothing else."""
    inside = set(nodes)

    def free(node: ir.Node | None) -> bool:
        return node is not None and node.op_type in ENDS and node not in inside | owned and node.graph is graph.model.graph

    todo = [v for node in nodes for v in node.inputs if v is not None]
    while todo:
        node = todo.pop().producer()
        if free(node) and node is not None and not any(leaves(v, [*inside]) for v in node.outputs):
            inside.add(node)
            todo += [v for v in node.inputs if v is not None and not graph.is_const(v)]
    for node in nodes:
        uses = [use.node for use in node.outputs[0].uses()]
        while len(uses) == 1 and free(uses[0]) and uses[0].inputs[0] is not None:
            inside.add(uses[0])
            uses = [use.node for use in uses[0].outputs[0].uses()]
    return [node for node in graph.model.graph if node in inside]


def _outside(graph: OnnxGraph, nodes: Nodes) -> list[ir.Value]:
    """What comes in, in the order in which it is read, constants apart."""
    made = {v for node in nodes for v in node.outputs}
    read = dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and v not in made)
    return [v for v in read if not graph.is_const(v)]


def _tapped(graph: OnnxGraph, wanted: Iterable[ir.Value], feeds: Mapping[str, Tensor]) -> dict[ir.Value, Tensor]:
    """What the values are on the batch: of floats the shape alone, as a meta tensor."""
    found: dict[ir.Value, Tensor] = {}

    def keep(value: ir.Value) -> Callable[[Tensor], None]:
        def call(tensor: Tensor) -> None:
            large = tensor.is_floating_point() and tensor.numel() > SMALL
            found[value] = torch.empty(tensor.shape, device="meta") if large else tensor

        return call

    graph.run(feeds, {v: keep(v) for v in wanted if graph.can_tap(v) and not graph.is_const(v)})
    return found


def _layer(graph: OnnxGraph, nodes: Nodes, known: Mapping[ir.Value, Tensor], together: int) -> Layer:
    """The stretch with what comes in; a key that is equal where times are."""
    dims = {v: list(tensor.shape) for v, tensor in known.items()}
    given = [known[v] for v in _outside(graph, nodes)]
    lowered = [lowering_of(node) for node in nodes if is_opaque(node)]
    key = "\n".join([text(nodes, graph.constants), *lowered, *(f"{t.dtype} {list(t.shape)}" for t in given)])
    tokens = next((t.numel() // t.shape[-1] for t in given if t.dim() and t.is_floating_point()), 1)
    model = partial(part, nodes, dims, graph.constants, graph.opset)
    return Layer(key, tokens, Stretch(model, given, _nbytes(graph, nodes), together))


def _nbytes(graph: OnnxGraph, nodes: Nodes) -> int:
    held = [graph.const(v) for node in nodes for v in node.inputs if v is not None and graph.is_const(v)]
    return sum(tensor.nbytes for tensor in held if tensor is not None)
