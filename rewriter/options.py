"""The options of a run: one dataclass for the command line, the Python API and `replay`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rewriter.allocate import UNITS, Budget
from rewriter.errors import RewriteError

OBJECTIVES = UNITS
OPSETS = range(18, 26)
SEEDS = 1 << 32


@dataclass(frozen=True)
class Options:
    """Every option means what `rewrite --help` says; all values are plain, so that a report can hold and replay them."""

    passes: str = "auto,pre-merge"
    out: str | None = None
    target: str | None = None
    opset: int = 20
    inputs: tuple[str, ...] = ()
    data: str | None = None
    dims: str | None = None
    arch: str | None = None
    task: str | None = None
    adapters: tuple[str, ...] = ()
    energy: float | None = None  # of an adapter's change, that a lower rank has to keep
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    budget: str | None = None  # params=0.5
    objective: str | None = None
    max_error: float | None = None
    precision: float | None = None  # half width over estimate
    metric: str | None = None
    tokens: str = "1,256"
    seed: int = 0
    threads: int = 1
    cache: str | None = None
    provider: str = "CPUExecutionProvider"
    kernels: bool = False  # time and choose as compiled kernels run
    flatten: bool = False
    allow_noop: bool = False
    trust_pickle: bool = False
    force: bool = False
    quiet: bool = False
    samples: int = 256  # how many are invented where no data is given
    timing: bool = True  # measure the whole model's latency

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise RewriteError(f"--opset {self.opset} is out of range; give {OPSETS[0]} to {OPSETS[-1]}")
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise RewriteError(f"--objective {self.objective} is unknown; give one of {', '.join(OBJECTIVES)}")
        if self.max_error is not None and not 0 <= self.max_error < math.inf:
            raise RewriteError(f"--max-error {self.max_error} is out of range; give a relative error of at least 0, such as 0.1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RewriteError(f"--energy {self.energy} is out of range; give a share of what an adapter does, above 0 and up to 1")
        if self.precision is not None and not 0 < self.precision < 1:
            raise RewriteError(f"--precision {self.precision} is out of range; give a share of the error above 0 and below 1, such as 0.01")
        if not 0 <= self.seed < SEEDS:
            raise RewriteError(f"--seed {self.seed} is out of range; give a whole number from 0 to {SEEDS - 1}")
        for option, value in (("--threads", self.threads), ("--samples", self.samples)):
            if value < 1:
                raise RewriteError(f"{option} {value} is out of range; give at least 1")
        _ = self.token_counts, self.shared

    @property
    def token_counts(self) -> tuple[int, ...]:
        """--tokens as numbers."""
        try:
            counts = tuple(int(part) for part in self.tokens.split(","))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1:
            raise RewriteError(f"--tokens {self.tokens} cannot be read; give whole numbers of at least 1, such as 1,256")
        return counts

    @property
    def shared(self) -> Budget | None:
        """--budget: what all linear sites together may cost."""
        return None if self.budget is None else Budget.parse(self.budget)

    def to_recipe(self) -> dict[str, Any]:
        """What a report stores for `replay`: only what differs from the defaults."""
        return {f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> Options:
        """The options that a report stored."""
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(recipe) - names)
        if unknown:
            raise RewriteError(f"the report's recipe has options that this version does not know: {', '.join(unknown)}")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe.items()}
        return cls(**given)
