"""Block-LoRA: what it learns beside LoRA, how near its projection is to a dense decomposition, and whether its folded form is the same.

    python tools/bench_block_lora.py [--rule last|before] [--seeds 3] [--steps 400] [--rank 8]

A small transformer (2 blocks, width 64, causal) learns to continue sequences of one rule over 32 symbols, the next is 5 s + 3; then,
frozen, with adapters on queries, keys, values, the attention's output and both linears of its MLPs, those of another: 11 s + 7 of the last
symbol s, or of the one before it, which is harder. One symbol in twenty is chance. Every kind takes the same batches and as many steps of
Adam, at the better of two rates by sequences that are neither trained on nor judged by. The loss is cross-entropy on fresh sequences, as a
ratio to LoRA's of the same rank and seed: the median over the seeds, with the least and the largest. Numbers and FLOPs are those of
`Tuned.counts`, as shares of LoRA's.

Red, and nothing is printed, where a truncated product is off from torch.linalg.svd of the dense delta by more than 1e-6 relative to it,
over factors as peft makes them (float32, A as it starts them, B random with columns that fall) of ranks 4 to 64 and sides up to 1536, plain
and weighted; where a folded branch is off from the one that trains by more than 1e-6, or the model from peft's own forward of what was
saved; or where numbers counted on the module differ from the formulas.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rewriter
from rewriter.thin import thin

ALLOWED = 1e-6
SYMBOLS, LENGTH, WIDTH, BATCH = 32, 8, 64, 32
TARGETS = ["query", "key", "value", "out", "widen", "narrow"]
RATES = (1e-2, 3e-2)
RULES: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "base": lambda s: 5 * s[-1] + 3,
    "last": lambda s: 11 * s[-1] + 7,
    "before": lambda s: 11 * s[-2] + 7,
}
KINDS: dict[str, dict[str, Any]] = {
    "Block-LoRA, n = 2, by rank": {"blocks": 2, "reading": "rank"},
    "Block-LoRA, n = 4, by rank": {"blocks": 4, "reading": "rank"},
    "Block-LoRA, n = 2, by input": {"blocks": 2, "reading": "input"},
    "Block-LoRA, n = 4, by input": {"blocks": 4, "reading": "input"},
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.widen, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (part(h).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        out: Tensor = x + self.narrow(torch.relu(self.widen(self.behind(x))))
        return out


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def sequences(count: int, rule: str, rng: torch.Generator) -> Tensor:
    """(count, LENGTH + 1) of one rule, one symbol in twenty replaced by chance."""
    found = [torch.randint(SYMBOLS, (count,), generator=rng), torch.randint(SYMBOLS, (count,), generator=rng)]
    while len(found) <= LENGTH:
        noise = torch.randint(SYMBOLS, (count,), generator=rng)
        found.append(torch.where(torch.rand(count, generator=rng) < 0.05, noise, RULES[rule](found) % SYMBOLS))
    return torch.stack(found, 1)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def fit(model: nn.Module, parameters: list[nn.Parameter], rate: float, steps: int, rule: str, seed: int) -> None:
    rng, optimiser = torch.Generator().manual_seed(seed), torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model, sequences(BATCH, rule, rng)).backward()
        optimiser.step()
        schedule.step()


def learned(prepare: Callable[[], tuple[nn.Module, list[nn.Parameter]]], rule: str, steps: int, seed: int) -> float:
    """The loss at the best rate."""
    choosing, judging = (sequences(512, rule, torch.Generator().manual_seed(10_000 * k + seed)) for k in (1, 2))
    results = []
    for rate in RATES:
        torch.manual_seed(seed)
        model, parameters = prepare()
        fit(model, parameters, rate, steps, rule, seed + 1000)
        with torch.no_grad():
            results.append((float(loss(model, choosing)), float(loss(model, judging))))
    return min(results)[1]


def as_lora(base: nn.Module, rank: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """peft's own."""
    made = peft.get_peft_model(deepcopy(base), peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    return made, [p for p in made.parameters() if p.requires_grad]


def as_blocks(base: nn.Module, rank: int, settings: dict[str, Any]) -> tuple[nn.Module, list[nn.Parameter]]:
    tuned = rewriter.block_lora(deepcopy(base), TARGETS, rank, **settings)
    return tuned.module, tuned.parameters()


def red(found: float, what: str) -> float:
    if not found <= ALLOWED:
        raise SystemExit(f"red: {what} is off by {found:.1e}, more than {ALLOWED:g}; no figure is printed")
    return found


def projections() -> Iterator[float]:
    """|X - best| / |U D| of every rank cut in half, against a dense decomposition in double precision."""
    for rank, (m, n) in ((4, (384, 384)), (8, (768, 768)), (16, (1536, 384)), (64, (384, 1536))):
        for weighted in (False, True):
            torch.manual_seed(rank)
            base = peft.get_peft_model(nn.Sequential(nn.Linear(n, m)), peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]))
            part = base.base_model.model[0]
            down, up = part.lora_A["default"].weight.detach(), torch.randn(m, rank) * torch.logspace(0, -3, rank)
            x = torch.randn(2 * n, n, dtype=torch.float64) * torch.linspace(0.2, 2, n, dtype=torch.float64)
            second = x.T @ x / len(x) if weighted else torch.eye(n, dtype=torch.float64)
            root, dense = torch.linalg.cholesky(second), up.double() @ down.double()
            u, s, v = torch.linalg.svd(dense @ root, full_matrices=False)
            cut = rank // 2
            best = torch.linalg.solve_triangular(root, u[:, :cut] * s[:cut] @ v[:cut], upper=False, left=False)
            a, b = thin(down, up, second if weighted else None).truncated(cut)
            yield red(float((b @ a - best).norm() / dense.norm()), f"rank {cut} of {rank} at {m} x {n}")


