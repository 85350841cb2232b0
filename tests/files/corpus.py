"""Clean exports of the kinds that users bring: each must be accepted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

ANY = Dim.DYNAMIC


class Cond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.yes, self.no = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.yes(x), lambda x: self.no(x) * 2, (x,))


class Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        from torch._higher_order_ops.scan import scan

        def combine(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            after = torch.tanh(self.step(state) + x)
            return after, after * 1.0

        return scan(combine, x[0] * 0, x)


class While(nn.Module):
    def forward(self, x: Tensor, i: Tensor) -> Any:
        from torch._higher_order_ops.while_loop import while_loop

        return while_loop(lambda i, x: i.sum() < 5, lambda i, x: (i + 1, x * 2), (i, x))


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.reshape(-1)[: y.shape[0]].sum() + y.sum()


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            y = self.linear(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.linear(y)
        return {"y": y, "z": z.float()}


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n = x[0].item()
        torch._check(n >= 2)
        torch._check(n < 100)
        return torch.zeros(n) + n


class Keywords(nn.Module):
    def forward(self, x: Tensor, *, mask: Tensor, nested: Any, factor: float = 1.5) -> Tensor:
        out: Tensor = x * mask + nested["a"]["b c"] * factor
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("offset", torch.tensor([3.0]), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(ids)) * self.scale + self.offset + torch.tensor([1.0, 2.0]).sum()
        return out


class Nonzero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0] * 2


def _conv() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 2)).eval()


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}


def _bert() -> ExportedProgram:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32
    )
    shapes = {name: {0: ANY, 1: ANY} for name in _tokens()}
    return export(BertModel(config).eval(), (), _tokens(), dynamic_shapes=shapes)


def _llama() -> ExportedProgram:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    shapes = {name: {0: ANY, 1: ANY} for name in _tokens()} | {"use_cache": None}
    return export(LlamaForCausalLM(config).eval(), (), {**_tokens(), "use_cache": False}, dynamic_shapes=shapes)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.GELU("tanh"), nn.Linear(5, 2))


def _bounded() -> Dim:
    return Dim("b", min=2, max=64)


def _derived(shift: int) -> ExportedProgram:
    b = _bounded()
    return export(Two(), (torch.randn(4, 2), torch.randn(8 - shift)), dynamic_shapes=({0: b}, {0: 2 * b - shift if shift else 2 * b}))


def _encoder() -> ExportedProgram:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    return export(layer, (torch.randn(2, 5, 8),), dynamic_shapes=({0: ANY, 1: ANY},))


PROGRAMS: dict[str, Callable[[], ExportedProgram]] = {
    "static": lambda: export(_mlp(), (torch.randn(2, 3),)),
    "dynamic": lambda: export(_mlp(), (torch.randn(2, 3),), dynamic_shapes=({0: ANY},)),
    "bounded": lambda: export(_mlp(), (torch.randn(2, 3),), dynamic_shapes=({0: _bounded()},)),
    "derived": lambda: _derived(0),
    "derived-shifted": lambda: _derived(1),
    "bfloat16": lambda: export(_mlp().bfloat16(), (torch.randn(2, 3).bfloat16(),), dynamic_shapes=({0: ANY},)),
    "encoder": _encoder,
    "encoder-decomposed": lambda: _encoder().run_decompositions(),
    "lstm": lambda: export(nn.LSTM(4, 4, batch_first=True), (torch.randn(2, 5, 4),), dynamic_shapes=({0: ANY},)),
    "conv": lambda: export(_conv(), (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: ANY, 2: ANY, 3: ANY},)),
    "cond": lambda: export(Cond(), (torch.randn(2, 4),)),
    "scan": lambda: export(Scan(), (torch.randn(5, 4),)),
    "while": lambda: export(While(), (torch.randn(2, 4), torch.zeros(1, dtype=torch.int64))),
    "modes": lambda: export(Modes(), (torch.randn(2, 4),)),
    "item": lambda: export(Item(), (torch.tensor([3]),)),
    "keywords": lambda: export(Keywords(), (torch.randn(2, 4),), {"mask": torch.ones(2, 4), "nested": {"a": {"b c": torch.ones(1)}}}),
    "tied": lambda: export(Tied(), (torch.randint(0, 11, (2, 3)),), dynamic_shapes=({0: ANY, 1: ANY},)),
    "nonzero": lambda: export(Nonzero(), (torch.randn(6),), dynamic_shapes=({0: ANY},)),
    "bert": _bert,
    "llama": _llama,
    "llama-decomposed": lambda: _llama().run_decompositions(),
}


def program(name: str) -> ExportedProgram:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PROGRAMS[name]()
