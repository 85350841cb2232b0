"""State tracking, trained here: one layer of n_h Householder factors a token against group words, and the same model rewritten.

A token is a group element, the label after t tokens their product. One reflection a token (n_h = 1, beta up to 2) counts parity; the
permutations of three things (S3) need two (Siems et al. 2025, arXiv:2502.10297, section 5). Accuracy is that of the last position, at the
length of training and beyond. Then the model is exported as a loop, rewritten by raise-recurrence, and run by ONNX Runtime.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._higher_order_ops import scan

from rewriter import rewrite
from rewriter.backends.eager import EagerOps
from rewriter.passes.structures.linear_attention import LinearAttention
from rewriter.registry import targets

HEADS, KEY, WIDTH = 2, 6, 16
TRAINED, LONGER = 16, 64
BATCH, STEPS, RATE = 128, 800, 4e-3
SEEDS = (0, 1)  # the best of them, as the paper reports it


class Group:
    """Its multiplication table; element 0 is the identity."""

    def __init__(self, name: str, size: int) -> None:
        perms = list(itertools.permutations(range(size)))
        self.name, self.order = name, len(perms)
        self.table = torch.tensor([[perms.index(tuple(p[i] for i in q)) for q in perms] for p in perms])

    def words(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(count, length) elements, and their running products."""
        words = torch.randint(self.order, (count, length), generator=generator)
        products = [words[:, 0]]
        for t in range(1, length):
            products.append(self.table[words[:, t], products[-1]])
        return words, torch.stack(products, 1)


GROUPS = {"parity": Group("parity", 2), "S3": Group("S3", 3)}


class Tracker(nn.Module):
    """Embedding, one layer of Householder products, a small classifier. A first token of its own writes the state."""

    def __init__(self, order: int, factors: int, most: float) -> None:
        super().__init__()
        self.form = LinearAttention(HEADS, KEY, WIDTH, HEADS, HEADS, factors, carried=False)
        self.most = most  # of beta
        self.embed = nn.Embedding(order + 1, 48)
        self.project = nn.ModuleDict({name: nn.Linear(48, int(dims[-1])) for name, dims in self.form.sequences().items()})
        self.read = nn.Sequential(nn.RMSNorm(HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 64), nn.ReLU(), nn.Linear(64, order))

    def sequences(self, words: Tensor) -> list[Tensor]:
        begin = torch.full_like(words[:, :1], self.embed.num_embeddings - 1)
        x = self.embed(torch.cat([begin, words], 1))
        found = {name: layer(x) for name, layer in self.project.items()}
        found["key"] = nn.functional.normalize(found["key"].unflatten(-1, (-1, KEY)), dim=-1).flatten(-2)
        found["beta"] = self.most * (4 * found["beta"]).sigmoid()
        return list(found.values())

    def forward(self, words: Tensor) -> Tensor:
        out, _ = self.form.spelled("sequential", EagerOps(), *self.sequences(words))  # words are shorter than a chunk
        logits: Tensor = self.read(out[:, 1:])
        return logits


class Looped(nn.Module):
    """The same as its author would write it: a scan over tokens."""

    def __init__(self, model: Tracker) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor) -> Tensor:
        form = self.model.form
        xs = [x.transpose(0, 1) for x in self.model.sequences(words)]

        def body(state: Tensor, row: list[Tensor]) -> tuple[Tensor, Tensor]:
            (new,), (y,) = form.step(EagerOps(), [state], row)
            return new.clone(), y.clone()

        start = xs[0].new_zeros(words.shape[0], HEADS, KEY, WIDTH)
        _, out = scan(body, start, xs)
        logits: Tensor = self.model.read(out.transpose(0, 1)[:, 1:])
        return logits


def train(group: Group, factors: int, most: float, seed: int) -> Tracker:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Tracker(group.order, factors, most)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS)
    for step in range(STEPS):
        length = min(TRAINED, 4 + step * 2 * TRAINED // STEPS)  # short words first
        words, labels = group.words(BATCH, length, generator)
        loss = nn.functional.cross_entropy(model(words).flatten(0, 1), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(run: object, group: Group, length: int) -> float:
    words, labels = group.words(512, length, torch.Generator().manual_seed(99))
    logits = run(words)  # type: ignore[operator]
    return float((logits[:, -1].argmax(-1) == labels[:, -1]).float().mean())


def rewritten(model: Tracker, group: Group, folder: Path) -> object:
    """By ONNX Runtime, the loop raised to one node; exits where it was not."""
    data = {"words": group.words(32, LONGER, torch.Generator().manual_seed(1))[0]}
    options = {"out": str(folder / "m.onnx"), "tokens": str(LONGER), "timing": False, "force": True}
    result = rewrite(Looped(model), "raise-recurrence", ["words:int64[batch,time]"], "onnxruntime", data, **options)
    rows = [row for row in result.report.sites if row.kind == "recurrence"]
    if result.path is None or [row.status for row in rows] != ["rewritten"]:
        sys.exit(f"the recurrence was not raised: {result.message}; {[row.reason for row in rows]}")
    runner = targets()["onnxruntime"]().open(result.path, 1)
    return lambda words: next(iter(runner({"words": words}).values()))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # many small operations: a second thread only waits for the first
    table = Table(title=f"last position, accuracy; trained at {TRAINED} tokens, {STEPS} steps, best of {len(SEEDS)} seeds")
    for column in ("task", "n_h", "beta up to", f"at {TRAINED}", f"at {LONGER}", f"rewritten, at {LONGER}"):
        table.add_column(column)
    for name, factors, most in (("parity", 1, 1.0), ("parity", 1, 2.0), ("S3", 1, 2.0), ("S3", 2, 2.0)):
        group = GROUPS[name]
        model = max((train(group, factors, most, seed) for seed in SEEDS), key=lambda m: accuracy(m, group, LONGER))
        at = [accuracy(model, group, length) for length in (TRAINED, LONGER)]
        with tempfile.TemporaryDirectory() as folder:
            after = accuracy(rewritten(model, group, Path(folder)), group, LONGER)
        if abs(after - at[1]) > 0.01:
            sys.exit(f"{name}, n_h = {factors}: the rewritten model's accuracy is {after:.3f}, the model's own {at[1]:.3f}")
        table.add_row(name, str(factors), f"{most:.0f}", *(f"{a:.1%}" for a in (*at, after)))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