def folds(base: nn.Module, rank: int) -> Iterator[float]:
    """Trained for some steps: as it trains, folded, and as peft reads what was saved."""
    ids = sequences(8, "last", torch.Generator().manual_seed(3))[:, :-1]
    for settings in KINDS.values():
        tuned = rewriter.block_lora(deepcopy(base), TARGETS, rank, **settings)
        fit(tuned.module, tuned.parameters(), 1e-2, 20, "last", 0)
        for path, (down, up) in tuned.fold().items():
            layer = tuned.layers[path]
            x = torch.randn(16, layer.base.in_features)
            with torch.no_grad():
                off = layer(x) - layer.base(x) - layer.scale * x @ down.T @ up.T
                yield red(float(off.norm() / layer(x).norm()), f"the folded branch of {path}")
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            theirs = peft.PeftModel.from_pretrained(deepcopy(base), str(tuned.save(folder)))
            yield red(float((theirs(ids) - tuned.module(ids)).norm() / theirs(ids).norm()), "peft's forward of what was saved")
        counts, sizes, n = tuned.counts(), [tuple(layer.base.weight.shape) for layer in tuned.layers.values()], settings["blocks"]
        trained = sum(rank * d // n + rank * k for k, d in sizes)
        deployed = sum(rank * (d + k) // n for k, d in sizes) if settings["reading"] == "rank" else trained
        if (counts.trained, counts.deployed, counts.lora) != (trained, deployed, sum(rank * (d + k) for k, d in sizes)):
            raise SystemExit(f"red: {counts} is not what the formulas say; no figure is printed")


def losses(bases: list[nn.Module], rule: str, rank: int, steps: int) -> Table:
    table = Table(
        "adapter",
        "loss",
        "ratio to LoRA",
        "trained",
        "deployed",
        "FLOPs",
        title=f"rule of the symbol {rule}, rank {rank}, {len(bases)} seeds",
    )
    lora = [learned(lambda base=base: as_lora(base, rank), rule, steps, seed) for seed, base in enumerate(bases)]  # type: ignore[misc]
    untuned = [float(loss(base, sequences(512, rule, torch.Generator().manual_seed(20_000 + seed)))) for seed, base in enumerate(bases)]
    table.add_row("none", f"{statistics.median(untuned):.3f}", "", "", "", "")
    table.add_row("LoRA (peft)", f"{statistics.median(lora):.3f}", "1", "1", "1", "1")
    half = [learned(lambda base=base: as_lora(base, rank // 2), rule, steps, seed) for seed, base in enumerate(bases)]  # type: ignore[misc]
    table.add_row(f"LoRA of rank {rank // 2}", *_against(half, lora), "0.500", "0.500", "0.500")
    for name, settings in KINDS.items():
        found = [learned(lambda base=base: as_blocks(base, rank, settings), rule, steps, seed) for seed, base in enumerate(bases)]  # type: ignore[misc] # noqa: B023
        counts = rewriter.block_lora(deepcopy(bases[0]), TARGETS, rank, **settings).counts()
        shares = (counts.trained / counts.lora, counts.deployed / counts.lora, counts.flops / counts.lora_flops)
        table.add_row(name, *_against(found, lora), *(f"{share:.3f}" for share in shares))
    return table


def _against(found: list[float], lora: list[float]) -> tuple[str, str]:
    ratios = sorted(a / b for a, b in zip(found, lora, strict=True))
    return f"{statistics.median(found):.3f}", f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"


def pretrained(seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Transformer()
    fit(model, list(model.parameters()), 3e-3, steps, "base", seed)
    return model.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=("last", "before"), default="last")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of Adam, for each adapter at each rate")
    parser.add_argument("--rank", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    bases = [pretrained(seed, 300) for seed in range(given.seeds)]
    projected, folded = max(projections()), max(folds(bases[0], given.rank))
    console.print(losses(bases, given.rule, given.rank, given.steps))
    console.print(f"projection against a dense decomposition: at most {projected:.1e} of |U D|; folded and saved: at most {folded:.1e}")
    console.print(f"torch {torch.__version__}, peft {peft.__version__}")


if __name__ == "__main__":
    main()
