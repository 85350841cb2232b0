"""Operators: structured maps that can stand where a dense one stood, each product spelled once against `Ops`.

An operator is a frozen dataclass of tensors, numbers and other operators. `flatten` takes it apart into its tensors and a spec (JSON text);
`unflatten` puts it together again around other tensors, so a graph node, a file and a kernel all hold the same thing.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rewriter.cost import Cost, count
from rewriter.errors import RewriteError
from rewriter.ops import AnyOps, AnySequenceOps


class AbstractOperator(abc.ABC):
    """A map spelled once against the vocabulary; subclasses are frozen dataclasses, abstract ones carry `Abstract` in their name.

    Law: every interpretation of `apply` agrees with the eager one within the dtype's tolerance.
    """

    kinds: ClassVar[dict[str, type[AbstractOperator]]] = {}

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("Abstract"):
            AbstractOperator.kinds[cls.__name__] = cls

    @abc.abstractmethod
    def apply(self, ops: Any, *inputs: Any) -> tuple[Any, ...]:
        """The images of the inputs."""

    @abc.abstractmethod
    def cost(self, tokens: int = 1) -> Cost:
        """Stored numbers, bytes, and operations for `tokens` tokens (2 per multiply-add)."""

    @classmethod
    @abc.abstractmethod
    def random(cls, rng: torch.Generator) -> Self:
        """A small instance, rectangular and no power of two, for the contract tests."""

    def to(self, dtype: torch.dtype) -> Self:
        """The same operator with its weights in another float type (index tensors stay)."""
        leaves, spec = flatten(self)
        return unflatten(spec, [t.to(dtype) if t.is_floating_point() else t for t in leaves])  # type: ignore[return-value]


class AbstractMatrix(AbstractOperator):
    """A linear map (..., n) -> (..., m), y = x @ dense().T.

    Laws: `dense()` agrees with `product` on every vector; `cost` counts the tensors that `flatten` gives.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n): outputs, inputs."""

    @abc.abstractmethod
    def product(self, ops: AnyOps, x: Any) -> Any:
        """The image of x, (..., n) -> (..., m)."""

    def apply(self, ops: AnyOps, *inputs: Any) -> tuple[Any, ...]:
        """One input, one output."""
        (x,) = inputs
        return (self.product(ops, x),)

    def as_product(self) -> tuple[AbstractMatrix, ...]:
        """Matrices whose product it is, in order of application, none a product itself; they share its tensors."""
        return (self,)

    def balanced(self) -> AbstractMatrix:
        """The same matrix in the form that trains best: factors of like size. As it is where nothing is free."""
        return self

    def unbalanced(self, trained: AbstractMatrix) -> AbstractMatrix:
        """What `balanced` gave, after training, in this matrix's own form and at its cost."""
        return trained

    def dense(self) -> Tensor:
        """The (m, n) matrix, by applying the operator to the identity."""
        from rewriter.registry import eager_ops

        tensor = next(t for t in tensors(self) if t.is_floating_point())
        eye = torch.eye(self.shape[1], dtype=tensor.dtype, device=tensor.device)
        image: Tensor = self.product(eager_ops(), eye)
        return image.T.contiguous()

    def cost(self, tokens: int = 1) -> Cost:
        """Stored numbers, bytes, and operations for `tokens` rows (2 per multiply-add)."""
        return count(lambda ops, x: self.product(ops, x), self.shape[1], tokens)


INDICES = {"int64": torch.int64, "uint8": torch.uint8, "int8": torch.int8}  # the types of tensors that are no floats
Dims = tuple[str | int, ...]  # a name is a size that varies, such as "batch" and "time"


class AbstractMap(AbstractOperator):
    """A map of several values to several values. It may be spelled in more than one form; the first is the oracle that the others match.

    Laws: every form agrees with the first one; `outputs` are the shapes that `apply` gives for `inputs`.
    """

    @abc.abstractmethod
    def inputs(self) -> Mapping[str, Dims]:
        """What it takes, in order, with shapes."""

    @abc.abstractmethod
    def outputs(self) -> Mapping[str, Dims]:
        """What it gives, in order, with shapes."""

    def booleans(self) -> tuple[str, ...]:
        """Which inputs are boolean; the others are of one float type."""
        return ()

    @abc.abstractmethod
    def forms(self) -> tuple[str, ...]:
        """The names of its spellings, the oracle first."""

    def offered(self) -> tuple[str, ...]:
        """The forms of which a target takes the fastest: all, unless the map itself says which is for what."""
        return self.forms()

    def lengths(self, tokens: int) -> Mapping[str, int]:
        """How many there are of each size that varies in a call of `tokens` tokens on one sequence, for what is timed and counted."""
        return {"batch": 1, "time": tokens, "keys": tokens}

    @abc.abstractmethod
    def spelled(self, form: str, ops: AnySequenceOps, *inputs: Any) -> tuple[Any, ...]:
        """The images of the inputs in one form."""

    def apply(self, ops: AnySequenceOps, *inputs: Any) -> tuple[Any, ...]:
        """In the last form that is offered, which is the one that is meant to be fast."""
        return self.spelled(self.offered()[-1], ops, *inputs)

    def cost(self, tokens: int = 1) -> Cost:
        """For one sequence of `tokens` tokens: of the last form, or of a recurrence's steps."""
        from rewriter.registry import counted

        cost: Cost = counted(self, tokens)
        return cost


