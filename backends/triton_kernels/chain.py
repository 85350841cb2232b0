"""A plan on a device: each product a launch, each copy one, rare endings in plain torch.

A plan travels as its tensors and the rest as text, so that an operator of torch can take it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.backends.kernels.naive import finished
from rewriter.backends.kernels.plan import SCRATCH, Copy, Ending, Finish, NotCovered, Plan, Product, X, Y
from rewriter.backends.triton_kernels.device import OPTIONS, chosen, interpreted, kernels
from rewriter.backends.triton_kernels.tuning import INTERPRETED, Tiles, about, choices, fastest
from rewriter.errors import RewriteError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUP = 8  # tiles of rows that go through the columns together
BLOCK = 256  # of what is done entry by entry
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Plan, Product, Copy, Finish, Ending)}


def flatten(of: Plan) -> tuple[list[Tensor], str]:
    """Its tensors and a text for `unflatten`; NotCovered for what the kernels have no step for."""
    if any(isinstance(step, Finish) and step.ending.whole_rows for step in of.steps):
        raise NotCovered("sums and norms behind a product have no kernel for a GPU")
    if any(isinstance(step, Product) and step.pattern is not None for step in of.steps):
        raise NotCovered("N:M sparse weights have no kernel for a GPU")
    if any(isinstance(step, Product) and step.bits != 8 for step in of.steps):
        raise NotCovered("weights of 4 bits have no kernel for a GPU")
    tensors: list[Tensor] = []
    return tensors, json.dumps(_said(of, tensors))


def _said(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.contiguous())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, tuple):
        return [_said(one, tensors) for one in value]
    if dataclasses.is_dataclass(value):
        fields = {f.name: _said(getattr(value, f.name), tensors) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    return value


def unflatten(tensors: Sequence[Tensor], spec: str) -> Plan:
    """The plan again, with these tensors."""
    made = _made(_read(spec), tensors)
    assert isinstance(made, Plan)
    return made


_read = functools.cache(json.loads)


def _made(said: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(said, list):
        return tuple(_made(one, tensors) for one in said)
    if not isinstance(said, dict):
        return said
    if "tensor" in said:
        return tensors[said["tensor"]]
    return _KINDS[said["kind"]](**{name: _made(value, tensors) for name, value in said.items() if name != "kind"})


def run(plan: Plan, x: Tensor, out: Tensor | None = None) -> Tensor:
    """(..., inputs) -> (..., outputs), into `out` (rows, outputs) where that is given; the plan's tensors are where x is."""
    if x.dim() == 0 or x.shape[-1] != plan.inputs or x.dtype not in DTYPES:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise RewriteError(f"the input is {list(x.shape)} {x.dtype}; this chain takes {plan.inputs} numbers, each {dtypes}")
    rows = x.reshape(-1, plan.inputs)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    areas = {X: rows, Y: rows.new_empty(len(rows), plan.outputs) if out is None else out, SCRATCH: rows.new_empty(len(rows), plan.scratch)}
    with chosen(x):
        for step in plan.steps if len(rows) else ():
            if isinstance(step, Product):
                _product(step, areas)
            elif isinstance(step, Copy):
                _copy(step, areas)
            else:
                areas[Y].copy_(finished(step.ending, areas[Y]))
    return areas[Y].unflatten(0, x.shape[:-1]) if x.dim() > 1 else areas[Y][0]


def _copy(step: Copy, areas: dict[int, Tensor]) -> None:
    x, y, count = areas[step.source], areas[step.target], len(step.pairs)
    grid = (len(x), -(-count // BLOCK))
    kernels("chain_kernels").copied[grid](x, y, step.pairs, count, x.stride(0), y.stride(0), BLOCK=BLOCK, **OPTIONS)


def _product(step: Product, areas: dict[int, Tensor], given: Tiles | None = None) -> None:
    """`given`: other tiles than the fastest."""
    x = areas[step.source]
    k, q, p = step.weight.shape
    launch = functools.partial(_launch, step, x, areas[step.target])
    among = [given] if given else INTERPRETED if interpreted() else choices(len(x), q, p)
    key = (x.device, x.dtype, step.weight.dtype, about(len(x)), k, q, p, step.run, step.jump, step.step)
    launch(fastest(key, among, launch))


def _launch(step: Product, x: Tensor, y: Tensor, tiles: Tiles) -> None:
    module, (k, q, p) = kernels("chain_kernels"), step.weight.shape
    scale, bias, activation = step.scale, step.ending.bias, step.ending.activation
    parts = x.new_empty(tiles.split, len(x), k * p, dtype=torch.float32) if tiles.split > 1 else None
    grid = (-(-len(x) // tiles.rows) * -(-p // tiles.columns), k, tiles.split)
    module.product[grid](
        x, step.weight, scale, bias, y, parts, len(x), x.stride(0), y.stride(0), step.at, step.first, step.block, step.run, step.jump,
        step.step, q, p, step.valid, step.width, ONE_RUN=step.run >= q, ACTIVATION=activation, INTERPRETED=interpreted(),
        BLOCK_T=tiles.rows, BLOCK_Q=tiles.reduced, BLOCK_P=tiles.columns, GROUP=GROUP, SPLIT=tiles.split,
        num_warps=tiles.warps, num_stages=tiles.stages, **OPTIONS,
    )  # fmt: skip
    if parts is not None:
        module.collected[(len(x), -(-step.width // BLOCK))](
            parts, scale, bias, y, len(x), k * p, y.stride(0), step.at, step.width,
            ACTIVATION=activation, SPLIT=tiles.split, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
