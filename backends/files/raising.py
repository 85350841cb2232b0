"""Known recurrences become one `structured::map` node each while a module is exported, and everything is put back afterwards.

Their torch bodies loop over chunks or tokens in Python, so an export keeps the example's number of them: it runs at other lengths and is
silently wrong there, because exporters drop the guards that would say so. The node has no length. A function is known by its name and
trusted by its values: where it is called, it is compared with the oracle at four lengths, from zero and from a state, before it is raised.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from rewriter.backends.eager import EagerOps
from rewriter.backends.files.archive import one_line
from rewriter.backends.files.known_recurrences import CHUNK, KNOWN, LISTED, SPELLINGS, Known
from rewriter.backends.fx.custom_op import MAP
from rewriter.operator import AbstractMap, AbstractOperator, flatten
from rewriter.registry import load_structures
from rewriter.tolerances import EQUAL

BATCH = 2
Arguments = dict[str, Any]


class Raising:
    """What was found in one module: the verdict on each function at each signature, and the notes that say so."""

    def __init__(self) -> None:
        self.refused: dict[tuple[object, ...], str] = {}  # signature -> why not, "" where it is raised
        self.lengths: dict[str, tuple[int, ...]] = {}
        self.listed: dict[str, str] = {}

    def stand_in(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """The function as it is called during the export."""
        known = KNOWN[name]

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = _named(original, args, kwargs)
            key = (name, original, *((k, _described(v)) for k, v in given.items()))
            if key not in self.refused:
                with _disable_current_modes(), torch._C.DisableTorchFunction():  # real tensors, on the path that an export takes
                    self.refused[key] = _difference(known, original, given)
            self.lengths[name] = _lengths(given)
            if self.refused[key]:
                return original(*args, **kwargs)
            return _read(known, functools.partial(_node, name), given)

        return call

    def notes(self, program: ExportedProgram) -> list[str]:
        """What was raised, what was not, and what an export would have made of it; names the nodes by the modules that they stand in."""
        counts: Counter[str] = Counter()
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, GraphModule) else ():
                if node.target is MAP and node.args[3] in self.lengths:
                    counts[str(node.args[3])] += 1
                    path = [where for where, _ in (node.meta.get("nn_module_stack") or {}).values()]
                    node.args = (*node.args[:3], path[-1].removeprefix("L['self'].") if path and path[-1] else node.args[3])
        found = []
        for name, count in counts.items():
            at = ", ".join(map(str, self.lengths[name]))
            calls = f"{count} call{'s' * (count > 1)} of {name} raised to one node{' each' * (count > 1)}"
            found.append(f"{calls}, equal to the function at {at} tokens; exported as it is, {KNOWN[name].alone}")
        return found + self.left()

    def left(self) -> list[str]:
        """What was found and not raised."""
        refused = dict.fromkeys((str(name), why) for (name, *_), why in self.refused.items() if why)
        found = [f"{name} is not raised: {why}; exported as it is, {KNOWN[name].alone}" for name, why in refused]
        return [*found, *(f"{name} is not raised: {why}" for name, why in self.listed.items())]


@contextmanager
def raised(module: torch.nn.Module) -> Iterator[Raising]:
    """The known functions that the module's classes see are replaced, by name, wherever they are bound: globals, methods, attributes."""
    raising, before = Raising(), []
    for owner in _owners(module):
        for bound, value in list(vars(owner).items()):
            name = bound if bound in KNOWN or bound in LISTED else getattr(value, "__name__", "")
            if name in LISTED:
                raising.listed[name] = LISTED[name]
            elif name in KNOWN and callable(value) and not isinstance(value, type):
                before.append((owner, bound, value))
    try:
        for owner, bound, value in before:
            setattr(owner, bound, raising.stand_in(bound if bound in KNOWN else value.__name__, value))
        yield raising
    finally:
        for owner, bound, value in before:
            setattr(owner, bound, value)


def _owners(module: torch.nn.Module) -> list[Any]:
    """The module's parts, their classes, and the Python modules that these were written in."""
    parts = list(module.modules())
    kinds = list(dict.fromkeys(kind for part in parts for kind in type(part).__mro__))
    sources = dict.fromkeys(sys.modules.get(kind.__module__) for kind in kinds if not kind.__module__.startswith(("torch.", "builtins")))
    return [*parts, *(kind for kind in kinds if kind is not object), *(source for source in sources if source is not None)]


