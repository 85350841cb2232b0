"""Relative error of a diagonal form in a dtype:  max(sup |G - G'| / sup |G|, |G - G'|_2 / |G|_2)  +  rounding.

G' is the recurrence with its coefficients as that dtype stores them, so that the first term holds what storing costs. It is certified for
the worst input, and taken for white input as well, |.|_2 the energy of the impulse response: where G has a high peak, an error that is
small beside the peak may be large beside the usual output. Rounding is what one expects of the arithmetic: u times the modes' noise for
white input, relative to the output. kappa(V) u bounds the same from above and is 10 to 100 times what simulations show
(tools/bench_diagonalize.py): it would choose far too large an E.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rewriter.passes.solvers.linear_system import System
from rewriter.passes.solvers.modes import Modes
from rewriter.passes.solvers.peak_gain import Gain, peak_gain


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class ModalError:
    """Of one diagonal form."""

    transfer: float  # certified bound of sup |G - G'|; infinite where there is none
    relative: float  # the same over sup |G|
    white: float  # expected error over expected output, for white input
    rounding: float  # expected and relative; where there is no bound, kappa(V) u, for each step

    @property
    def total(self) -> float:
        """What is compared with a tolerance."""
        return max(self.relative, self.white) + self.rounding

    def __str__(self) -> str:
        if not math.isfinite(self.transfer):
            return f"error: no bound, {self.rounding:.1e} a step by rounding"
        return f"error {self.relative:.1e} certified, {self.white:.1e} for white input, {self.rounding:.1e} by rounding"


@dataclass(frozen=True)
class Reference:
    """A stable system, and its size."""

    system: System
    gain: Gain

    @classmethod
    def of(cls, system: System) -> Reference | None:
        """None where nothing bounds |G|: rho(A) >= 1, or too near."""
        gain = peak_gain(system)
        return cls(system, gain) if math.isfinite(gain.upper) else None

    def error(self, modes: Modes, dtype: torch.dtype) -> ModalError:
        """Infinite where a stored mode does not decay."""
        gain = peak_gain(self.system, modes.stored(dtype))
        noise = unit_roundoff(dtype) * float(modes.noise())
        energy = self.gain.energy
        return ModalError(gain.upper, _ratio(gain.upper, self.gain.lower), _ratio(gain.energy, energy), _ratio(noise, energy))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0
