"""Recurrences and adapters are listed, once each, and nothing else is taken for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fx.models import BATCH, Net, graph, normal, sites

X = normal(BATCH, 5, 8)


def kinds(function: Any, **parts: Any) -> list[str]:
    g = graph(Net(function, **parts), X)
    return [s.kind for s in sites(g) if s.kind != "linear"]


NONE: dict[str, tuple[Any, dict[str, Any]]] = {
    "softmax of a linear": (lambda s, x: s.l(x).softmax(-1), {"l": nn.Linear(8, 8)}),
    "softmax between linears": (lambda s, x: s.l(s.l(x).softmax(-1)), {"l": nn.Linear(8, 8)}),
    "gates": (lambda s, x: (s.l(x).softmax(-1) * x).sum(-1), {"l": nn.Linear(8, 8)}),
    "scores alone": (lambda s, x: (x @ x.mT).softmax(-1), {}),
    "residual": (lambda s, x: s.l(x) + x, {"l": nn.Linear(8, 8)}),
    "two branches": (lambda s, x: s.l(x) + s.k(x), {"l": nn.Linear(8, 8), "k": nn.Linear(8, 8)}),
    "bottleneck": (lambda s, x: x + s.k(s.l(x)), {"l": nn.Linear(8, 2), "k": nn.Linear(2, 8)}),
    "a sum of what is computed from nothing": (lambda s, x: s.l(x + (torch.arange(8) + torch.arange(8))), {"l": nn.Linear(8, 8)}),
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
    loops, inside = ([s for s in found if s.kind == kind] for kind in ("recurrence", "linear"))
    assert all("non-linear in its state" in s.reason for s in loops)
    assert [s.name for s in loops] == ["l (recurrence)", "l (recurrence)[2]"][:count]
    assert {s.name for s in inside} == {f"l.{name}" for name, p in module.named_parameters() if p.dim() == 2}
    assert len(loops) + len(inside) == len(found)


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
    assert [(s.name, s.reason, s.shape) for s in adapters] == [
        ("m.base_model.model.q.base_layer (adapter)", "", (32, 32)),
        ("m.base_model.model.v.base_layer (adapter)", "", (24, 32)),
    ]
    assert sum(s.kind == "linear" for s in found) == 3 + 2 * 2


def test_plain_adapter_with_its_own_bias() -> None:
    parts = {"w": normal(16, 16), "b": normal(16), "down": normal(16, 2), "up": normal(2, 16)}
    g = graph(Net(lambda s, x: (x @ s.w + s.b) + 0.5 * (x @ s.down @ s.up), **parts), normal(BATCH, 5, 16))
    assert [s.kind for s in sites(g) if s.kind != "linear"] == ["adapter"]
