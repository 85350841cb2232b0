"""A dense linear recurrence into a diagonal one, n^2 -> 2 n multiplications a step, on the first rung that is within the tolerance:

    eig         A = V Lambda V^-1 as it stands; normal A with a unitary V
    truncated   balanced truncation to the order that the tolerance admits, then the same
    perturbed   A + E = V Lambda V^-1 for the E that costs least
    dense       nothing above is good enough: the recurrence stays

The error of a rung is certified over the whole unit circle (peak_gain) plus what rounding is expected to add (modal_error). `truncated` and
`perturbed` promise it from a zero initial state. Where rho(A) >= 1, or so near that the response cannot be followed to its end, nothing is
certified: only `eig` is tried, by kappa(V) u, and its promise is for finitely many steps, kappa(V) u of the state's size for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from rewriter.passes.solvers.balanced_truncation import balance
from rewriter.passes.solvers.eigenform import Eigenform, eigenform
from rewriter.passes.solvers.linear_system import System
from rewriter.passes.solvers.modal_error import ModalError, Reference, unit_roundoff
from rewriter.passes.solvers.modes import Modes
from rewriter.passes.solvers.perturbation import perturb

Form = Literal["eig", "truncated", "perturbed", "dense"]
UNCERTIFIED = "needs a transfer bound, which rho(A) near 1 or above does not admit"
RUNGS: tuple[Form, ...] = ("eig", "truncated", "perturbed")
SHARES = (4.0, 1.0, 0.25, 1 / 16)  # of the tolerance, for the a-priori bound of a truncation: the certified error is 2 to 25 times less


@dataclass(frozen=True)
class Diagonalised:
    """What became of a recurrence, and what it costs in accuracy."""

    form: Form
    modes: Modes | None  # None where it stays dense
    kappa: float  # of the eigenvectors that are used; of A's own, possibly infinite, where it stays dense
    perturbation: float  # |E|_2, 0 on other rungs
    error: ModalError  # of the modes as stored in the dtype that was asked for; zeros where it stays dense, infinite for rho(A) >= 1
    tried: tuple[str, ...]  # what each rung gave and why it was taken or not


@dataclass(frozen=True)
class _Try:
    """One rung's best."""

    form: Eigenform
    error: ModalError
    cost: float  # what is compared with the tolerance
    said: str
    perturbation: float = 0.0


def diagonalize(
    system: System, tolerance: float = 1e-3, dtype: torch.dtype = torch.float32, rungs: tuple[Form, ...] = RUNGS, seed: int = 0
) -> Diagonalised:
    """The first of `rungs`, in the order of RUNGS, whose relative error in `dtype` is at most `tolerance`."""
    reference = Reference.of(system)
    climb: dict[Form, Callable[[], _Try | str]] = {
        "eig": lambda: _eig(system, reference, dtype),
        "truncated": lambda: _truncated(reference, tolerance, dtype) if reference else UNCERTIFIED,
        "perturbed": lambda: _perturbed(reference, dtype, seed) if reference else UNCERTIFIED,
    }
    tried: list[str] = []
    kappa = math.inf
    for rung in (r for r in RUNGS if r in rungs):
        found = climb[rung]()
        if isinstance(found, str):
            tried.append(f"{rung}: {found}")
            continue
        kappa = found.form.kappa if rung == "eig" else kappa
        verdict = "within" if found.cost <= tolerance else "above"
        tried.append(f"{rung}: {found.said}, kappa {found.form.kappa:.1e}, {found.error}, {verdict} {tolerance:.1e}")
        if found.cost <= tolerance:
            return Diagonalised(rung, found.form.modes, found.form.kappa, found.perturbation, found.error, tuple(tried))
    return Diagonalised("dense", None, kappa, 0.0, ModalError(0.0, 0.0, 0.0, 0.0), tuple(tried))


def _eig(system: System, reference: Reference | None, dtype: torch.dtype) -> _Try | str:
    form = eigenform(system)
    if form is None:
        return "A has no basis of eigenvectors in float64"
    error = reference.error(form.modes, dtype) if reference else None
    if error and math.isfinite(error.total):
        return _Try(form, error, error.total, "A as it stands")
    step = form.kappa * unit_roundoff(dtype)
    said = f"A as it stands, rho(A) = {system.radius():.9g}, over finitely many steps"
    return _Try(form, ModalError(math.inf, math.inf, math.inf, step), step, said)


def _truncated(reference: Reference, tolerance: float, dtype: torch.dtype) -> _Try | str:
    """Of the orders that shares of the tolerance admit, the least within it, else the most accurate."""
    balanced, n = balance(reference.system), len(reference.system.a)
    best: _Try | None = None
    for order in sorted({balanced.order_within(share * tolerance * reference.gain.lower) for share in SHARES} - {n}):
        form = eigenform(balanced.truncate(order))
        if form is None:
            continue
        said = f"order {order} of {n}, a-priori bound {balanced.bound(order):.1e}"
        error = reference.error(form.modes, dtype)
        if best is None or error.total < best.cost:
            best = _Try(form, error, error.total, said)
        if best.cost <= tolerance:
            break
    return best or f"no order below {n} is within the tolerance and has eigenvectors"


def _perturbed(reference: Reference, dtype: torch.dtype, seed: int) -> _Try | str:
    if (found := perturb(reference.system, dtype, seed)) is None:
        return "no perturbation leaves a stable system with eigenvectors"
    error = reference.error(found.form.modes, dtype)
    said = f"|E| = {found.size:.1e} beside |A| = {float(torch.linalg.matrix_norm(reference.system.a, 2)):.1e}, by {found.found}"
    return _Try(found.form, error, error.total, said, found.size)
