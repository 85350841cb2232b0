"""Reads h' = a o h + b, a and b given token by token, as a diagonal recurrence: the transition acts entry by entry."""

from __future__ import annotations

import math

import torch

from rewriter.graph import Value
from rewriter.passes.detect.reading import Reading, arranged
from rewriter.passes.detect.step import Step, close
from rewriter.passes.detect.vector_state import region_reading
from rewriter.passes.structures.diagonal_recurrence import DiagonalRecurrence
from rewriter.registry import eager_ops
from rewriter.structure import NoMatch


def read_gated(step: Step, rng: torch.Generator) -> Reading | NoMatch:
    """The recurrence as DiagonalRecurrence, or why it is none."""
    if len(step.state) != 1 or len(step.ys) > 1:
        return NoMatch(f"{len(step.state)} states and {len(step.ys)} results; one of each can be read")
    ((begin, state),) = step.state.items()
    zeros, ones = torch.zeros_like(state), torch.ones_like(state)
    ((drive,), _), ((one,), _), ((end,), _) = (step.run({begin: s}, step.edge) for s in (zeros, ones, state))
    if not close(end - drive, (one - drive) * state):
        return NoMatch("a linear state whose transition mixes its entries, and that is no delta rule")
    lone = state.dim() == 1
    roots = list(step.edge)
    whole = [r for r in roots if step.edge[r].numel() == state.numel()]
    for decay in whole:
        for drive_root in whole:
            query = [r for r in roots if r not in (decay, drive_root)]
            if decay is not drive_root and len(query) <= 1:
                found = _match(step, decay, drive_root, query, lone)
                if found is not None:
                    return found
    return NoMatch("a diagonal recurrence that is read before its step, or whose decay or drive the loop computes; compute those ahead")


def _match(step: Step, decay: Value, drive: Value, query: list[Value], lone: bool) -> Reading | NoMatch | None:
    ((_, state),) = step.state.items()
    rows = 1 if lone else state.shape[0]
    width = step.edge[query[0]].numel() // rows if query else 1
    per = math.prod(state.shape) // rows
    if per % width:
        return None
    form = DiagonalRecurrence(per // width, width, bool(query))
    inputs = [(root, range(step.edge[root].dim())) for root in (decay, drive, *query)]
    (end,), ys = step.run(step.state, step.edge)
    (new,), (out,) = form.step(eager_ops(), [state.reshape(rows, -1)], [arranged(step.edge[r], order, lone) for r, order in inputs])
    if not close(new, end.reshape(new.shape)) or (ys and (ys[0].numel() != out.numel() or not close(out, ys[0].reshape(out.shape)))):
        return None
    read = f", read by a query over {width}" if query else ""
    return region_reading(step, form, inputs, lone, f"input-gated diagonal, {per} states{read}")
