"""What hides keys: at most one boolean mask and one that is added, or two that are added; and what becomes of a row that sees no key.

A hidden key's finite score counts there, and only there. It can be kept where no score is seen beside it, or where no such row can be; a
mask of unknown size may be -inf everywhere in a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rewriter.graph import Graph
from rewriter.passes.detect import axes as layouts
from rewriter.passes.detect.axes import Frame
from rewriter.passes.detect.magnitudes import bound, fits, fixed, operand
from rewriter.passes.detect.scores import Core, Mask, Operand

ABSORBS = 1e30  # beside which no score is seen in float32
NEVER = -1e4  # e to this is 0 in every type


@dataclass(frozen=True)
class Masks:
    """As the operator has them: the boolean one first."""

    all: tuple[Mask, ...] = ()
    boolean: bool = False
    hidden: float = -math.inf
    empty: str = ""


def masks_of(graph: Graph, core: Core) -> Masks | str:
    """The masks of an attention, or why they cannot be said."""
    masks = [_normal(graph, core.frame, mask) for mask in core.masks]
    boolean, added = [m for m in masks if m.boolean], [m for m in masks if not m.boolean]
    if len(boolean) > 1 or len(masks) > 2:
        return f"it has {len(boolean)} boolean masks and {len(added)} that are added: one of each, or two that are added, can be said"
    dtype = graph.dtype(core.query.value)
    assert dtype is not None
    if any(graph.dtype(m.at.value) != dtype for m in added):
        return "a mask of another type is added to its scores"
    bounds = [bound(graph, m.at.value) for m in added]
    if not boolean:
        alone = len(added) == 1 and _sees(graph, added[0])
        return _empty(core, Masks((*added,)), alone or fits(sum(bounds), dtype))
    mask, sees = boolean[0], _sees(graph, boolean[0])
    hidden = -math.inf if sees and mask.hidden <= NEVER else mask.hidden
    if hidden != -math.inf and not (hidden <= -ABSORBS and (added == [] or masks[0] is not mask or bounds[0] < ABSORBS)):
        return f"a hidden key scores {mask.hidden:g}: a row that sees no key weighs them by it, which no fused operation does"
    lowest = 0.0 if sees else -hidden
    return _empty(core, Masks((mask, *added), True, hidden), fits(lowest + sum(bounds), dtype))


def _empty(core: Core, masks: Masks, never: bool) -> Masks | str:
    if never or not masks.all:
        return masks
    if not core.zero:
        return replace(masks, empty="nan")
    if not masks.boolean or len(masks.all) > 1:
        return "its mask may be -inf in a whole row, which it makes zero"
    return replace(masks, empty="zero")


def _normal(graph: Graph, frame: Frame, mask: Mask) -> Mask:
    """Adding where(m, 0, -inf), laid out or repeated, is a boolean mask m, and a negated boolean the other one."""
    value, axes = mask.at.value, mask.at.axes
    while (node := graph.producer(value)) is not None:
        op, operands = graph.op(node), list(graph.inputs(node))
        if mask.boolean and op == "not":
            value = operands[0]
            mask = replace(mask, at=Operand(value, axes), negated=not mask.negated)
            continue
        if not mask.boolean and op in ("where", "masked_fill"):
            which = (1, 2) if op == "where" else (2, 0)
            condition, numbers = operands[op == "masked_fill"], [operand(graph, node, i) for i in which]
            shape = graph.shape(condition) or ()
            if set(numbers) != {0.0, -math.inf}:
                return mask
            axes = tuple(group if n != 1 else () for group, n in zip(axes[len(axes) - len(shape) :], shape, strict=True))
            value, mask = condition, Mask(Operand(condition, axes), True, numbers[0] != 0.0)
            continue
        found = layouts.before(graph, frame, node, axes)
        if mask.boolean or found is None:
            return mask
        value, axes = found
    return mask


def _sees(graph: Graph, mask: Mask) -> bool:
    """Whether every row of a mask that does not depend on the input sees a key."""
    found = [t ^ mask.negated if mask.boolean else t > -math.inf for t in fixed(graph, mask.at.value)]
    return bool(found) and all(bool(t.any(-1).all()) for t in found)
