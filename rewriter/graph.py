"""Graphs and sites: what passes see of a model, whichever format it came in.

A `Graph` wraps an fx or onnx_ir graph behind normalised names, so that detectors and rules are written once. A `Site` is a replaceable
place: the nodes that multiply by one stored weight, how the features lie there, and what the weight is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from rewriter.inputs import InputSpec
from rewriter.operator import AbstractMap, AbstractOperator

Node = Any
Value = Any


@dataclass(frozen=True)
class Layout:
    """How features lie where they are not simply the last axis; () means "as it is".

    x' = flatten(permute(x, before), last `join` axes) -> product -> y = permute(unflatten(y', spread), after).
    """

    before: tuple[int, ...] = ()  # permutation of x's axes
    join: int = 1  # trailing axes that form the features; 0 appends an axis 1 long
    spread: tuple[int, ...] = ()  # sizes of the axes that the output features unfold to
    after: tuple[int, ...] = ()  # permutation of the unfolded output's axes


PLAIN = Layout()


@dataclass(frozen=True)
class Place:
    """One use of a site's weight: y = W x (+ bias). `nodes` are replaced together; y is the last one's output."""

    nodes: tuple[Node, ...]
    x: Value
    y: Value
    layout: Layout = PLAIN
    bias: Value | None = None  # (m,) constant that the nodes add after the product
    bias_scale: float = 1.0  # Gemm's and addmm's beta


@dataclass(frozen=True)
class Port:
    """A value as a map takes or gives it: permute(unflatten(flatten(permute(x, before), last `join` axes), spread), after), where x is the
    value that it takes, or its own result."""

    value: Value
    layout: Layout = PLAIN
    lone: bool = False  # the value has no batch axis, the map sees a batch of one
    hoist: Mapping[Value, Value] = field(default_factory=dict)  # `value` is one step's, elementwise from these: they -> whole sequences
    log: bool = False  # the map takes its logarithm
    negated: bool = False  # the map takes its negation, of booleans
    rows: bool = False  # `value` is row by row from what is hoisted, not elementwise: the sequences' first two axes are one meanwhile
    after: tuple[Value, Value] | None = None  # inside a step: what the map gives, and what `value` is, by row from that and the hoisted


@dataclass(frozen=True)
class Region:
    """The nodes that a map replaces, with what goes in and comes out, in the map's own order."""

    nodes: tuple[Node, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port | None, ...]  # None where nothing reads it

    @property
    def sources(self) -> list[Value]:
        """What the map, and what is done to its results, read of the outside."""
        after = [v for p in self.outputs if p is not None for v in p.hoist.values()]
        return [v for p in self.inputs for v in (p.hoist.values() or [p.value])] + after


@dataclass(frozen=True)
class Slice:
    """One step of a sequence: `inner` is `outer` at one index of `axis`, which is kept, 1 long, or dropped."""

    inner: Value
    outer: Value
    axis: int
    kept: bool = False


@dataclass(frozen=True)
class Carry:
    """A state: inside a step at its begin and its end, outside before the first step and, where it is read, after the last."""

    begin: Value
    end: Value
    initial: Value
    final: Value | None


@dataclass(frozen=True)
class Loop:
    """A recurrence as a graph has it, whatever the spelling: the inside of one step, and what binds it to the outside."""

    nodes: tuple[Node, ...]  # of the outside: replaced together
    carries: tuple[Carry, ...]
    xs: tuple[Slice, ...]
    ys: tuple[Slice, ...]


@dataclass(frozen=True)
class WeightRef:
    """Where a site's (m, n) matrix is stored: scale * permute(const(value), axes).reshape(m, n)."""

    name: str  # the stored parameter's name
    value: Value  # the constant in the graph
    axes: tuple[int, ...] = ()  # permutation of the stored axes, () = as stored
    scale: float = 1.0
    shared_by: tuple[str, ...] = ()  # other things that use the stored tensor

    @property
    def transposed(self) -> bool:
        """Stored as (n, m)."""
        return self.axes == (1, 0)


@dataclass(frozen=True)
class Site:
    """A replaceable place in a graph. `reason` is empty when a pass may rewrite it, else says why it is only listed."""

    id: str  # unique in the graph and stable between runs
    name: str  # module path or parameter name, as users know it
    kind: str  # linear | attention | recurrence | adapter
    shape: tuple[int, int] | None  # (m, n) of the matrix
    dtype: torch.dtype | None
    places: tuple[Place, ...]
    weights: Mapping[str, WeightRef] = field(default_factory=dict)  # empty where no stored matrix is what the places multiply by
    operator: AbstractOperator | None = None  # what already stands there
    reason: str = ""
    region: Region | None = None  # of attention and recurrences that were read
    form: AbstractMap | None = None  # what the region's nodes compute, exactly
    stays: bool = False  # `reason` is that something else needs the dense matrix too: a form beside it costs what it stores, no more


