"""A + E has the modes that come with it; the search is reproducible, and descent finds what chance does not."""

from __future__ import annotations

import pytest
import torch

from rewriter.passes.solvers import perturbation
from rewriter.passes.solvers.eigenform import eigenform
from rewriter.passes.solvers.linear_system import System
from rewriter.passes.solvers.modal_error import Reference
from rewriter.passes.solvers.perturbation import Perturbation, perturb
from rewriter.tolerances import EQUAL
from tests.solvers.recurrences import jordan, legs, normal, with_ports

DEFECTIVE = {"jordan": with_ports(jordan(12, 0.5, 0.5)), "many ports": with_ports(jordan(8, 0.9, 0.1), 6, 9), "legs": legs(24)}


def total(system: System, e: torch.Tensor) -> float:
    form, reference = eigenform(System(system.a + e, system.b, system.c, system.d)), Reference.of(system)
    assert form is not None and reference is not None
    return reference.error(form.modes, torch.float32).total


def found(system: System, seed: int = 0) -> Perturbation:
    result = perturb(system, torch.float32, seed)
    assert result is not None
    return result


@pytest.mark.parametrize("system", DEFECTIVE.values(), ids=DEFECTIVE.keys())
def test_the_modes_are_those_of_the_sum(system: System) -> None:
    result = found(system)
    near = System(system.a + result.e, system.b, system.c, system.d)
    u = normal(40, system.b.shape[1], seed=8)
    assert near.radius() < 1
    assert torch.allclose(result.form.modes.real(torch.float64).simulate(u)[0], near.simulate(u)[0], *EQUAL[torch.float32])
    assert result.size == pytest.approx(float(torch.linalg.matrix_norm(result.e, 2)))


def test_the_seed_decides() -> None:
    system = with_ports(jordan(6, 0.5, 0.5))
    assert torch.equal(found(system, 3).e, found(system, 3).e)
    assert not torch.equal(found(system, 3).e, found(system, 4).e)


@pytest.mark.parametrize("system", DEFECTIVE.values(), ids=DEFECTIVE.keys())
def test_descent_beats_chance(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least twice as good as the best random matrix over all sizes."""
    descended = found(system)
    monkeypatch.setattr(perturbation, "_descend", lambda reference, start, unit: start)
    assert 2 * total(system, descended.e) < total(system, found(system).e)


def test_the_gradient_is_right() -> None:
    """Of a function of modes, through the eigendecomposition, against central differences."""
    system = with_ports(normal(6, 6) / 5)

    def value(e: torch.Tensor) -> torch.Tensor:
        return perturbation._modes(system, e).noise()

    e = (1e-2 * normal(6, 6, seed=3)).requires_grad_()
    (gradient,) = torch.autograd.grad(value(e), e)
    direction, step = normal(6, 6, seed=4), 1e-5
    slope = (value(e.detach() + step * direction) - value(e.detach() - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=EQUAL[torch.float32][0])


def test_nothing_to_perturb() -> None:
    assert perturb(System.of(jordan(4, 0.5, 0.5), torch.zeros(4, 1), normal(1, 4)), torch.float32, 0) is None
    assert perturb(with_ports(jordan(4, 1.0, 0.5)), torch.float32, 0) is None
