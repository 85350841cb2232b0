"""Attention, recurrences and adapters are listed, once each, and nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.passes.detect.others import NO_PASS
from tests.fx.models import BATCH, Net, Together, graph, normal, sites

X = normal(BATCH, 5, 8)


def kinds(function: Any, **parts: Any) -> list[str]:
    g = graph(Net(function, **parts), X)
    found = [s for s in sites(g) if s.kind != "linear"]
    assert all(s.reason == NO_PASS and s.shape is None and s.places for s in found)
    return [s.kind for s in found]


def masked(scores: Tensor) -> Tensor:
    hidden = torch.ones(5, 5).triu(1).bool()
    return scores.masked_fill(hidden, float("-inf"))


ATTENTION: dict[str, Any] = {
    "scaled_dot_product_attention": lambda s, x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True),
    "plain": lambda s, x: (x @ x.mT).softmax(-1) @ x,
    "scaled after": lambda s, x: (x @ x.mT / 8**0.5).softmax(-1) @ x,
    "scaled by mul": lambda s, x: (x @ x.mT * 8**-0.5).softmax(-1) @ x,
    "scaled before": lambda s, x: ((x * 0.5) @ x.mT).softmax(-1) @ x,
    "mask added": lambda s, x: (x @ x.mT / 2 + torch.zeros(5, 5)).softmax(-1) @ x,
    "mask filled": lambda s, x: masked(x @ x.mT).softmax(-1) @ x,
    "mask by where": lambda s, x: torch.where(torch.ones(5, 5).tril().bool(), x @ x.mT, -1e9).softmax(-1) @ x,
    "dropout": lambda s, x: F.dropout((x @ x.mT).softmax(-1), 0.1, s.training) @ x,
    "einsum": lambda s, x: torch.einsum("bst,btd->bsd", torch.einsum("bsd,btd->bst", x, x).softmax(-1), x),
    "bmm": lambda s, x: torch.bmm(torch.softmax(torch.bmm(x, x.transpose(1, 2)), -1), x),
    "cast to float": lambda s, x: (x @ x.mT).double().softmax(-1).float() @ x,
    "heads": lambda s, x: (x.view(-1, 5, 2, 4).transpose(1, 2) @ x.view(-1, 5, 2, 4).permute(0, 2, 3, 1)).softmax(-1)
    @ x.view(-1, 5, 2, 4).transpose(1, 2),
}


def test_attention() -> None:
    """One for each form, and each at its own output."""
    g = graph(Together(Net(function) for function in ATTENTION.values()), X)
    found = [s for s in sites(g) if s.kind != "linear"]
    assert all(s.reason == NO_PASS and s.shape is None and s.places for s in found)
    scopes = [g.scope(s.places[0].nodes[0]) for s in found if s.kind == "attention"]
    missed = [name for i, name in enumerate(ATTENTION) if scopes.count(f"nets.{i}") != 1]
    assert missed == []
    assert len(found) == len(ATTENTION)


NONE: dict[str, tuple[Any, dict[str, Any]]] = {
    "softmax of a linear": (lambda s, x: s.l(x).softmax(-1), {"l": nn.Linear(8, 8)}),
    "softmax between linears": (lambda s, x: s.l(s.l(x).softmax(-1)), {"l": nn.Linear(8, 8)}),
    "gates": (lambda s, x: (s.l(x).softmax(-1) * x).sum(-1), {"l": nn.Linear(8, 8)}),
    "scores alone": (lambda s, x: (x @ x.mT).softmax(-1), {}),
    "residual": (lambda s, x: s.l(x) + x, {"l": nn.Linear(8, 8)}),
    "two branches": (lambda s, x: s.l(x) + s.k(x), {"l": nn.Linear(8, 8), "k": nn.Linear(8, 8)}),
    "bottleneck": (lambda s, x: x + s.k(s.l(x)), {"l": nn.Linear(8, 2), "k": nn.Linear(2, 8)}),
    "branch from elsewhere": (
        lambda s, x: s.w(x) + s.k(s.l(x.sin())),
        {"w": nn.Linear(8, 8), "l": nn.Linear(8, 2), "k": nn.Linear(2, 8)},
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_nothing(name: str) -> None:
    function, parts = NONE[name]
    assert kinds(function, **parts) == []


def steps(s: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], 6)
    state: Any = (h, h) if isinstance(s.l, nn.LSTMCell) else h
    for t in range(2):
        state = s.l(x[:, t], state)
    return state[0] if isinstance(state, tuple) else state


RECURRENT: dict[str, tuple[Any, nn.Module, int]] = {
    "lstm": (lambda s, x: s.l(x)[0], nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True), 1),
    "gru": (lambda s, x: s.l(x)[0], nn.GRU(8, 6), 1),
    "rnn": (lambda s, x: s.l(x)[0], nn.RNN(8, 6), 1),
    "rnn, relu": (lambda s, x: s.l(x)[0], nn.RNN(8, 6, nonlinearity="relu"), 1),
    "lstm cells": (steps, nn.LSTMCell(8, 6), 2),
    "gru cells": (steps, nn.GRUCell(8, 6), 2),
    "rnn cells": (steps, nn.RNNCell(8, 6), 2),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrence(name: str) -> None:
    function, module, count = RECURRENT[name]
    g = graph(Net(function, l=module), X)
    found = sites(g)
    assert [(s.kind, s.reason) for s in found] == [("recurrence", NO_PASS)] * count
    assert [s.name for s in found] == ["l (recurrence)", "l (recurrence)[2]"][:count]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.out = nn.Linear(32, 32), nn.Linear(32, 24, bias=False), nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.v(torch.relu(self.q(x)))))
        return out


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.1}, {"use_rslora": True, "lora_alpha": 32}])
def test_adapters_of_peft(settings: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q", "v"], init_lora_weights=False, **settings)
    tuned = peft.get_peft_model(Block(), config).eval()
    g = graph(Net(lambda s, x: s.m(x), m=tuned), normal(BATCH, 5, 32))
    found = sites(g)
    adapters = [s for s in found if s.kind == "adapter"]
    assert [s.reason for s in adapters] == [NO_PASS] * 2
    assert [s.name.split(" ")[0].split(".")[-1] for s in adapters] == ["q", "v"]
    assert sum(s.kind == "linear" for s in found) == 3 + 2 * 2


def test_plain_adapter_with_its_own_bias() -> None:
    parts = {"w": normal(16, 16), "b": normal(16), "down": normal(16, 2), "up": normal(2, 16)}
    g = graph(Net(lambda s, x: (x @ s.w + s.b) + 0.5 * (x @ s.down @ s.up), **parts), normal(BATCH, 5, 16))
    assert [s.kind for s in sites(g) if s.kind != "linear"] == ["adapter"]