class Graph(Protocol):
    """One model. Nodes and values are opaque handles; weights stay on disk or in the source until `const` asks for them."""

    format: str  # "torch" | "onnx"

    def nodes(self) -> Iterable[Node]:
        """Every node of this body and of every nested one (cond, scan, If, Loop, local functions), in topological order."""
        ...

    def op(self, node: Node) -> str:
        """The normalised operation: linear matmul addmm gemm einsum conv add mul where transpose reshape expand repeat concat split gather
        embedding fill shape softmax attention layer_norm rms_norm rnn lstm gru scan loop cond structured …; an operation without a common
        name keeps its own, with its domain."""
        ...

    def inputs(self, node: Node) -> Sequence[Value | None]:
        """Tensor operands in the normalised order: linear (x, w, b), matmul (a, b), addmm (c, a, b), gemm (a, b, c), einsum (operands…),
        conv (x, w, b), add/mul (a, b), gather/embedding (table, indices), layer_norm (x, gamma, beta), rms_norm (x, gamma), where
        (condition, a, b), masked_fill (x, mask, value), attention (query, key, value, mask), rnn lstm gru (x, matrices and biases…,
        states); None stands for a plain number."""
        ...

    def outputs(self, node: Node) -> Sequence[Value]: ...

    def attributes(self, node: Node) -> Mapping[str, Any]:
        """Normalised: einsum equation; gemm alpha beta trans_a trans_b; addmm alpha beta; conv strides pads dilations groups; transpose
        axes; softmax axis; axes, of shape those whose sizes it
        gives; scalars, of add mul where … the plain numbers among the operands; scalar, of fill the value; attention scale
        (None: the default) causal heads shared (of inputs without an axis for them) empty (see Attention) beyond (why it is more); weights,
        of rnn lstm gru how many operands after x are matrices or biases."""
        ...

    def producer(self, value: Value) -> Node | None: ...

    def users(self, value: Value) -> Sequence[Node]: ...

    def body(self, node: Node) -> str:
        """ "" for the main body, else the name of the nested body that holds the node."""
        ...

    def shape(self, value: Value) -> tuple[int | str, ...] | None:
        """Sizes, a name where dynamic; None where even the rank is unknown."""
        ...

    def dtype(self, value: Value) -> torch.dtype | None: ...

    def name(self, value: Value) -> str: ...

    def scope(self, node: Node) -> str:
        """The module path that the node came from, "" where unknown."""
        ...

    def const(self, value: Value) -> Tensor | None:
        """The value as a tensor where it depends on stored tensors alone (through views, casts, transposes), else None. Loaded lazily."""
        ...

    def is_const(self, value: Value) -> bool:
        """Whether `const` would give a tensor, without loading it."""
        ...

    def stored_name(self, value: Value) -> str:
        """The stored parameter that a constant value comes from."""
        ...

    def storage_users(self, value: Value) -> Sequence[tuple[Node, Value]]:
        """(node, operand) wherever the parameter behind a constant value is used, views looked through, under whatever tied name."""
        ...

    def operator(self, node: Node) -> AbstractOperator | None:
        """The operator of a node whose `op` is "structured"."""
        ...

    def can_splice(self, place: Place | Region) -> str:
        """ "" when `splice` can work there, else the reason."""
        ...

    def splice(self, site: Site, operator: AbstractOperator, shift: Tensor | None = None) -> None:
        """At each place ONE opaque node that holds the operator, layout changes around it, then bias * bias_scale + shift; a map takes its
        region's place instead. The factors become stored parameters named `<site name>.<field>`. The old nodes stay, unused, until
        `prune`."""
        ...

    def loop(self, node: Node) -> Loop | str:
        """A scan or loop node, read; else why it cannot be read as a recurrence over sequences."""
        ...

    def sliced(self, value: Value) -> tuple[Value, int, int, bool] | None:
        """(source, axis, index, kept) where the value is one slice of another at a constant index."""
        ...

    def stacked(self, node: Node) -> tuple[Sequence[Value], int, bool] | None:
        """(pieces, axis, kept) where the node puts values in a row: along a new axis, or (kept) along one that they have."""
        ...

    def compute(self, wanted: Sequence[Value], given: Mapping[Value, Tensor]) -> list[Tensor]:
        """The wanted values from the given ones and from stored tensors, in the float type of the given ones (float64 to tell equal from
        close); RewriteError where something else is needed or an operation cannot be computed."""
        ...

    def branch(self, site: Site, down: Tensor, up: Tensor, shift: Tensor | None = None) -> None:
        """At each place y + up (down x) (+ shift) instead of y, in plain operations: down (r, n), up (m, r), shift (m,) become stored
        parameters `<site name>.lora_A` and so on. There is no way back."""
        ...

    def parameters(self) -> Mapping[str, Value]:
        """Every stored parameter of the main body, by name."""
        ...

    def put(self, value: Value, tensor: Tensor) -> None:
        """The stored parameter that a value is (it has no producer) holds this tensor from here on, of the same shape and type."""
        ...

    def skip(self, value: Value, kept: Value) -> None:
        """What reads `value` reads `kept`, which is there before it, from here on. There is no way back."""
        ...

    def recache(self, past: Value, present: Value, heads: int, width: int) -> None:
        """A cache's input `past`, its output `present` and what lies between are (batch, heads, length, width) from here on; what a call
        puts in has these sizes already. `run` and `part` take an empty cache of other sizes, too. Undone by the sizes before."""
        ...

    def restore(self, site: Site) -> None:
        """Undo `splice`: the original nodes are used again."""
        ...

    def prune(self) -> None:
        """Drop what nothing uses: replaced nodes, dense weights that no other place needs."""
        ...

    def run(
        self, feeds: Mapping[str, Tensor], taps: Mapping[Value, Callable[[Tensor], None]] | None = None, grad: bool = False
    ) -> dict[str, Tensor]:
        """Evaluate; every tapped value is handed to its callback as often as it is computed (nested bodies included where `can_tap`), what
        stands in for it where it was replaced.

        `grad`: so that what comes out can be differentiated by what `trainable` gave; RewriteError where a format cannot."""
        ...

    def part(self, feeds: Mapping[str, Tensor], given: Mapping[Value, Tensor], wanted: Sequence[Value], grad: bool = False) -> list[Tensor]:
        """Some values of the main body on a batch, the given ones taken as they are, nothing computed that only they need; `grad` as in
        `run`."""
        ...

    def trainable(self, site: Site) -> Sequence[Tensor]:
        """The floats that `splice` stored for a site: its factors as `flatten` has them, then the biases that it holds. An optimiser may
        change them in place; they are what `run` uses."""
        ...

    def can_tap(self, value: Value) -> bool: ...

    def specs(self) -> list[InputSpec]:
        """The model's inputs, in order."""
        ...

    def output_names(self) -> list[str]: ...

    def nbytes(self) -> int:
        """Bytes of all stored parameters, tied ones once."""
        ...

    def fingerprint(self) -> str:
        """A hash of all that `run` depends on: the nodes of every body, their attributes and the stored tensors."""
        ...

    def clone(self) -> Self:
        """An independent graph that shares the stored tensors."""
        ...


