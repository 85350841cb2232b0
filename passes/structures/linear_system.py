"""h_t = A h_{t-1} + B u_t + s,  y_t = C h_t + D u_t + r: a linear time-invariant recurrence whose A, B, C and D are operators.

With A = Diagonal + Permutation . Diagonal (conjugate pairs) it is a diagonal state space; with blocks for B, C, D a bank of them (S4D);
with a product of Householder factors an orthogonal recurrence. The chunked form runs L steps at once: with inputs, states and outputs of
a chunk as vectors, y = T u + O h and h' = A^L h + M u. T holds the impulse response; only every L-th state waits for the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from rewriter.algebra import BlockDiagonal, Compose, Dense, Diagonal, Permutation, Sum
from rewriter.operator import AbstractMatrix, AbstractRecurrence, Dims, tensors
from rewriter.ops import AnySequenceOps
from rewriter.registry import eager_ops

Nothing = tuple[()]  # a part that is the identity, or zero, and takes no work


@dataclass(frozen=True)
class LinearSystem(AbstractRecurrence):
    """input (batch, time, p), state (batch, n) -> output (batch, time, q), state."""

    transition: AbstractMatrix  # A, (n, n)
    entry: AbstractMatrix | Nothing = ()  # B, (n, p); () is the identity
    readout: AbstractMatrix | Nothing = ()  # C, (q, n); () is the identity
    direct: AbstractMatrix | Nothing = ()  # D, (q, p); () is zero
    shift: Tensor | Nothing = ()  # s, (n,)
    offset: Tensor | Nothing = ()  # r, (q,)
    carried: bool = True

    @property
    def order(self) -> int:
        """n."""
        return self.transition.shape[0]

    def sequences(self) -> Mapping[str, Dims]:
        return {"input": ("batch", "time", self.entry.shape[1] if self.entry else self.order)}

    def results(self) -> Mapping[str, Dims]:
        return {"output": ("batch", "time", self.readout.shape[0] if self.readout else self.order)}

    def states(self) -> Mapping[str, Dims]:
        return {"state": ("batch", self.order)}

    def step(self, ops: AnySequenceOps, states: Sequence[Any], xs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        (h,), (u,) = states, xs
        h = ops.add(self.transition.product(ops, h), self._added(ops, self.entry.product(ops, u) if self.entry else u, self.shift))
        y = self.readout.product(ops, h) if self.readout else h
        if self.direct:
            y = ops.add(y, self.direct.product(ops, u))
        return [h], [self._added(ops, y, self.offset)]

    @staticmethod
    def _added(ops: AnySequenceOps, x: Any, constant: Tensor | Nothing) -> Any:
        return ops.add(x, ops.const(constant)) if isinstance(constant, Tensor) else x

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        a, b, c, d = (0.3 * torch.randn(shape, generator=rng) for shape in ((5, 5), (3, 5), (5, 2), (3, 2)))
        return cls(Dense(a), Dense(b), Dense(c), Dense(d), torch.randn(5, generator=rng))


@dataclass(frozen=True)
class ChunkedSystem(AbstractRecurrence):
    """The same map with the matrices of L steps beside those of one. Within a chunk values lie channel by channel: (p*L), (q*L)."""

    system: LinearSystem
    length: int  # L
    leap: AbstractMatrix  # A^L, (n, n)
    toeplitz: AbstractMatrix  # T, (q*L, p*L)
    observe: AbstractMatrix  # O, (q*L, n)
    control: AbstractMatrix  # M, (n, p*L)
    push: Tensor | Nothing = ()  # (n,) what s adds to a state in L steps
    drift: Tensor | Nothing = ()  # (q*L,) what s and r add to the outputs

    @property
    def carried(self) -> bool:  # type: ignore[override]
        return self.system.carried

    def sequences(self) -> Mapping[str, Dims]:
        return self.system.sequences()

    def results(self) -> Mapping[str, Dims]:
        return self.system.results()

    def states(self) -> Mapping[str, Dims]:
        return self.system.states()

    def forms(self) -> tuple[str, ...]:
        return ("sequential", "chunked")

    def step(self, ops: AnySequenceOps, states: Sequence[Any], xs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        return self.system.step(ops, states, xs)

    def chunked(self, ops: AnySequenceOps, states: Sequence[Any], xs: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        (state,), (u,) = states, xs
        rows = ops.fold(ops.swap(ops.chunks(u, self.length, 1)))  # (batch, chunks, p*L)
        pushed = LinearSystem._added(ops, self.control.product(ops, rows), self.push)

        def leap(carry: Sequence[Any], row: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
            return [ops.add(self.leap.product(ops, carry[0]), row[0])], [carry[0]]

        _, (before,) = ops.recurrence(leap, [state], [pushed])
        y = ops.add(self.toeplitz.product(ops, rows), self.observe.product(ops, before))
        y = ops.swap(ops.unfold(LinearSystem._added(ops, y, self.drift), -1, self.length))
        # zeros behind the end would move the state: the last steps are taken one by one
        final, _ = self.system.sequential(ops, [ops.at_tail(before, u, self.length)], [ops.tail(u, self.length, 1)])
        return final, [ops.joined(y, u, 1)]

    @classmethod
    def random(cls, rng: torch.Generator) -> Self:
        return chunked(LinearSystem.random(rng), 4)  # type: ignore[return-value]


def conjugate_pairs(keep: Tensor, cross: Tensor, partner: Tensor) -> AbstractMatrix:
    """h' = keep h + cross h[partner], all (n,): a diagonal complex transition in real numbers."""
    return Sum((Diagonal(keep), Compose((Permutation(partner, len(keep)), Diagonal(cross)))))


