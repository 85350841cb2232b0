"""A language model over bytes, trained here on the sources of Python's standard library: minutes, once; kept in the user's cache.

python tools/bytelm.py [--steps 3000]      # trains it, or says what the kept one is

Pre-norm decoder: 4 layers of width 256, 8 heads, 3.1 M numbers in linears; AdamW.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from pytext import files
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from rewriter.cache import default_folder, digest, write_atomically

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 256, 4, 8, 256, 8
RATE = 3e-3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.attention_norm(x)
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        changed: Tensor = self.down(gelu(self.up(self.mlp_norm(x))))
        return x + changed


class ByteModel(nn.Module):
    """tokens (batch, length <= 256), bytes as int64 -> logits (batch, length, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.1)  # at torch's 1 what the blocks add is nothing beside it for hundreds of steps
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x))}


def text(held_out: bool = False) -> Tensor:
    """All bytes of the sources, uint8; the held-out eighth of the files is the judge's."""
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files(held_out))), dtype=torch.uint8)


def windows(count: int, held_out: bool = False, seed: int = 0, length: int = CONTEXT) -> Tensor:
    """(count, length) int64 from random places."""
    source, rng = text(held_out), torch.Generator().manual_seed(seed)
    starts = torch.randint(len(source) - length, (count,), generator=rng)
    return source[starts[:, None] + torch.arange(length)].long()


def trained(steps: int = 3000, seed: int = 0) -> ByteModel:
    """The kept model, or a new one. What it was trained on and how is part of its name."""
    name = digest("byte model", Path(__file__).read_bytes(), text(), steps, seed, torch.__version__)
    kept = default_folder() / "models" / f"{name}.safetensors"
    torch.manual_seed(seed)
    model = ByteModel()
    if kept.exists():
        model.load_state_dict(load_file(kept))
    else:
        _train(model, steps, seed)
        write_atomically(kept, lambda path: save_file(model.state_dict(), path))
    return model.eval()


def _train(model: ByteModel, steps: int, seed: int) -> None:
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.98))
    batches = windows(steps * BATCH, seed=seed + 1, length=CONTEXT + 1).split(BATCH)
    for step, batch in enumerate(track(batches, "training the byte model")):
        adam.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.zero_grad()
        cross_entropy(model(batch[:, :-1])["logits"].flatten(0, 1), batch[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    model, judge = trained(parser.parse_args().steps), windows(128, held_out=True)
    with torch.no_grad():
        loss = cross_entropy(model(judge[:, :-1])["logits"].flatten(0, 1), judge[:, 1:].flatten())
    count = sum(p.numel() for b in model.blocks.modules() if isinstance(b, nn.Linear) for p in [b.weight])
    print(f"{count / 1e6:.1f} M numbers in linears; {loss.exp():.3f} perplexity per byte on held-out files ({loss / math.log(2):.3f} bits)")


if __name__ == "__main__":
    main()
