"""structured::chain(x, packed, outputs) and structured::recur(inputs, factors, spec) for torch: a rewritten program as a module for
inference whose covered layers run in the kernels.

The weights are packed for this CPU, so such a module is made where it runs; it is not for training, nor for a file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from rewriter.backends.fx.custom_op import LIBRARY, MAP, SITE, fake_map, map_body
from rewriter.backends.fx.graph import FxGraph
from rewriter.backends.fx.target import as_module
from rewriter.backends.fx.trace import decomposed
from rewriter.backends.kernels.covering import covers
from rewriter.backends.kernels.library import kernels
from rewriter.backends.kernels.pack import pack
from rewriter.backends.kernels.plan import Ending, NotCovered, Plan, plan
from rewriter.backends.kernels.recurrences import Sizes, sizes_of
from rewriter.backends.kernels.session import trusted
from rewriter.operator import AbstractMatrix, skeleton, unflatten

LIBRARY.define("chain(Tensor x, Tensor packed, int outputs) -> Tensor")


def _run(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    return kernels().run(packed, x, outputs)


def _fake(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


LIBRARY.define("recur(Tensor[] inputs, Tensor[] factors, str spec) -> Tensor[]")


def _recur(inputs: Sequence[Tensor], factors: Sequence[Tensor], spec: str) -> list[Tensor]:
    shapes = [y.shape for y in _fake_recur(inputs, factors, spec)]
    return kernels().recur(_sizes(spec), [*_broadcast(inputs, shapes[0][:2]), *factors], shapes)


def _broadcast(inputs: Sequence[Tensor], leading: Sequence[int]) -> list[Tensor]:
    """What stands for the whole batch, or for all tokens, repeated as the plain form would. Sequences have three axes, states others."""
    batch, time = leading
    return [x.expand(batch, time, -1) if x.dim() == 3 else x.expand(batch, *[-1] * (x.dim() - 1)) for x in inputs]


def _fake_recur(inputs: Sequence[Tensor], factors: Sequence[Tensor], spec: str) -> list[Tensor]:
    return fake_map(inputs, factors, spec, "")


@functools.cache
def _sizes(spec: str) -> Sizes:
    return sizes_of(skeleton(spec)[0])


LIBRARY.impl("recur", _recur, "CPU")
torch.library.register_fake("structured::recur", _fake_recur, lib=LIBRARY)
RECUR = torch.ops.structured.recur.default


def _map(inputs: Sequence[Tensor], factors: Sequence[Tensor], spec: str, name: str) -> list[Tensor]:
    """By the kernel where there is one."""
    if covers(skeleton(spec)[0], kernels()) and all(x.dtype == torch.float32 for x in (*inputs, *factors)):
        return list(RECUR(inputs, factors, spec))
    return map_body(inputs, factors, spec, name)


LIBRARY.impl("chain", _run, "CPU")
torch.library.register_fake("structured::chain", _fake, lib=LIBRARY)
CHAIN = torch.ops.structured.chain.default
_ACTIVATIONS: dict[Any, str] = {
    torch.ops.aten.relu.default: "relu",
    torch.ops.aten.gelu.default: "gelu",
    torch.ops.aten.silu.default: "silu",
}


Store = Callable[[Tensor], Node]  # keeps a tensor in the module
Chain = Callable[[Plan, torch.dtype, Store], tuple[Any, tuple[Any, ...]]]


def with_kernels(graph: FxGraph) -> nn.Module:
    """The program as a module, called as ever; RewriteError where there are no kernels. Uncovered layers run in plain aten."""
    library = trusted()

    def packed(steps: Plan, dtype: torch.dtype, store: Store) -> tuple[Any, tuple[Any, ...]]:
        if dtype != torch.float32:
            raise NotCovered(f"its input is {dtype}; kernels take float32")
        return CHAIN, (store(pack(steps, library.layout)), steps.outputs)

    module = lowered(graph, _map)
    cover_sites(module, packed)
    return module


def lowered(graph: FxGraph, spelled: Callable[..., list[Tensor]]) -> GraphModule:
    """The program for inference, its maps as `spelled`; matrices are still opaque."""
    clean = graph.clone()
    clean.prune()
    module = as_module(decomposed(clean.program, {MAP: spelled}))
    module.requires_grad_(False)
    return module


def cover_sites(module: GraphModule, chain: Chain) -> None:
    """Each matrix with the bias and activation behind it becomes what `chain` makes of its plan: an operator and its arguments after x.

    What that does not take, it raises NotCovered for, and stays.
    """
    for number, node in enumerate(module.graph.find_nodes(op="call_function", target=SITE)):
        _cover(module, node, f"packed_{number}", chain)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()


def _cover(module: GraphModule, node: Node, name: str, chain: Chain) -> None:
    x, factors, spec, _, _ = node.args
    operator = unflatten(str(spec), [_stored(module, factor) for factor in factors])  # type: ignore[union-attr]
    assert isinstance(operator, AbstractMatrix) and isinstance(x, Node)
    end, bias, activation = node, None, ""
    if (found := _bias_after(module, end, operator.shape[0])) is not None:
        bias, end = found
    if (acts := _activation_after(end)) is not None:
        activation, end = acts

    def store(tensor: Tensor) -> Node:
        kept = f"{name}_{sum(key.startswith(name) for key, _ in module.named_buffers(recurse=False))}"
        module.register_buffer(kept, tensor)
        with module.graph.inserting_before(end):
            return module.graph.get_attr(kept)

    try:
        target, arguments = chain(plan(operator, Ending(bias, activation)), x.meta["val"].dtype, store)
    except NotCovered:
        return
    with module.graph.inserting_after(end):
        made = module.graph.call_function(target, (x, *arguments))
        made.meta = dict(end.meta)
    end.replace_all_uses_with(made)


def _stored(module: GraphModule, node: object) -> Tensor:
    assert isinstance(node, Node) and node.op == "get_attr"
    found = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    assert isinstance(found, Tensor)
    return found


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _bias_after(module: GraphModule, node: Node, width: int) -> tuple[Tensor, Node] | None:
    user = _only_user(node)
    if user is None or user.target is not torch.ops.aten.add.Tensor or user.kwargs.get("alpha", 1) != 1:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, Node) or other.op != "get_attr" or tuple(other.meta["val"].shape) != (width,):
        return None
    bias = _stored(module, other)
    return (bias, user) if isinstance(bias, nn.Parameter) else None  # a buffer may change


def _activation_after(node: Node) -> tuple[str, Node] | None:
    user = _only_user(node)
    name = _ACTIVATIONS.get(user.target) if user is not None else None
    if user is None or name is None:
        return None
    return (f"{name}-tanh" if user.kwargs.get("approximate", "none") == "tanh" else name), user
