"""Runs a program node by node, handing tapped values to their callbacks, inside cond branches as well.

Values are freed after their last use. Sites are computed in plain aten, which gradients go through.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Graph, GraphModule, Interpreter, Node

from rewriter.backends.fx.custom_op import MAP, SITE, body, map_body
from rewriter.errors import RewriteError
from rewriter.order import in_order

Taps = Mapping[Node, Callable[[Tensor], None]]
Swaps = Mapping[Node, Callable[[Tensor], Tensor]]
PLAIN: dict[Any, Callable[..., Any]] = {SITE: body, MAP: map_body}


class Tapped(Interpreter):
    """An interpreter that shows tapped values as they are computed, and runs swapped nodes another way (from their first operand). What
    was replaced and waits for a restore is not computed: it may not even fit what is there now."""

    def __init__(self, module: GraphModule, taps: Taps, swaps: Swaps) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.extra_traceback = False  # errors are ours to say
        self.taps, self.swaps = taps, swaps
        self.idle = _idle(module.graph, taps)

    def run_node(self, n: Node) -> Any:
        if n in self.idle:
            return None
        value = self.swaps[n](self.env[n.args[0]]) if n in self.swaps else super().run_node(n)  # type: ignore[index]
        if n in self.taps:
            self.taps[n](value)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator) and str(target) == "cond":
            predicate, yes, no, given = args
            return Tapped(yes if bool(predicate) else no, self.taps, self.swaps).run(*given)
        return PLAIN[target](*args) if target in PLAIN else super().call_function(target, args, kwargs)


def _idle(graph: Graph, taps: Taps) -> set[Node]:
    """Calls that nothing needs, nor what is said of their types."""
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        says = node.target is torch.ops.aten._assert_tensor_metadata.default
        if node.op != "call_function" or node in needed or node in taps or (node.is_impure(impure_random=False) and not says):
            needed.update([node, *node.all_input_nodes])
    return {node for node in graph.nodes if node not in needed}


def run(
    program: ExportedProgram, feeds: Mapping[str, Tensor], taps: Taps, swaps: Swaps | None = None, trained: Collection[str] | None = None
) -> list[Tensor]:
    """The user outputs for named inputs. `trained`: names of the stored tensors that gradients go to; None records nothing."""
    with torch.set_grad_enabled(trained is not None):
        values = Tapped(program.graph_module, taps, swaps or {}).run(*_arguments(program, feeds, trained))
    specs = program.graph_signature.output_specs
    return [v for s, v in zip(specs, values, strict=True) if s.kind is OutputKind.USER_OUTPUT]


def part(
    program: ExportedProgram,
    feeds: Mapping[str, Tensor],
    given: Mapping[Node, Tensor],
    wanted: Sequence[Node],
    trained: Collection[str] | None,
) -> list[Tensor]:
    """Some values of the main body; those that are given are taken as they are, and nothing that only they need is computed."""
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    interpreter = Tapped(program.graph_module, {}, {})
    interpreter.idle = set()  # nothing is computed but what is wanted
    interpreter.env = {**dict(zip(placeholders, _arguments(program, feeds, trained), strict=True)), **given}
    with torch.set_grad_enabled(trained is not None):
        for value in wanted:
            for node in in_order(value, lambda n: n.all_input_nodes, interpreter.env):
                interpreter.env[node] = interpreter.run_node(node)
    return [interpreter.env[value] for value in wanted]


def _arguments(program: ExportedProgram, feeds: Mapping[str, Tensor], trained: Collection[str] | None) -> list[Any]:
    """What the program's placeholders stand for, in order."""
    arguments: list[Any] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            name = str(spec.target)
            stored = program.state_dict[name] if name in program.state_dict else program.constants[name]
            arguments.append(stored.detach() if isinstance(stored, Tensor) and name not in (trained or ()) else stored)
        elif isinstance(spec.arg, ConstantArgument):
            arguments.append(spec.arg.value)
        elif spec.arg.name in feeds:
            arguments.append(feeds[spec.arg.name])
        else:
            raise RewriteError(f"input '{spec.arg.name}' is missing; the model takes {list(program.graph_signature.user_inputs)}")
    return arguments
