"""Block-LoRA as layers that train: y = W x + s B (A x), W frozen, s = alpha / rank, A and B made of n blocks of which A's are all the same.

    "rank"     the blocks lie along the rank:   A x = A_s x,                B = B_1 + ... + B_n      A_s (r/n, d), B_i (k, r/n)
    "input"    they lie along the features:     A x = A_s (x_1 + ... + x_n)                          A_s (r, d/n), B (k, r)

Both train r d / n + r k numbers, LoRA r (d + k). The first folds to a LoRA of rank r / n, of (d + k) r / n numbers; the second keeps rank r
and folds to r (d + k). All B_i get one gradient: the first trains as LoRA of rank r / n whose B takes steps n times as long.
Source: Zhou et al., Block-LoRA (arXiv:2501.16720), of which the abstract admits both; starts as in peft (B = 0, A uniform in +-1/sqrt d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from rewriter.backends.files.peft import save_adapter
from rewriter.errors import RewriteError

READINGS = ("rank", "input")


class BlockLoraLinear(nn.Module):
    """A linear with its branch; `base` is the linear as it was."""

    def __init__(self, base: nn.Linear, rank: int, blocks: int, alpha: float, reading: str) -> None:
        super().__init__()
        m, n = base.weight.shape
        self.base, self.rank, self.blocks, self.scale, self.reading = base, rank, blocks, alpha / rank, reading
        q, d, parts = (rank // blocks, n, blocks) if reading == "rank" else (rank, n // blocks, 1)
        self.down = nn.Parameter(base.weight.new_empty(q, d).uniform_(-(n**-0.5), n**-0.5))
        self.up = nn.Parameter(base.weight.new_zeros(parts, m, q))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., k)."""
        given = x if self.reading == "rank" else x.unflatten(-1, (self.blocks, -1)).sum(-2)
        low = nn.functional.linear(nn.functional.linear(given, self.down), self.up.sum(0))
        out: Tensor = self.base(x) + self.scale * low
        return out

    def fold(self) -> tuple[Tensor, Tensor]:
        """The branch as LoRA has it, (A (q, d), B (k, q)), the same but for rounding of the sum of the B_i; s stays outside."""
        down, up = self.down.detach(), self.up.detach().sum(0)
        return (down if self.reading == "rank" else down.repeat(1, self.blocks)), up


@dataclass(frozen=True)
class Counts:
    """Numbers, and FLOPs a token of the branches (2 per multiply-add, 1 per addition); LoRA's are those at the same rank."""

    trained: int
    deployed: int  # the form with the fewest: folded where the blocks lie along the rank, else as it trains
    flops: int  # as deployed
    lora: int
    lora_flops: int


@dataclass(frozen=True)
class Tuned:
    """A module whose linears carry branches, in place; nothing else of it is trained."""

    module: nn.Module
    layers: Mapping[str, BlockLoraLinear]  # by module path

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for layer in self.layers.values() for p in (layer.down, layer.up)]

    def counts(self) -> Counts:
        """Of all branches together."""
        trained, deployed, flops, lora = sum(p.numel() for p in self.parameters()), 0, 0, 0
        for layer in self.layers.values():
            numbers = layer.down.numel() + layer.up[0].numel()
            deployed += numbers
            flops += 2 * numbers + (0 if layer.reading == "rank" else layer.base.in_features - layer.down.shape[1])
            lora += layer.rank * (layer.base.in_features + layer.base.out_features)
        return Counts(trained, deployed, flops, lora, 2 * lora)

    def fold(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Each branch as LoRA has it, (A (q, d), B (k, q)), by module path; s stays outside."""
        return {path: layer.fold() for path, layer in self.layers.items()}

    def save(self, folder: str | Path) -> Path:
        """The folded branches as peft saves LoRA: for peft, and for --adapter. RewriteError where the folder cannot be written."""
        scale = next(iter(self.layers.values())).scale
        return save_adapter(Path(folder), self.fold(), scale)

    def remove(self) -> nn.Module:
        """The module with its linears as they were; they stay frozen."""
        for path, layer in self.layers.items():
            _put(self.module, path, layer.base)
        return self.module


def block_lora(
    module: nn.Module, targets: Sequence[str], rank: int = 8, blocks: int = 2, alpha: float | None = None, reading: str = "rank"
) -> Tuned:
    """Every nn.Linear whose path is, or ends with, one of `targets` gets a branch, in place; all other parameters are frozen.

    alpha: s = alpha / rank; by default rank, so that s = 1. RewriteError where nothing matches, what matches is
    no nn.Linear, or the blocks do not divide what they are blocks of.
    """
    if reading not in READINGS:
        raise RewriteError(f"reading={reading!r} is unknown; give one of {', '.join(READINGS)}")
    if rank < 1 or blocks < 1 or (reading == "rank" and rank % blocks):
        raise RewriteError(f"rank {rank} in {blocks} blocks: give whole numbers from 1 on, of which blocks divides rank")
    found = {path: part for path, part in module.named_modules() if any(path == t or path.endswith(f".{t}") for t in targets)}
    if not found:
        linears = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
        raise RewriteError(
            f"no module is called like {', '.join(targets)}; linears are called {', '.join(linears[:3]) or '(there is none)'}"
        )
    for path, part in found.items():
        if not isinstance(part, nn.Linear):
            raise RewriteError(f"{path!r} is {type(part).__name__}, not nn.Linear; name linears")
        if reading == "input" and part.in_features % blocks:
            raise RewriteError(f"{path!r} reads {part.in_features} features, which {blocks} blocks do not divide; give another number")
    module.requires_grad_(False)
    layers = {path: BlockLoraLinear(part, rank, blocks, rank if alpha is None else alpha, reading) for path, part in found.items()}
    for path, layer in layers.items():
        _put(module, path, layer)
    return Tuned(module, layers)


def _put(module: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, part)
