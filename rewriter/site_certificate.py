"""The certificate of one site alone: how far W' x is from W x for x ~ N(mean, covariance) of its calibrated, or LayerNorm's, moments.

sqrt(E|Wx - W'x|^2 / E|Wx|^2) itself needs no samples (`Moments.error`); its tail, p99 and max, and any interval that is to be compared with
a model's certificate do. The points go by falling eigenvalue of the covariance (`rewriter.points`), which takes a few dozen where random
ones take thousands.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rewriter.calibrate import Feeds
from rewriter.cubature import cubature
from rewriter.errors import RewriteError
from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.points import principal_root, standard_normals
from rewriter.report import OutputError
from rewriter.sampling import EACH_FIRST, Replicated
from rewriter.verify import certify

CAP = 1 << 18  # points of all replications together


def certify_site(
    weight: Tensor, operator: AbstractMatrix, moments: Moments, precision: float = 0.01, seed: int = 0, rule: str = "sobol"
) -> OutputError:
    """The certificate of an (m, n) `operator` in place of `weight`, its half-width at most `precision` times the error within CAP points.

    `rule`: sobol, or one of `rewriter.cubature.RULES`, which need the extra `qmc`. RewriteError where weight, operator and moments are not
    of one shape, or the rule cannot be had.
    """
    other = operator.dense().double()
    if other.shape != weight.shape or moments.features != weight.shape[1]:
        given = f"{list(weight.shape)}, {list(other.shape)} and {moments.features} inputs"
        raise RewriteError(f"weight, operator and moments are of {given}; give two (m, n) matrices and the moments of n inputs")
    if rule != "sobol":
        return cubature(weight, operator, moments, rule, precision, seed)
    root = principal_root(moments.covariance())

    def draw(replication: int, start: int, count: int) -> list[Feeds]:
        return [{"x": moments.mean + standard_normals(count, len(root), (seed, replication), start) @ root.T}]

    def product(matrix: Tensor, feeds: Feeds) -> Mapping[str, Tensor]:
        return {"y": feeds["x"] @ matrix.T}

    law = f"N(mean, covariance) of: {moments.law}; scrambled Sobol' points"
    points = Replicated(draw, law, EACH_FIRST, CAP)
    return certify(lambda x: product(weight.double(), x), lambda x: product(other, x), points, precision=precision)
