"""Small networks in plain torch.nn: what users write themselves."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Tagger(nn.Module):
    """Embedding, LSTM, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 9)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embed(ids))
        out: Tensor = self.head(hidden)
        return out


class GruRegressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(12, 20, batch_first=True)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.gru(x)
        out: Tensor = self.head(hidden)
        return out


class PointwiseCnn(nn.Module):
    """A 3x3 convolution, two dense 1x1 ones, a grouped 1x1 one, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.expand = nn.Conv2d(16, 64, 1)
        self.reduce = nn.Conv2d(64, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 1, groups=4)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        x = self.norm(x + self.reduce(torch.relu(self.expand(x))))
        out: Tensor = self.head(self.grouped(x).mean((2, 3)))
        return out


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.over_channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.over_channels(self.norm2(x))
        return out


class Mixer(nn.Module):
    """An MLP-Mixer: linears over the tokens, then over the channels."""

    def __init__(self, tokens: int = 12, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.Sequential(MixerBlock(tokens, width), MixerBlock(tokens, width))
        self.head = nn.Linear(width, 5)

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(patches).mean(1))
        return out


class TiedAutoencoder(nn.Module):
    """One weight, used twice: as it is and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(24, 16)
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.encode(x)), self.encode.weight.T, self.bias)


class NoGradBranch(nn.Module):
    """A linear under torch.no_grad, which tracing may move into a submodule, and two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            features = torch.relu(self.frozen(x))
        return {"features": features, "logits": self.head(features)}