def _named(original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments by their names in the function's own signature."""
    signature = inspect.signature(original)
    given = signature.bind(*args, **kwargs).arguments
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given


def _read(known: Known, recur: Any, given: Arguments) -> Any:
    return known.reading(recur, **{SPELLINGS.get(name, name): value for name, value in given.items() if name != "self"})


def _described(value: Any) -> object:
    """What the verdict depends on: not the sizes that vary."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(n if isinstance(n, int) else None for n in value.shape)
    return value if isinstance(value, bool | int | float | str) else type(value).__name__


def _lengths(given: Arguments) -> tuple[int, ...]:
    chunk = given.get("chunk_size") or CHUNK
    return tuple(sorted({1, max(chunk - 1, 2), chunk, 3 * chunk + 8}))


def _operator(kind: str, fields: Mapping[str, Any], state: Tensor | None) -> AbstractMap:
    load_structures()
    named: Any = AbstractOperator.kinds[kind]
    operator: AbstractMap = named(**fields, carried=state is not None)
    return operator


def _spelled(which: int, kind: str, fields: Mapping[str, Any], xs: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
    """In the first form, which is the oracle, or in the last, which is the fast one."""
    operator = _operator(kind, fields, state)
    out, last = operator.spelled(operator.forms()[which], EagerOps(), *xs, *([] if state is None else [state.float()]))
    return out, last


def _node(name: str, kind: str, fields: Mapping[str, Any], xs: Sequence[Tensor], state: Tensor | None) -> tuple[Tensor, Tensor]:
    spec = flatten(_operator(kind, fields, state))[1]
    out, last = MAP([*xs, *([] if state is None else [state.float()])], [], spec, name)
    return out, last


def _difference(known: Known, original: Callable[..., Any], given: Arguments) -> str:
    """Where the function and its reading part, or what of the call is not read; "" where they agree."""
    read = inspect.signature(known.reading).parameters
    for name, value in given.items():
        plain = value is None or isinstance(value, bool | int | float | str | torch.dtype)
        if SPELLINGS.get(name, name) not in read and name != "self" and not plain:
            return f"its argument {name!r} is not read"
    try:
        takes = inspect.signature(original).parameters
        for length in _lengths(given):
            arguments = _real(known, given, length) | ({known.last: True} if known.last in takes else {})
            last = _compared(known, original, arguments, f"{length} tokens")
            if known.state in takes:
                arguments[known.state] = draw(last.shape, last.dtype, "normal", torch.Generator().manual_seed(length))
                _compared(known, original, arguments, f"{length} tokens from a state")
    except _Apart as apart:
        return str(apart)
    except Exception as problem:
        return f"it could not be compared with the oracle ({one_line(problem)})"
    return ""


class _Apart(Exception):
    """The function differs from its reading."""


def _compared(known: Known, original: Callable[..., Any], arguments: Arguments, where: str) -> Tensor:
    """The last state (or the output, of a function that gives no other); _Apart where a result of the function is not the reading's."""
    rtol, atol = max(EQUAL[x.dtype] for x in arguments.values() if isinstance(x, Tensor) and x.dtype in EQUAL)
    expected = _results(original(**arguments))
    for form in (0, -1):
        for a, b in zip(expected, _results(_read(known, functools.partial(_spelled, form), arguments)), strict=True):
            if a.dtype != b.dtype or a.shape != b.shape:
                raise _Apart(f"it gives {a.dtype} {list(a.shape)} where the recurrence gives {b.dtype} {list(b.shape)}, at {where}")
            if not torch.allclose(b.double(), a.double(), rtol, atol * max(1.0, float(a.abs().max()))):  # sums of hundreds of tokens cancel
                apart = float((a.double() - b.double()).norm() / a.double().norm())
                raise _Apart(f"its result differs from the recurrence by {apart:.2g} at {where}")
    return expected[-1]


def _results(given: Any) -> tuple[Tensor, ...]:
    return (given,) if isinstance(given, Tensor) else tuple(given)


def _real(known: Known, given: Arguments, length: int) -> Arguments:
    """Arguments of this length in place of the call's, which are traced."""
    generator, found = torch.Generator().manual_seed(length), {}
    for name, value in given.items():
        found[name] = value
        if isinstance(value, Tensor):
            spelled, shape = SPELLINGS.get(name, name), [n if isinstance(n, int) else BATCH for n in value.shape]
            if spelled in known.axes:
                rows = given.get("num_householder", 1) if spelled in ("key", "value", "beta") else 1
                shape[known.axes[spelled]] = length * rows
            found[name] = draw(shape, value.dtype, known.laws.get(spelled, "normal"), generator)
    return found


def draw(shape: Sequence[int], dtype: torch.dtype, law: str, generator: torch.Generator) -> Tensor:
    """Seeded values such as models have: normal, unit rows, a gate in (0, 1), a step above 0, a decay below 0; of bools few are true."""
    x = torch.randn(*shape, generator=generator)
    if dtype == torch.bool:
        return x > 1
    ways = {"normal": x, "unit": F.normalize(x, dim=-1), "gate": x.sigmoid(), "step": F.softplus(x), "decay": -F.softplus(x)}
    return ways[law].to(dtype)
