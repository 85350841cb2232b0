"""Which form each site takes under one budget: the multiple-choice knapsack

    min sum_s w_s e_s(k_s)^2    with    sum_s c_s(k_s) <= B,    c_s(k_s) >= floor * share * dense_s

over the points (c, e) of each site's error-versus-cost curve, solved exactly as a mixed-integer program (HiGHS, through SciPy). w_s turns a
site's own error into its part of the model's output error; it is measured (rewriter/budgeted.py). The floor: a sum of parts is a model of
small errors, and does not see what a starved site does to the others. By loss alone Mistral-7B ends worse than with even shares
(perplexity on C4 22.9 against 12.8), with a floor of half the even share better (11.1; Swift-SVD, arXiv:2604.01609, table 6).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rewriter.errors import RewriteError

FLOOR = 0.5  # of the uniform share
UNITS = ("params", "flops", "nbytes", "ms")
GAP = 1e-4  # relative, to the bound at which the search for the optimum ends


@dataclass(frozen=True)
class Budget:
    """What all linear sites together may cost, as a share of their dense cost in one unit."""

    unit: str
    share: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`params=0.5`; RewriteError for another unit or a share that is none."""
        unit, _, number = text.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if unit not in UNITS or not 0 < share <= 1:
            raise RewriteError(
                f"--budget {text} cannot be read; give one of {', '.join(UNITS)} and a share of the dense cost above 0 and up to 1, "
                "such as params=0.5"
            )
        return cls(unit, share)

    def __str__(self) -> str:
        return f"{self.unit}={self.share}"


def choose(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], budget: float) -> list[int] | None:
    """The index of each site's choice with the least summed loss whose costs sum to at most `budget`; None where no choice does.

    costs and losses are (sites, choices of the site), not negative.
    """
    import numpy as np
    from scipy import sparse

    optimize: Any = importlib.import_module("scipy.optimize")  # untyped

    if sum(min(row) for row in costs) > budget:
        return None
    fronts = [_front(c, x) for c, x in zip(costs, losses, strict=True)]
    sizes = [len(front) for front in fronts]
    cost = np.array([c[k] for c, front in zip(costs, fronts, strict=True) for k in front])
    loss = np.array([x[k] for x, front in zip(losses, fronts, strict=True) for k in front])
    site = np.repeat(np.arange(len(sizes)), sizes)
    rows = sparse.vstack([sparse.csr_array((np.ones(len(site)), (site, np.arange(len(site))))), sparse.csr_array(cost[None] / budget)])
    least, most = np.append(np.ones(len(sizes)), 0), np.ones(len(sizes) + 1)
    found = optimize.milp(
        loss / max(loss.max(), 1e-300),
        integrality=np.ones(len(site)),
        bounds=optimize.Bounds(0, 1),
        constraints=optimize.LinearConstraint(rows, least, most),
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        raise RuntimeError(f"the allocation was not solved: {found.message}")
    picked = np.flatnonzero(found.x > 0.5)
    return [front[int(p - first)] for front, p, first in zip(fronts, picked, np.cumsum([0, *sizes[:-1]]), strict=True)]


def _front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """The choices that no other one beats in both, by rising cost."""
    kept: list[int] = []
    for k in sorted(range(len(costs)), key=lambda k: (costs[k], losses[k])):
        if not kept or losses[k] < losses[kept[-1]]:
            kept.append(k)
    return kept
