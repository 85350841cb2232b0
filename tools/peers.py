"""What other post-training tools make of one linear layer, each from its own paper's formulas: the baselines of `bench_quality`.

    svd         W ~ U_r S_r V_r^T                                   no data
    whitened    C = L L^T, W L ~ U_r S_r V_r^T, then V_r^T L^-1     SVD-LLM, arXiv:2403.07378
    output      U_r U_r^T W, U_r the leading eigenvectors of W C W^T    Swift-SVD, arXiv:2604.01609
    triangular  U_r U_r^T W, U_r from the SVD of W R^T, C = R^T R, R from a QR of the inputs and sqrt(mu) I    COALA, arXiv:2507.07580
    magnitude, wanda, sparsegpt     2:4, by our own solvers on one engine (arXiv:2306.11695, arXiv:2301.00774)

C = E[x x^T]; none of them moves the mean error to the bias. Every rank is the largest whose r (m + n) numbers stay within the share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.algebra import Sparse
from rewriter.fit import after_cost, keep, refusal, site_cost
from rewriter.graph import Graph, Site, load_weight
from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.passes.solvers import pruning
from rewriter.passes.structures.low_rank import LowRank
from rewriter.rule import AbstractPass, Context, Decision
from rewriter.tolerances import EQUAL

RIDGE = 1e-6  # of the mean diagonal: what SVD-LLM's reference adds where Cholesky fails, and COALA's mu


def _rank(weight: Tensor, share: float) -> int:
    m, n = weight.shape
    return max(1, int(share * m * n) // (m + n))


def svd(weight: Tensor, second: Tensor, share: float) -> LowRank:
    return whitened(weight, torch.eye(len(second), dtype=torch.float64), share)


def whitened(weight: Tensor, second: Tensor, share: float) -> LowRank:
    root = torch.linalg.cholesky(second + _mu(second) * torch.eye(len(second), dtype=torch.float64))
    u, s, vh = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    r, half = _rank(weight, share), s.sqrt()
    right = torch.linalg.solve_triangular(root.T, vh[:r].T, upper=True).T  # V^T L^-1
    return LowRank((half[:r, None] * right).T.float(), (u[:, :r] * half[:r]).T.float())


def output(weight: Tensor, second: Tensor, share: float) -> LowRank:
    w = weight.double()
    return _projected(w, torch.linalg.eigh(w @ second @ w.T).eigenvectors.flip(1), share)


def triangular(weight: Tensor, second: Tensor, share: float) -> LowRank:
    w, n = weight.double(), len(second)
    values, vectors = torch.linalg.eigh(second)
    inputs = torch.cat([(vectors * values.clamp_min(0).sqrt()).T, _mu(second) ** 0.5 * torch.eye(n, dtype=torch.float64)])
    r = torch.linalg.qr(inputs, mode="r").R
    return _projected(w, torch.linalg.svd(w @ r.T, full_matrices=False).U, share)


def _projected(w: Tensor, basis: Tensor, share: float) -> LowRank:
    u = basis[:, : _rank(w, share)]
    return LowRank((u.T @ w).T.contiguous().float(), u.T.contiguous().float())


def _mu(second: Tensor) -> float:
    return RIDGE * float(second.diagonal().mean())


def magnitude(weight: Tensor, second: Tensor, share: float) -> Sparse:
    return _pruned(pruning.magnitude(weight, 2, 4))


def wanda(weight: Tensor, second: Tensor, share: float) -> Sparse:
    return _pruned(pruning.wanda(weight, second.diagonal(), 2, 4))


def sparsegpt(weight: Tensor, second: Tensor, share: float) -> Sparse:
    return _pruned(pruning.sparsegpt(weight, second, 2, 4))


def _pruned(weight: Tensor) -> Sparse:
    return Sparse.of(weight.T, 2, 4)


METHODS: dict[str, Callable[[Tensor, Tensor, float], AbstractMatrix]] = {
    f.__name__: f for f in (svd, whitened, output, triangular, magnitude, wanda, sparsegpt)
}


def check() -> None:
    """SystemExit unless the weighted three reach the one optimum that theory gives them, and SVD its tail of singular values."""
    rng = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=rng, dtype=torch.float64) for size in ((24, 32), (200, 32)))
    second = x.T @ (x * torch.linspace(0.1, 3, 200, dtype=torch.float64)[:, None]) / 200
    values = torch.linalg.eigvalsh(weight @ second @ weight.T)[: 24 - _rank(weight, 0.5)]
    best = {f: float(values.sum() / torch.trace(weight @ second @ weight.T)) ** 0.5 for f in (whitened, output, triangular)}
    best[svd] = float((torch.linalg.svdvals(weight)[_rank(weight, 0.5) :].square().sum() / weight.square().sum()).sqrt())
    for method, error in best.items():
        seen = torch.eye(32, dtype=torch.float64) if method is svd else second
        found = Moments(seen, torch.zeros(32, dtype=torch.float64), 200, "").error(weight, method(weight, second, 0.5).dense())
        if abs(found - error) > EQUAL[torch.float32][0]:
            raise SystemExit(f"red: {method.__name__} has error {found:.6f}, its optimum is {error:.6f}")


@dataclass(frozen=True)
class AbstractPeer(AbstractPass):
    """One method at every selected linear, whatever it costs there. (Its name keeps it out of the registry of passes.)"""

    name: ClassVar[str] = "peer"
    summary: ClassVar[str] = "a baseline"
    method: str
    share: float

    def run(self, graph: Graph, context: Context) -> Iterator[Decision]:
        sites = [s for s in context.selected if not refusal(s)]
        for site in context.selected:
            if refusal(site):
                yield keep(site, refusal(site))
        found = [self._one(graph, site, moments) for group in context.calibration.moments(sites) for site, moments in group]
        for decision in found:  # after the last one was fitted: all see the model as it was given
            assert decision.operator is not None
            graph.splice(decision.site, decision.operator, None)
        yield from found

    def _one(self, graph: Graph, site: Site, moments: Moments | None) -> Decision:
        assert moments is not None
        weight = load_weight(graph, site)
        operator = METHODS[self.method](weight, moments.second, self.share)
        error = moments.error(weight, operator.dense())
        return Decision(site, self.method, site_cost(site), after_cost(site, operator), operator, self.method, False, error)
