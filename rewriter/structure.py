"""What a structure is: a family of operators, how to fit a weight into it, and how to recognise a weight that is in it already.

One file in passes/structures/ holds a family: its operator (an AbstractMatrix) and its AbstractStructure. The name is at once the name of a
pass, and the fields are that pass's options (`low-rank:rank=64`), printed back the same.
"""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rewriter.moments import Moments
from rewriter.operator import AbstractMatrix

HALF = 0.5


@dataclass(frozen=True)
class NoMatch:
    """A refusal, as a value: why, and at which node where that is known."""

    reason: str
    node: str = ""

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class Fitted:
    """An operator, how it is written on the command line, and its weighted error relative to the product (0 to 1)."""

    operator: AbstractMatrix
    spelling: str  # "monarch:blocks=4:rank=2"
    weighted_error: float


@dataclass(frozen=True)
class AbstractStructure(abc.ABC):
    """A family of matrices. Final subclasses are frozen dataclasses whose fields are options, None meaning "choose".

    Laws: fit(...).operator.shape == weight.shape; its params <= cost_limit; fitting a member of the family at its own settings returns it
    with an error at rounding level (a descent that is not convex may stop short of it, and its module says so); a larger cost_limit never
    gives a larger weighted error (up to the settings' granularity); discover(weight) is None-or-exact: a returned operator equals
    the weight to rounding level and stores fewer numbers.
    """

    name: ClassVar[str]
    iterative: ClassVar[bool] = False  # fits in sweeps: tried after the closed forms, where `promising`
    named_only: ClassVar[bool] = False  # not for `auto`: another family has its members, or it runs slower than what it replaces
    kinds: ClassVar[dict[str, type[AbstractStructure]]] = {}

    def __init_subclass__(cls) -> None:
        if not cls.__name__.startswith("Abstract"):
            AbstractStructure.kinds[cls.name] = cls

    @property
    def share(self) -> float:
        """How much of the dense numbers a fit may store where no limit is given: half; all where an option is set, which decides."""
        return HALF if self.spelling() == self.name else 1.0

    @abc.abstractmethod
    def fit(self, weight: Tensor, moments: Moments, cost_limit: int, rng: torch.Generator) -> Fitted | NoMatch:
        """The member with the least weighted error that stores at most `cost_limit` numbers.

        weight is (m, n) float32, y = W x; moments describe x (n wide). Options that are set are kept; if they then exceed cost_limit:
        NoMatch with
        both numbers. Deterministic given rng.
        """

    def start(self, weight: Tensor, moments: Moments, cost_limit: int) -> AbstractMatrix | NoMatch:
        """What a dear fit starts from: a form of the same shapes, to be timed before the fit is begun; NoMatch where a fit is not dear."""
        return NoMatch(f"a fit of {self.name} is not dear")

    def promising(self, weight: Tensor, moments: Moments, cost_limit: int, rival: float) -> bool:
        """Whether `fit` may reach a weighted error below `rival`: asked before a fit that is dear, it may err towards True."""
        return True

    def discover(self, weight: Tensor) -> Fitted | NoMatch:
        """The weight as an exact member, parameters found from the weight alone; NoMatch when it is none."""
        return NoMatch(f"no exact discovery for {self.name}")

    def spelling(self) -> str:
        """As written on the command line, only options that are set."""
        return spell(self)


def spell(options: object) -> str:
    """`name:option=value:…` of a frozen dataclass with a `name`, leaving out the options at their defaults."""
    parts = [str(options.name)]  # type: ignore[attr-defined]
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if value != field.default:
            parts.append(f"{field.name.replace('_', '-')}={value}")
    return ":".join(parts)
