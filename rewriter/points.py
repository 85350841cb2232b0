"""Points in place of random numbers: scrambled Sobol' nets u in a cube, and x = mean + V sqrt(Lambda) Phi^-1(u) for normals.

A net of n = 2^k points fills the cube more evenly than random ones, the first dimensions best of all; so the columns of V go by falling
eigenvalue, and most of the variance meets the first dimensions (Acworth, Broadie, Glasserman 1998). Every scrambling (Matousek 1998) of a
net is unbiased, and scramblings of different seeds are independent: R of them give an error bar.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rewriter.errors import RewriteError

CHUNK = 1024  # dimensions of one net
_BITS = 30  # of a coordinate
Seed = int | Sequence[int]
T = TypeVar("T")


def uniform_points(n: int, dimensions: int, seed: Seed, start: int = 0) -> Tensor:
    """Points start to start + n of a scrambled Sobol' sequence in (0, 1)^dimensions, (n, dimensions) float64; a seed names the scrambling.

    The first 2^k points are a net, and so are the next 2^k. Beyond CHUNK dimensions every further chunk is the same net in rows of an order
    of its own and digitally shifted (Latin supercube sampling, Owen 1998): what chunks have in common is left to chance.
    """
    import numpy as np

    if n < 1 or dimensions < 1 or start < 0:
        raise RewriteError(f"{n} points from {start} in {dimensions} dimensions is no net; give at least one point and one dimension")
    key = (seed,) if isinstance(seed, int) else tuple(seed)
    net = _net(min(dimensions, CHUNK), key)
    net.reset()
    # a count other than 2^m is a net's beginning, of which the engine warns
    drawn = net.fast_forward(start).random(n) if start else net.random_base2((n - 1).bit_length())[:n]
    first = (drawn * 2**_BITS).astype(np.int64)
    rng = np.random.default_rng([*key, start + 1])
    out = torch.empty(n, dimensions, dtype=torch.float64)
    for begin in range(0, dimensions, CHUNK):
        chunk = first[:, : dimensions - begin]
        if begin:  # the shift is the same for all points of the chunk, wherever they start
            chunk = rng.permutation(chunk) ^ np.random.default_rng([*key, 0, begin]).integers(2**_BITS, size=chunk.shape[1])
        out[:, begin : begin + CHUNK] = torch.from_numpy((chunk + 0.5) / 2**_BITS)  # the middle of its cell: never 0 or 1
    return out


@functools.lru_cache(64)
def _net(dimensions: int, key: tuple[int, ...]) -> Any:
    """The scrambled generator, kept: to scramble costs more than to draw."""
    import numpy as np
    from scipy.stats import qmc

    return qmc.Sobol(dimensions, scramble=True, bits=_BITS, rng=np.random.default_rng(key))


def standard_normals(n: int, dimensions: int, seed: Seed, start: int = 0) -> Tensor:
    """Such points of N(0, I), (n, dimensions) float64."""
    normals: Tensor = torch.special.ndtri(uniform_points(n, dimensions, seed, start))
    return normals


def principal_root(covariance: Tensor) -> Tensor:
    """V sqrt(Lambda) of a (d, d) covariance, columns by falling eigenvalue; those that rounding made negative count as 0."""
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise RewriteError(f"a covariance of shape {list(covariance.shape)} is not square; give one row and column for each dimension")
    values, vectors = torch.linalg.eigh(covariance.double())
    root: Tensor = (vectors * values.clamp_min(0).sqrt()).flip(1)
    return root


def normal_points(mean: Tensor, covariance: Tensor, n: int, seed: Seed, start: int = 0) -> Tensor:
    """Such points of N(mean, covariance) with mean (d,) and covariance (d, d), (n, d) float64."""
    return mean.double() + standard_normals(n, len(mean), seed, start) @ principal_root(covariance).T


def replicated(draw: Callable[[Seed], T], replications: int, seed: Seed) -> Iterator[T]:
    """`draw` with one seed for each replication: scramblings that know nothing of one another."""
    key = (seed,) if isinstance(seed, int) else tuple(seed)
    return (draw((*key, r)) for r in range(replications))
