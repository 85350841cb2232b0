"""A recurrence is one node, whatever its length.

PyTorch works out the shapes of an LSTM by unrolling it, which fixes the number of steps to the example's. The shapes need
no unrolling: every step has the shape of the first. Within `whole_recurrences`, tracing uses that, so the time axis stays
symbolic; torch.onnx.export then emits LSTM and GRU nodes of dynamic length, where outside it would unroll them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_Shapes = Callable[..., tuple[Tensor, ...]]


def _output(input: Tensor, hidden: Tensor, bidirectional: bool) -> Tensor:
    return input.new_empty((*input.shape[:-1], hidden.shape[-1] * (2 if bidirectional else 1)))


def _lstm(
    input: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _output(input, hx[0], bidirectional), torch.empty_like(hx[0]), torch.empty_like(hx[1])


def _one_state(
    input: Tensor, hx: Tensor, params: Sequence[Tensor], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _output(input, hx, bidirectional), torch.empty_like(hx)


@contextmanager
def whole_recurrences() -> Iterator[None]:
    """Trace LSTM, GRU and RNN as single nodes; for torch.export, run_decompositions and torch.onnx.export alike."""
    aten = torch.ops.aten
    rules: list[tuple[Any, _Shapes]] = [
        (aten.lstm.input, _lstm),
        (aten.gru.input, _one_state),
        (aten.rnn_tanh.input, _one_state),
        (aten.rnn_relu.input, _one_state),
    ]
    before = [(operator, dict(operator.py_kernels)) for operator, _ in rules]
    try:
        for operator, shapes in rules:
            _install(operator, dict.fromkeys(operator.py_kernels, shapes))
        yield
    finally:
        for operator, kernels in before:
            _install(operator, kernels)


def _install(operator: Any, kernels: dict[Any, _Shapes]) -> None:
    operator.py_kernels.update(kernels)
    operator._dispatch_cache.clear()
