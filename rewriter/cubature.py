"""A site's certificate by QMCPy (extra `qmc`): its lattices and nets, and its rules of when they are enough.

E^2 = E|(W - W') x|^2 / E|W x|^2,  x = mean + V sqrt(Lambda) Phi^-1(u);  the denominator is known from the moments.

`lattice` and `net` stop by Student's t over randomisations. `cone` is one net whose Walsh coefficients say what is left (Hickernell and
Jimenez Rugama 2016): no probability, it holds for integrands whose coefficients fall as the first ones let expect. With few points they
look better than they are, so it takes 4,096 at least; on lattices that is not enough (tools/bench_certificate.py), and CubQMCLatticeG is
left out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.errors import RewriteError
from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.points import principal_root
from rewriter.report import OutputError
from rewriter.sampling import REPLICATIONS
from rewriter.verify import CONFIDENCE

CAP = 1 << 18  # points, of all randomisations together
REPLICATED = {"alpha": 1 - CONFIDENCE, "n_init": 1 << 6, "n_limit": CAP // REPLICATIONS}


@dataclass(frozen=True)
class Rule:
    """Which points of QMCPy's, and which of its rules stops."""

    points: str
    stops: str
    options: Mapping[str, float]
    most: int  # dimensions that the points have
    replications: int | None
    confidence: float


RULES = {
    "lattice": Rule("Lattice", "CubQMCRepStudentT", REPLICATED, 9125, REPLICATIONS, CONFIDENCE),
    "net": Rule("DigitalNetB2", "CubQMCRepStudentT", REPLICATED, 21201, REPLICATIONS, CONFIDENCE),
    "cone": Rule("DigitalNetB2", "CubQMCNetG", {"n_init": 1 << 12, "n_limit": CAP}, 21201, None, 1.0),
}


def cubature(weight: Tensor, operator: AbstractMatrix, moments: Moments, rule: str, precision: float, seed: int) -> OutputError:
    """The certificate of an (m, n) `operator` in place of `weight`, its half-width at most `precision` times the error within CAP points.

    RewriteError where QMCPy is missing, the rule unknown or n beyond its points.
    """
    if rule not in RULES:
        raise RewriteError(f"rule '{rule}' is unknown; give one of sobol, {', '.join(RULES)}")
    asked = RULES[rule]
    if moments.features > asked.most:
        raise RewriteError(
            f"{moments.features} inputs are beyond the {asked.most} dimensions of QMCPy's {asked.points}; give the rule sobol"
        )
    qmcpy = _qmcpy()
    gap = weight.double() - operator.to(torch.float64).dense()
    mapped = gap @ principal_root(moments.covariance())
    middle, energy, seen = gap @ moments.mean, moments.energy(weight), list[Tensor]()

    def squares(u: Any) -> Any:
        """(..., n) in the cube -> (...)."""
        normals = torch.special.ndtri(torch.from_numpy(u).clamp(2.0**-54, 1 - 2.0**-53))
        seen.append((normals @ mapped.T + middle).square().sum(-1) / energy)
        return seen[-1].numpy()

    net = getattr(qmcpy, asked.points)(moments.features, seed=seed, replications=asked.replications)
    integrand = qmcpy.CustomFun(qmcpy.Uniform(net), squares)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cap, which `reached` says
        _, found = getattr(qmcpy, asked.stops)(integrand, abs_tol=0.0, rel_tol=2 * precision, **asked.options).integrate()
    low, high = (math.sqrt(max(0.0, float(bound))) for bound in (found.comb_bound_low, found.comb_bound_high))
    each = torch.cat([part.flatten() for part in seen]).sqrt()
    estimate, half = (low + high) / 2, (high - low) / 2
    return OutputError(
        norm="relative_l2",
        output="y",
        estimate=estimate,
        half_width=half,
        confidence=asked.confidence,
        p99=float(each.quantile(0.99)),
        max=float(each.max()),
        cosine=None,
        law=f"N(mean, covariance) of: {moments.law}; {asked.points} points, {asked.stops}",
        samples=len(each),
        bound=None,
        replications=asked.replications or 1,
        precision=precision,
        reached=half <= precision * estimate,
    )


def _qmcpy() -> Any:
    try:
        import qmcpy  # an extra, and slow to import
    except ImportError as problem:
        first = str(problem).partition("\n")[0]
        raise RewriteError(
            f"the rules lattice, net and cone need QMCPy ({first}); pip install 'rewriter[qmc]', or give the rule sobol"
        ) from problem
    return qmcpy
