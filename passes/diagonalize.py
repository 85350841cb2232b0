"""`diagonalize`: a dense time-invariant recurrence becomes a diagonal one, n^2 -> 2 n multiplications a step, at a certified error.

The ladder (eigenvectors; balanced truncation; a perturbation, Yu et al. 2023, arXiv:2310.01698; dense) is in solvers/diagonalize.py. The
error bounds the transfer function over the whole unit circle, relative to its gain, with what rounding adds in the model's type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.algebra import Dense
from rewriter.errors import RewriteError
from rewriter.graph import Graph, Site
from rewriter.operator import AbstractMatrix
from rewriter.passes.raise_recurrence import GAIN, fastest, in_chunks, spelled
from rewriter.passes.solvers.diagonalize import Diagonalised, diagonalize
from rewriter.passes.solvers.linear_system import System
from rewriter.passes.structures.linear_system import LinearSystem, Nothing, conjugate_pairs
from rewriter.rule import AbstractPass, Context, Decision


@dataclass(frozen=True)
class Diagonalize(AbstractPass):
    """error: the largest certified error of the transfer function, relative to its gain."""

    name: ClassVar[str] = "diagonalize"
    summary: ClassVar[str] = "dense linear recurrences with constant matrices become diagonal ones at a certified error"
    error: float = 1e-3

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        if not self.error > 0:
            raise RewriteError(f"{self.name}:error={self.error} is out of range; give a relative error above 0, such as 0.001")
        return context.decide("recurrence", lambda site: self._decided(graph, context, site))

    def _decided(self, graph: Graph, context: Context, site: Site) -> Decision:
        form = site.form
        if not isinstance(form, LinearSystem) or site.region is None:
            return Decision(site, f"no time-invariant recurrence: {site.reason}")
        if not isinstance(form.transition, Dense):
            return Decision(site, "its transition is diagonal already; raise-recurrence makes it one node", form.cost(), form.cost())
        if form.carried or site.region.outputs[1] is not None:
            reason = "its state goes in or out in the model's own basis, where the transition is dense; raise-recurrence makes it one node"
            return Decision(site, reason, form.cost(), form.cost())
        dtype = form.transition.weight.dtype
        found = diagonalize(as_system(form), self.error, dtype, seed=context.seed)
        rungs = "; ".join(found.tried)
        if found.modes is None:
            return Decision(site, f"stays dense: {rungs}", form.cost(), form.cost())
        diagonal = in_modes(form, found)
        chosen, figures = fastest(context, [form, diagonal, *in_chunks(diagonal)])
        if chosen is form:
            return Decision(site, f"{rungs}; no diagonal form is faster by {1 - GAIN:.0%}: {figures}", form.cost(), form.cost())
        graph.splice(site, chosen)
        spelling = f"{self.name}:error={self.error}, {spelled(chosen)}"
        return Decision(site, f"{rungs}; {figures}", form.cost(), chosen.cost(), chosen, spelling, False, found.error.total)


def as_system(form: LinearSystem) -> System:
    """In the solvers' convention; the constants s and r as one more input that is always 1."""
    n = form.order
    a, b = form.transition.dense(), _matrix(form.entry, torch.eye(n))
    c = _matrix(form.readout, torch.eye(n))
    d = _matrix(form.direct, torch.zeros(len(c), b.shape[1]))
    if isinstance(form.shift, Tensor) or isinstance(form.offset, Tensor):
        b = torch.cat([b, _column(form.shift, n)], 1)
        d = torch.cat([d, _column(form.offset, len(c))], 1)
    return System.of(a, b, c, d)


def _matrix(part: AbstractMatrix | Nothing, default: Tensor) -> Tensor:
    return part.dense() if isinstance(part, AbstractMatrix) else default


def _column(constant: Tensor | Nothing, size: int) -> Tensor:
    return constant[:, None] if isinstance(constant, Tensor) else torch.zeros(size, 1)


def in_modes(form: LinearSystem, found: Diagonalised) -> LinearSystem:
    """The diagonal system in the model's type."""
    assert found.modes is not None and isinstance(form.transition, Dense)
    real = found.modes.real(form.transition.weight.dtype)
    width = form.sequences()["input"][-1]
    assert isinstance(width, int)
    constant = real.b.shape[1] > width
    return LinearSystem(
        conjugate_pairs(real.keep, real.cross, real.partner),
        Dense(real.b[:, :width].T.contiguous()),
        Dense(real.c.T.contiguous()),
        Dense(real.d[:, :width].T.contiguous()) if bool(real.d[:, :width].any()) else (),
        real.b[:, width].contiguous() if constant else (),
        real.d[:, width].contiguous() if constant else (),
        carried=False,
    )