def chunked(system: LinearSystem, length: int) -> ChunkedSystem:
    """The matrices of `length` steps, by running the system on unit inputs and unit states in float64.

    Where B, C and D are blocks of one input and one output each, channels do not mix, and neither do the matrices.
    """
    channels = _channels(system)
    exact = system.to(torch.float64)
    n, p = system.order, exact.sequences()["input"][2]
    assert isinstance(p, int)
    bare = replace(exact, shift=(), offset=(), carried=True)
    inputs = torch.zeros(1 if channels else p, length, p, dtype=torch.float64)
    inputs[:, 0] = torch.ones(1, p) if channels else torch.eye(p)
    response, driven = _run(bare, inputs)  # (p or 1, L, q), (p or 1, L, n): to an impulse at the first step
    per = n // channels if channels else n
    states = torch.eye(per, dtype=torch.float64).repeat(1, channels or 1)
    seen, _ = _run(bare, torch.zeros(per, length, p, dtype=torch.float64), states)  # (per, L, q)
    parts = _blocks(response, driven, seen, channels) if channels else _dense(response, driven, seen)
    leap = _power(exact.transition, length)
    push, drift = _constants(exact, length)
    made = ChunkedSystem(exact, length, leap, *parts, push, drift)
    dtype = next(t.dtype for t in tensors(system) if t.is_floating_point())
    return replace(made.to(dtype), system=system)


def _channels(system: LinearSystem) -> int:
    """How many independent single-input, single-output systems it is; 0 where it is one."""
    ends = (system.entry, system.readout)
    if not all(isinstance(part, BlockDiagonal) for part in ends) or not isinstance(system.direct, Diagonal | tuple):
        return 0
    first, second = (part.blocks for part in ends if isinstance(part, BlockDiagonal))
    return len(first) if first.shape[1] == 1 == second.shape[2] and len(first) == len(second) else 0


def _run(system: LinearSystem, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs and states after every step."""
    ops = eager_ops()
    h = inputs.new_zeros(len(inputs), system.order) if state is None else state
    outputs, states = [], []
    for t in range(inputs.shape[1]):
        (h,), (y,) = system.step(ops, [h], [inputs[:, t]])
        outputs.append(y)
        states.append(h)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def _lags(response: Tensor) -> Tensor:
    """(p, L, q) -> (L in, L out, p, q): the response to an input at one step, at another."""
    length = response.shape[1]
    lag = torch.arange(length) - torch.arange(length)[:, None]
    return response.transpose(0, 1)[lag.clamp(min=0)] * (lag >= 0)[..., None, None]


def _dense(response: Tensor, driven: Tensor, seen: Tensor) -> tuple[AbstractMatrix, AbstractMatrix, AbstractMatrix]:
    toeplitz = _lags(response).permute(2, 0, 3, 1).flatten(2).flatten(0, 1)  # (p*L, q*L)
    observe = seen.transpose(1, 2).flatten(1)  # (n, q*L)
    control = driven.flip(1).flatten(0, 1)  # (p*L, n)
    return Dense(toeplitz), Dense(observe), Dense(control)


def _blocks(response: Tensor, driven: Tensor, seen: Tensor, channels: int) -> tuple[AbstractMatrix, AbstractMatrix, AbstractMatrix]:
    toeplitz = _lags(response)[:, :, 0].permute(2, 0, 1)  # (channels, L, L)
    observe = seen.permute(2, 0, 1)  # (channels, n/channels, L)
    control = driven[0].flip(0).unflatten(-1, (channels, -1)).transpose(0, 1)  # (channels, L, n/channels)
    return BlockDiagonal(toeplitz), BlockDiagonal(observe), BlockDiagonal(control)


def _power(transition: AbstractMatrix, length: int) -> AbstractMatrix:
    """A^length in the form that A has where that is closed under products."""
    if isinstance(transition, Diagonal):
        return Diagonal(transition.scale**length)
    pairs = as_pairs(transition)
    if pairs is not None:
        keep, cross, partner = pairs
        raised = torch.complex(keep, cross) ** length
        return conjugate_pairs(raised.real, torch.where(cross == 0, 0.0, raised.imag), partner)
    return Dense(torch.linalg.matrix_power(transition.dense(), length).T.contiguous())


def as_pairs(transition: AbstractMatrix) -> tuple[Tensor, Tensor, Tensor] | None:
    """keep, cross and partner of `conjugate_pairs`."""
    if not isinstance(transition, Sum) or len(transition.terms) != 2:
        return None
    keep, rest = transition.terms
    if not isinstance(keep, Diagonal) or not isinstance(rest, Compose) or len(rest.factors) != 2:
        return None
    moved, cross = rest.factors
    if not isinstance(moved, Permutation) or not isinstance(cross, Diagonal):
        return None
    return keep.scale, cross.scale, moved.index


def _constants(system: LinearSystem, length: int) -> tuple[Tensor | Nothing, Tensor | Nothing]:
    """push and drift: the last state and the outputs of zero inputs from the zero state."""
    if not isinstance(system.shift, Tensor) and not isinstance(system.offset, Tensor):
        return (), ()
    p = system.sequences()["input"][2]
    assert isinstance(p, int)
    outputs, states = _run(replace(system, carried=True), torch.zeros(1, length, p, dtype=torch.float64))
    return states[0, -1], outputs[0].T.flatten()
