"""What counts as equal and as exact: |a - b| <= atol + rtol |b|, and |W - W'|_F <= EXACT |W|_F. One table, by dtype.

EQUAL compares two ways to compute one product (a backend against the eager oracle). EXACT is the relative Frobenius residual that storing
a structured weight densely leaves behind: rounding of the entries, and of the factors' product. CONVERGED is the relative distance of an
iterative solver from the optimum that it was given the steps to reach.
"""

from __future__ import annotations

import torch

EQUAL: dict[torch.dtype, tuple[float, float]] = {  # (rtol, atol), for values of order one
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (4e-2, 4e-2),
}

EXACT: dict[torch.dtype, float] = {  # relative Frobenius residual at rounding level
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 6e-4,
    torch.bfloat16: 4e-3,
}

CONVERGED: dict[torch.dtype, float] = {torch.float64: 1e-8}
