"""structured::triton_chain(x, factors, spec, outputs) and structured::triton_recur(inputs, factors, spec) for torch: a rewritten program as
a module for inference on a CUDA device, its covered layers in Triton.

Both have fake forms, so that such a module can be compiled (torch.compile) and captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from rewriter.backends.fx.custom_op import LIBRARY, fake_map, map_body
from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.kernels.plan import NotCovered, Plan
from rewriter.backends.kernels.recurrences import Sizes
from rewriter.backends.kernels.torch_op import Store, cover_sites, lowered
from rewriter.backends.triton_kernels import chain, delta
from rewriter.backends.triton_kernels.device import ready
from rewriter.operator import skeleton

LIBRARY.define("triton_chain(Tensor x, Tensor[] factors, str spec, int outputs) -> Tensor")


def _chain(x: Tensor, factors: Sequence[Tensor], spec: str, outputs: int) -> Tensor:
    return chain.run(chain.unflatten(factors, spec), x)


def _fake_chain(x: Tensor, factors: Sequence[Tensor], spec: str, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


LIBRARY.define("triton_recur(Tensor[] inputs, Tensor[] factors, str spec) -> Tensor[]")


def _recur(inputs: Sequence[Tensor], factors: Sequence[Tensor], spec: str) -> list[Tensor]:
    batch, time = _fake_recur(inputs, factors, spec)[0].shape[:2]  # what stands for the whole batch, or for all tokens, is repeated
    whole = [x.expand(batch, time, -1) if x.dim() == 3 else x.expand(batch, *[-1] * (x.dim() - 1)) for x in inputs]
    return delta.run(_sizes(spec), [*whole, *factors])


def _fake_recur(inputs: Sequence[Tensor], factors: Sequence[Tensor], spec: str) -> list[Tensor]:
    return fake_map(inputs, factors, spec, "")


@functools.cache
def _sizes(spec: str) -> Sizes:
    return delta.covered(skeleton(spec)[0])


LIBRARY.impl("triton_chain", _chain, "CompositeExplicitAutograd")
LIBRARY.impl("triton_recur", _recur, "CompositeExplicitAutograd")
torch.library.register_fake("structured::triton_chain", _fake_chain, lib=LIBRARY)
torch.library.register_fake("structured::triton_recur", _fake_recur, lib=LIBRARY)
CHAIN = torch.ops.structured.triton_chain.default
RECUR = torch.ops.structured.triton_recur.default


def _map(inputs: Sequence[Tensor], factors: Sequence[Tensor], spec: str, name: str) -> list[Tensor]:
    """By the kernels where they take it."""
    try:
        _sizes(spec)
    except NotCovered:
        return map_body(inputs, factors, spec, name)
    if {x.dtype for x in (*inputs, *factors)} not in [{dtype} for dtype in chain.DTYPES]:
        return map_body(inputs, factors, spec, name)
    return list(RECUR(inputs, factors, spec))


def with_kernels(graph: FxGraph, device: str) -> nn.Module:
    """The program as a module on that device, called as ever; RewriteError where no kernel runs there. Other layers run in plain aten."""
    place = ready(device)

    def flat(steps: Plan, dtype: torch.dtype, store: Store) -> tuple[Any, tuple[Any, ...]]:
        factors, spec = chain.flatten(steps)
        if {dtype, *(f.dtype for f in factors if f.is_floating_point())} - {*chain.DTYPES}:
            raise NotCovered("numbers of 64 bits have no kernel for a GPU")
        return CHAIN, ([store(factor) for factor in factors], spec, steps.outputs)

    module = lowered(graph, _map)
    cover_sites(module, flat)
    move(module, place)
    return module


def move(module: GraphModule, device: torch.device) -> None:
    """Its tensors and the tensors that it makes; those of the program that it came from stay where they are."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():  # all of them: the named ones are without what is there twice
            if parameter is not None:
                inner._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)
        for name, buffer in inner._buffers.items():
            inner._buffers[name] = None if buffer is None else buffer.to(device)
        if isinstance(inner, GraphModule):
            for node in inner.graph.nodes:
                node.kwargs = {key: device if isinstance(value, torch.device) else value for key, value in node.kwargs.items()}
                node.args = tuple(device if isinstance(arg, torch.device) else arg for arg in node.args)
            inner.recompile()