def load_weight(graph: Graph, site: Site) -> Tensor:
    """The site's (m, n) matrix, in its stored dtype; of an adapter U D, multiplied out."""
    assert site.shape is not None
    if site.kind == "adapter":
        down, up = load_branch(graph, site)
        return (up.double() @ down.double()).to(site.dtype)
    return load_matrix(graph, site.weights["weight"], site.shape)


def load_branch(graph: Graph, site: Site) -> tuple[Tensor, Tensor]:
    """An adapter's factors D (r, n) and U (m, r), in the types that they are stored in."""
    assert site.shape is not None
    m, n = site.shape
    return load_matrix(graph, site.weights["down"], (-1, n)), load_matrix(graph, site.weights["up"], (m, -1))


def load_matrix(graph: Graph, ref: WeightRef, shape: tuple[int, int]) -> Tensor:
    """What a reference says, in its stored dtype; one of the sizes may be -1."""
    tensor = graph.const(ref.value)
    assert tensor is not None
    if ref.axes:
        tensor = tensor.permute(ref.axes)
    tensor = tensor.reshape(shape)
    return tensor if ref.scale == 1.0 else tensor * ref.scale


def load_bias(graph: Graph, place: Place, features: int) -> Tensor | None:
    """What the place adds, (features,) in float64; None where that is nothing. A bias that varies has to be refused before."""
    if place.bias is None:
        return None
    stored = graph.const(place.bias)
    assert stored is not None
    return (stored.double() * place.bias_scale).reshape(-1).expand(features)


def put_matrix(graph: Graph, ref: WeightRef, matrix: Tensor) -> None:
    """Store the (m, n) matrix where a reference reads it, in its own dtype: the inverse of `load_matrix`, back through transposes."""
    value = ref.value
    axes = ref.axes or tuple(range(len(graph.shape(value) or ())))
    sizes = [int(size) for size in graph.shape(value) or ()]
    turned = (matrix if ref.scale == 1.0 else matrix / ref.scale).reshape([sizes[axis] for axis in axes])
    tensor = turned.permute([axes.index(axis) for axis in range(len(axes))])
    while (node := graph.producer(value)) is not None:
        axes = graph.attributes(node)["axes"]
        tensor = tensor.permute([axes.index(axis) for axis in range(len(axes))])
        value = next(v for v in graph.inputs(node) if v is not None)
    graph.put(value, tensor)


def is_turned(graph: Graph, value: Value) -> bool:
    """Whether a constant is a stored parameter, as it is or transposed."""
    while (node := graph.producer(value)) is not None:
        if graph.op(node) != "transpose":
            return False
        value = next(v for v in graph.inputs(node) if v is not None)
    return True