class AbstractRecurrence(AbstractMap):
    """A map linear in its state: (x_1 .. x_k, states) -> (y_1 .. y_l, states); x and y are (batch, time, n), states (batch, ...).

    Laws: scanning `step` is the form "sequential", the oracle; a sequence cut in two, the state carried over, gives what the whole gives.
    """

    carried: bool  # a field: whether the first state is an input; where it is not, it is zero

    @abc.abstractmethod
    def sequences(self) -> Mapping[str, Dims]:
        """The x's."""

    @abc.abstractmethod
    def results(self) -> Mapping[str, Dims]:
        """The y's."""

    @abc.abstractmethod
    def states(self) -> Mapping[str, Dims]:
        """The states."""

    @abc.abstractmethod
    def step(self, ops: AnySequenceOps, states: Sequence[Any], xs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """One token: states and x's of (batch, n) -> new states and y's of (batch, n)."""

    def inputs(self) -> Mapping[str, Dims]:
        return {**self.sequences(), **(self.states() if self.carried else {})}

    def outputs(self) -> Mapping[str, Dims]:
        return {**self.results(), **self.states()}

    def forms(self) -> tuple[str, ...]:
        return ("sequential",)

    def sequential(self, ops: AnySequenceOps, states: Sequence[Any], xs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """The oracle: one step after the other."""
        return ops.recurrence(lambda s, x: self.step(ops, s, x), states, xs)

    def spelled(self, form: str, ops: AnySequenceOps, *inputs: Any) -> tuple[Any, ...]:
        xs = inputs[: len(self.sequences())]
        states = inputs[len(xs) :] if self.carried else [ops.zeros(xs[0], *dims[1:]) for dims in self.states().values()]  # type: ignore[arg-type]
        states, ys = getattr(self, form)(ops, states, xs)
        return (*ys, *states)


def _walk(operator: AbstractOperator) -> Iterator[Tensor]:
    for field in dataclasses.fields(operator):  # type: ignore[arg-type]
        yield from _leaves(getattr(operator, field.name))


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, AbstractOperator):
        yield from _walk(value)
    elif isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)


def tensors(operator: AbstractOperator) -> list[Tensor]:
    """All tensors of an operator, in field order."""
    return list(_walk(operator))


def flatten(operator: AbstractOperator) -> tuple[list[Tensor], str]:
    """Its tensors in field order, and a spec: canonical JSON that names the types, the plain fields and where the tensors go."""
    leaves: list[Tensor] = []
    return leaves, json.dumps(_encode(operator, leaves), sort_keys=True, separators=(",", ":"))


def _encode(value: Any, leaves: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        leaves.append(value)
        kind = {} if value.is_floating_point() else {"index": str(value.dtype).removeprefix("torch.")}
        return {"tensor": len(leaves) - 1, "shape": list(value.shape), **kind}
    if isinstance(value, AbstractOperator):
        fields = {f.name: _encode(getattr(value, f.name), leaves) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {"operator": type(value).__name__, "fields": fields}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, leaves) for v in value]}
    if isinstance(value, int | float | str | bool):
        return value
    raise TypeError(f"an operator's field holds a {type(value).__name__}; allowed are Tensor, operator, tuple, int, float, str, bool")


def unflatten(spec: str, leaves: Sequence[Tensor]) -> AbstractOperator:
    """The operator of `spec` around these tensors; unknown types are a RewriteError naming them."""
    from rewriter.registry import load_structures

    load_structures()
    operator = _decode(json.loads(spec), leaves)
    assert isinstance(operator, AbstractOperator)
    return operator


def _decode(value: Any, leaves: Sequence[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return leaves[value["tensor"]]
    if "tuple" in value:
        return tuple(_decode(v, leaves) for v in value["tuple"])
    kind = AbstractOperator.kinds.get(value["operator"])
    if kind is None:
        raise RewriteError(f"unknown operator '{value['operator']}' in a spec; install the package that defines it")
    return kind(**{name: _decode(v, leaves) for name, v in value["fields"].items()})


def skeleton(spec: str) -> tuple[AbstractOperator, list[Tensor]]:
    """The operator of a spec with shapes and no numbers, and its tensors."""
    found: dict[int, Tensor] = {}

    def note(value: dict[str, Any]) -> dict[str, Any]:
        if isinstance(value.get("tensor"), int):
            dtype = INDICES[value["index"]] if "index" in value else torch.float32
            found[value["tensor"]] = torch.empty(value["shape"], dtype=dtype, device="meta")
        return value

    json.loads(spec, object_hook=note)
    leaves = [found[i] for i in range(len(found))]
    return unflatten(spec, leaves), leaves
