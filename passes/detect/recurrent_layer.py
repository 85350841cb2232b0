"""LSTM, GRU and RNN layers: their matrices are listed as linear sites that stay; an RNN of identity activation is a linear system."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rewriter.algebra import Dense
from rewriter.graph import Graph, Layout, Node, Place, Port, Region, Site, WeightRef
from rewriter.passes.detect.reading import Reading
from rewriter.passes.detect.vector_state import describe
from rewriter.passes.structures.linear_system import LinearSystem

LAYERS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "lstm_cell": "LSTM cell", "gru_cell": "GRU cell", "rnn_cell": "RNN cell"}


def matrices(graph: Graph, node: Node, listed: set[str]) -> Iterator[Site]:
    """One site for each matrix of a layer, with its cost and why it stays; a cell that is called again has listed its own."""
    y = graph.outputs(node)[0]
    for value in graph.inputs(node)[1 : 1 + graph.attributes(node).get("weights", 2)]:  # an ONNX node has W and R
        tensor = graph.const(value) if value is not None and graph.is_const(value) else None
        if tensor is None or tensor.dim() < 2 or not tensor.is_floating_point() or min(tensor.shape[-2:]) < 2:
            continue
        stored = graph.stored_name(value)
        if stored in listed:
            continue
        listed.add(stored)
        shape = (tensor.numel() // tensor.shape[-1], tensor.shape[-1])
        reason = f"inside {LAYERS[graph.op(node)]}, an operator that takes its matrices dense"
        ref = WeightRef(stored, value)
        yield Site(stored, stored, "linear", shape, tensor.dtype, (Place((node,), value, y),), {"weight": ref}, None, reason)


def kind_of(graph: Graph, node: Node) -> str:
    """Why a layer is not raised."""
    given = graph.attributes(node)
    affine = graph.op(node) == "rnn" and set(_activations(given)) == {"Affine"} and not given.get("clip")
    return "linear, but backwards, of another layout or scaled by its activation" if affine else "non-linear in its state"


def _activations(given: Mapping[str, Any]) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in given.get("activations", ())]


def read_identity_rnn(graph: Graph, node: Node) -> Reading | None:
    """An ONNX RNN, forwards, of activation Affine(1, 0): Y (time, 1, batch, h) of X (time, batch, n)."""
    given = graph.attributes(node)
    slope = (tuple(given.get("activation_alpha", ())), tuple(given.get("activation_beta", ())))
    plain = given.get("direction", "forward") in ("forward", b"forward") and not given.get("layout", 0) and not given.get("clip")
    x, w, r, b, lengths, initial = (*graph.inputs(node), None, None, None)[:6]
    if _activations(given) != ["Affine"] or slope != ((1.0,), (0.0,)) or not plain or lengths is not None:
        return None
    parts = [None if v is None else graph.const(v) if graph.is_const(v) else None for v in (w, r, b)]
    if parts[0] is None or parts[1] is None or (b is not None and parts[2] is None):
        return None
    enter, move, bias = (None if t is None or t.dim() == 0 else t[0] for t in parts)
    if enter is None or move is None or move.dim() != 2 or enter.dim() != 2 or not len(enter) == len(move) == move.shape[1]:
        return None
    h = len(move)
    if bias is not None and bias.shape != (2 * h,):
        return None
    shift = torch.zeros(h, dtype=move.dtype) if bias is None else bias[:h] + bias[h:]
    form = LinearSystem(
        Dense(move.T.contiguous()), Dense(enter.T.contiguous()), shift=shift if bool(shift.any()) else (), carried=initial is not None
    )
    inputs = [Port(x, Layout((1, 0, 2)))]
    if initial is not None:
        inputs.append(Port(initial, Layout((1, 0, 2), join=2)))
    every, last = (*graph.outputs(node), None)[:2]
    outputs = (
        Port(every, Layout(spread=(1, h), after=(1, 2, 0, 3))) if every is not None and graph.users(every) else None,
        Port(last, Layout(spread=(1, h), after=(1, 0, 2))) if last is not None and graph.users(last) else None,
    )
    return Reading(form, Region((node,), tuple(inputs), outputs), describe(move.T.double()))
