"""Reads h' = A h + B u + s as a linear time-invariant system, and h' = a o h + b as a diagonal recurrence, both by behaviour.

A, B, C and D are probed with unit states and unit inputs in float64; that nothing else goes in is checked on random ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rewriter.algebra import Dense, Diagonal
from rewriter.graph import Region, Value
from rewriter.passes.detect.reading import Reading, final_port, result_port, sequence_port, state_port, zero
from rewriter.passes.detect.step import DTYPE, Step, close
from rewriter.passes.structures.diagonal_recurrence import DiagonalRecurrence
from rewriter.passes.structures.linear_system import LinearSystem
from rewriter.registry import eager_ops
from rewriter.structure import NoMatch

CHANGES = "a transition that changes from step to step"
MOST_STATES = 1024  # that are probed one by one


def read_time_invariant(step: Step, rng: torch.Generator) -> Reading | NoMatch:
    """The recurrence as LinearSystem, or why it is none."""
    if len(step.state) != 1 or len(step.ys) > 1:
        return NoMatch(f"{len(step.state)} states and {len(step.ys)} results; one of each can be read")
    (begin,) = step.state
    lone = step.state[begin].dim() == 1
    for inputs in (step.x, step.edge):
        if len(inputs) == 1 and not step.beyond(inputs) and _constant(step, begin, inputs, rng):
            if step.state[begin].numel() > MOST_STATES * (1 if lone else step.state[begin].shape[0]):
                return NoMatch(f"more than {MOST_STATES} states of a time-invariant system")
            return _system(step, begin, inputs, lone)
    return NoMatch(CHANGES)


def _constant(step: Step, begin: Value, inputs: Mapping[Value, Tensor], rng: torch.Generator) -> bool:
    """F(s, x) - F(s, y) - F(t, x) + F(t, y) = 0, and F(0, x + y) - F(0, x) - F(0, y) + F(0, 0) = 0."""
    ((name, x),) = inputs.items()
    s, t = step.state[begin], torch.randn(step.state[begin].shape, generator=rng, dtype=DTYPE)
    y, none, zero = torch.randn(x.shape, generator=rng, dtype=DTYPE), torch.zeros_like(x), torch.zeros_like(s)

    def image(state: Tensor, given: Tensor) -> list[Tensor]:
        ends, ys = step.run({begin: state}, {name: given})
        return [*ends, *ys]

    mixed = zip(image(s, x), image(t, y), image(s, y), image(t, x), strict=True)
    alone = zip(image(zero, x + y), image(zero, none), image(zero, x), image(zero, y), strict=True)
    return all(close(a + b, c + d) for a, b, c, d in [*mixed, *alone])


def _probe(step: Step, wanted: Value, given: Mapping[Value, Tensor], unit: Value, lone: bool) -> tuple[Tensor, Tensor]:
    """(n, m) images of the unit vectors at `unit`, and (m,) that of zero; everything else is at zero."""
    zeros = {v: torch.zeros_like(t) for v, t in given.items()}
    (base,) = step.compute([wanted], zeros)
    rows = 1 if lone else base.shape[0]
    flat = zeros[unit].reshape(rows, -1)
    images = []
    for i in range(0, flat.shape[1], rows):
        probe = torch.zeros_like(flat)
        for r in range(min(rows, flat.shape[1] - i)):
            probe[r, i + r] = 1
        (image,) = step.compute([wanted], {**zeros, unit: probe.reshape(zeros[unit].shape)})
        images.append((image - base).reshape(rows, -1))
    return torch.cat(images)[: flat.shape[1]], base.reshape(rows, -1)[0]


def _system(step: Step, begin: Value, inputs: Mapping[Value, Tensor], lone: bool) -> Reading | NoMatch:
    ((name, x),) = inputs.items()
    given = {begin: step.state[begin], name: x}
    end = step.ends[0]
    a, s = _probe(step, end, given, begin, lone)
    b, _ = _probe(step, end, given, name, lone)
    c, d, r = torch.eye(len(a), dtype=DTYPE), torch.zeros(len(b), len(a), dtype=DTYPE), torch.zeros(len(a), dtype=DTYPE)
    if step.ys:
        read = _readout(step, begin, given, name, lone)
        if isinstance(read, NoMatch):
            return read
        c, d, r = read
    form = _form(a, b, c, d, s, r)
    flat = x.reshape(1 if lone else x.shape[0], -1)
    ends, ys = step.run({begin: step.state[begin]}, {name: x})
    (new,), (out,) = form.step(eager_ops(), [step.state[begin].reshape(len(flat), -1)], [flat])
    if not close(new, ends[0].reshape(new.shape)) or (ys and not close(out, ys[0].reshape(out.shape))):
        return NoMatch("a linear state that its probing does not reproduce")
    dtype = step.graph.dtype(step.loop.carries[0].initial) or torch.float32
    return region_reading(step, form.to(dtype), [(name, range(x.dim()))], lone, describe(a))


def _readout(step: Step, begin: Value, given: Mapping[Value, Tensor], name: Value, lone: bool) -> tuple[Tensor, Tensor, Tensor] | NoMatch:
    """C, D and r with y = C h' + D u + r, h' the new state."""
    y, end = step.ys[0], step.ends[0]
    after = {**given, end: given[begin]}
    (seen,) = step.compute([y], after)
    (other,) = step.compute([y], {**after, begin: given[begin] + 1})
    if not close(seen, other):
        return NoMatch("its result reads the state before the step; one that reads it after can be raised")
    c, r = _probe(step, y, after, end, lone)
    d, _ = _probe(step, y, after, name, lone)
    return c, d, r


def _form(a: Tensor, b: Tensor, c: Tensor, d: Tensor, s: Tensor, r: Tensor) -> LinearSystem:
    """Without the parts that are identities or zero."""
    diagonal = torch.equal(a, torch.diag(a.diagonal()))
    return LinearSystem(
        Diagonal(a.diagonal().contiguous()) if diagonal else Dense(a.contiguous()),
        () if _is_eye(b) else Dense(b.contiguous()),
        () if _is_eye(c) else Dense(c.contiguous()),
        Dense(d.contiguous()) if bool(d.any()) else (),
        s if bool(s.any()) else (),
        r if bool(r.any()) else (),
    )


def _is_eye(x: Tensor) -> bool:
    return x.shape[0] == x.shape[1] and torch.equal(x, torch.eye(len(x), dtype=x.dtype))


def region_reading(
    step: Step, form: LinearSystem | DiagonalRecurrence, inputs: Sequence[tuple[Value, Sequence[int]]], lone: bool, said: str
) -> Reading | NoMatch:
    """The ports of a form whose state and result lie as the model has them."""
    ports = []
    for name, order in inputs:
        port = sequence_port(step, name, order, lone)
        if isinstance(port, NoMatch):
            return port
        ports.append(port)
    ((_, state),) = step.state.items()
    order = tuple(range(state.dim()))
    _, ys = step.run(step.state, step.edge)
    result = None
    if ys:
        y = step.y
        sizes = list((ys[0].squeeze(y.axis) if y.kept else ys[0]).shape[0 if lone else 1 :])
        found = result_port(y, ys[0], ys[0].reshape(1 if lone else state.shape[0], -1), sizes, lone)
        if isinstance(found, NoMatch):
            return found
        result = found
    (carry,) = step.loop.carries
    carried = not zero(step, carry.initial)
    if carried:
        ports.append(state_port(carry.initial, order, (), lone))
    final = final_port(carry.final, order, list(state.shape), 1, lone)
    return Reading(replace(form, carried=carried), Region(step.loop.nodes, tuple(ports), (result, final)), said)


def describe(a: Tensor) -> str:
    """For the report: what A, applied as h @ a, is."""
    n = len(a)
    if torch.equal(a, torch.diag(a.diagonal())):
        return f"time-invariant, {n} states, diagonal"
    eye = torch.eye(n, dtype=a.dtype)
    rank = int(torch.linalg.matrix_rank(a - eye, atol=1e-6 * float(torch.linalg.matrix_norm(a, 2))))  # stored in float32
    kinds = ["orthogonal"] if torch.allclose(a @ a.T, eye, atol=1e-6) else []
    if not kinds and torch.allclose(a @ a.T, a.T @ a, atol=1e-6):
        kinds = ["normal"]
    if 2 * rank < n:
        kinds.append(f"identity plus rank {rank}")
    return f"time-invariant, {n} states, {' and '.join(kinds) or 'dense'} transition"
