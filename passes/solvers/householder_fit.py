"""W near I: exactly I - U V^T at the least rank, or the product of k Householder factors with the least tr(E H E^T), E = W - H_1 … H_k.

The product starts from the k leading directions of (I - W) H (I - W)^T, exact there where it can be, and descends by L-BFGS over vectors
and β together (Liu and Nocedal 1989); the best point seen is kept, so it never loses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.passes.solvers.householder import Reflectors, nearest_factors, wy
from rewriter.passes.solvers.rank_search import GAP, MARGIN
from rewriter.passes.solvers.spectral import ridged, spectrum
from rewriter.tolerances import EXACT

STEPS = 400  # of L-BFGS: after 100 six factors of a 16 x 16 weight were still worse than five
WORK = 4 * 10**10  # operations after which it takes fewer


def identity_minus(weight: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """(U (n, k), V (k, n)) with W = I - U V to rounding level of W, k <= most; the singular values of I - W fall off a cliff behind k.

    A piece of I - W with more pivots than `most` ends the search early; else a randomised range finder (Halko, Martinsson, Tropp 2011).
    """
    n = len(weight)
    gap = torch.eye(n, dtype=torch.float64) - weight.double()
    level = EXACT[weight.dtype] / 2 * float(torch.linalg.matrix_norm(weight.double()))
    rng = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(n, generator=rng)[: most + MARGIN] for _ in range(2))
    pivots = int((torch.linalg.lu_factor_ex(gap[rows][:, columns]).LU.diagonal().abs() > level).sum())
    if pivots > most:
        return None
    for width in (pivots + MARGIN, most + MARGIN):
        sketch = torch.randn(n, min(n, width), generator=rng, dtype=torch.float64)
        side = torch.linalg.qr(gap @ torch.linalg.qr(gap.T @ torch.linalg.qr(gap @ sketch).Q).Q).Q
        core = side.T @ gap
        missing = float(torch.linalg.matrix_norm(gap - side @ core))
        if missing <= level:
            break
    u, sigma, v = torch.linalg.svd(core, full_matrices=False)
    lost = (sigma.square().flip(0).cumsum(0).flip(0) + missing**2).sqrt()  # at rank 0, 1, …
    rank = max(1, int((lost > level).sum()))
    if rank > most or (rank < len(sigma) and sigma[rank - 1] < GAP * sigma[rank]):
        return None
    root = sigma[:rank].sqrt()
    return side @ u[:, :rank] * root, root[:, None] * v[:rank]


def nearest_product(weight: Tensor, second: Tensor, count: int) -> Reflectors:
    """`count` factors for an (n, n) weight under H (n, n); count <= n, inputs finite."""
    n, h = len(weight), ridged(second)
    gap = torch.eye(n, dtype=torch.float64) - weight.double()
    basis = spectrum(gap, h).basis[:, :count]
    best = nearest_factors(basis, basis.T @ weight.double() @ basis)
    vectors, betas = best.vectors.clone(memory_format=torch.contiguous_format).requires_grad_(), best.betas.clone().requires_grad_()
    pulled, least = gap @ h, float("inf")
    energy = (pulled * gap).sum()
    steps = min(STEPS, max(5, WORK // (12 * n * n * count)))
    optimiser = torch.optim.LBFGS([vectors, betas], max_iter=steps, history_size=10, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss() -> float:
        nonlocal best, least
        optimiser.zero_grad()
        seen = Reflectors(torch.nn.functional.normalize(vectors, dim=0), betas.clamp(0, 2))
        y, t = wy(seen.vectors, seen.betas)
        z = y @ t
        value = energy - 2 * ((z.T @ pulled) * y.T).sum() + ((z.T @ z) * (y.T @ h @ y)).sum()
        value.backward()
        if value.item() < least:
            least, best = value.item(), Reflectors(seen.vectors.detach(), seen.betas.detach())
        return value.item()

    with torch.enable_grad():
        optimiser.step(loss)
    return best
