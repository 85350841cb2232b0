"""What every family says the same way: refusals with their numbers, fits with their error, discoveries with their proof."""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix
from rewriter.structure import Fitted, NoMatch
from rewriter.tolerances import EXACT


def unusable(weight: Tensor, moments: Moments | None = None) -> NoMatch | None:
    """Why these numbers cannot be fitted or searched at all; ValueError where weight and moments belong to different sites."""
    if weight.ndim != 2 or 0 in weight.shape:
        return NoMatch(f"a weight of shape {tuple(weight.shape)} is no matrix with rows and columns")
    if not torch.isfinite(weight).all():
        return NoMatch("the weight holds NaN or infinity")
    if moments is None:
        return None
    if moments.features != weight.shape[1]:
        raise ValueError(f"moments of {moments.features} features for a weight of {weight.shape[1]}; give those of this site's input")
    if not torch.isfinite(moments.second).all():
        return NoMatch("the input moments hold NaN or infinity; calibrate with finite activations")
    return None


def too_dear(spelling: str, params: int, cost_limit: int, most: int = 0) -> NoMatch:
    """The refusal of settings that exceed the limit; `most` is the largest value that it admits, where one number says it."""
    return NoMatch(f"{spelling} stores {params} numbers, the limit is {cost_limit}" + (f"; give at most {most}" if most else ""))


def fitted(operator: AbstractMatrix, spelling: str, weight: Tensor, moments: Moments) -> Fitted:
    """A lossy fit in float32 with its weighted error, from the dense reconstruction of what is stored."""
    operator = operator.to(torch.float32)
    return Fitted(operator, spelling, moments.error(weight, operator.dense()))


def exact(operator: AbstractMatrix, spelling: str, weight: Tensor) -> Fitted | NoMatch:
    """A discovery, if what would be stored equals the weight to rounding level and is smaller; its error is the relative residual."""
    stored = operator.to(weight.dtype if weight.dtype == torch.float64 else torch.float32)
    params = stored.cost().params
    if params >= weight.numel():
        return NoMatch(f"{spelling} would store {params} numbers, the weight has {weight.numel()}")
    dense = weight.double()
    residual = float(torch.linalg.norm(dense - stored.to(torch.float64).dense()) / torch.linalg.norm(dense).clamp_min(1e-300))
    if not residual <= EXACT[weight.dtype]:
        return NoMatch(f"{spelling} leaves a residual of {residual:.1e}, exact would be {EXACT[weight.dtype]:.0e}")
    return Fitted(stored, spelling, residual)
