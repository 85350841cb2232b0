"""Decomposition of a program as this backend wants it: recurrences whole, so that their time axis stays symbolic, and strides free.

Besides an operator's own kernels (see whole_recurrences) the shapes of a symbolic recurrence come from torch's table of decompositions,
which unrolls it and so fixes the number of steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.export import ExportedProgram

from rewriter.backends.files.recurrent import whole_recurrences
from rewriter.backends.fx.constants import bodies

_RECURRENCES = [torch.ops.aten.lstm.input, torch.ops.aten.gru.input, torch.ops.aten.rnn_tanh.input, torch.ops.aten.rnn_relu.input]


def decomposed(program: ExportedProgram, table: Mapping[Any, Callable[..., Any]]) -> ExportedProgram:
    """A functional program in training-level aten, no_grad and autocast regions flattened, the operators of `table` spelled out."""
    with symbolic_recurrences(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch copies its own tree specifications in a way that it deprecated
        return free_strides(program.run_decompositions(dict(table)))


@contextmanager
def symbolic_recurrences() -> Iterator[None]:
    """whole_recurrences, for sizes that are symbols as well."""
    with whole_recurrences():
        before = {op: decomposition_table[op] for op in _RECURRENCES if op in decomposition_table}
        try:
            for op in before:
                decomposition_table[op] = next(iter(op.py_kernels.values()))
            yield
        finally:
            for op, rule in before.items():
                decomposition_table[op] = rule


def free_strides(program: ExportedProgram) -> ExportedProgram:
    """Views become reshapes: tracing wrote `view` because its examples were contiguous, which inputs need not be."""
    for body in bodies(program):
        for node in body.module.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default
        body.module.recompile()
    return program


def settle_attention(program: ExportedProgram) -> None:
    """Copy attention's result into plain order: a later decomposition lays it out another way than its readers were traced with.

    The copy is an identity in ONNX; without it the exporter fails on models that pass a position bias as the mask (T5).
    """
    for body in bodies(program):
        graph = body.module.graph
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
            with graph.inserting_after(node):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
            copy.meta = dict(node.meta)
            node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
        body.module.recompile()


def copy_inputs_that_leave(program: ExportedProgram) -> None:
    """An output that is an input becomes a copy of it: the ONNX exporter would rename the input."""
    graph, signature = program.graph, program.graph_signature
    output = graph.output_node()
    results = list(output.args[0])
    for i, (value, spec) in enumerate(zip(results, signature.output_specs, strict=True)):
        if isinstance(value, torch.fx.Node) and value.op == "placeholder":
            with graph.inserting_before(output):
                results[i] = graph.call_function(torch.ops.aten.clone.default, (value,))
            results[i].meta = dict(value.meta)
            spec.arg.name = results[i].name
    output.args = (tuple(results),)
    program.graph_module.recompile()
