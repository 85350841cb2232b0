"""What the dense model says: its outputs and its state after every block, kept on disk, so that no step runs it again.

Rows that are padding are left out. States are stored in float16 where its range and its three digits do, which halves what is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from rewriter.calibrate import Feeds, padding_mask, unpadded
from rewriter.graph import Graph, Value

SMALLEST, LARGEST = 2.0**-4, 2.0**15  # the largest number of what is stored in float16, which has three digits of a thousandth of it


def states(graph: Graph, cuts: Sequence[Value], feeds: Feeds, grad: bool = False) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """(states, outputs) on a batch.

    States by name: the value of every cut, "0", "1", …, the float outputs, ":name", and their means over each sample's rows, ":name mean";
    real rows only.
    """
    mask, found = padding_mask(feeds), dict[str, Tensor]()

    def keep(name: str, value: Tensor) -> None:
        if value.is_floating_point():
            found[name] = unpadded(value, mask)

    taps = {value: (lambda tensor, i=i: keep(str(i), tensor)) for i, value in enumerate(cuts)}
    outputs = graph.run(feeds, taps, grad)
    for name, value in outputs.items():
        keep(f":{name}", value)
        if value.is_floating_point() and value.dim() > 2:
            found[f":{name} mean"] = _means(value, mask)
    return found, outputs


def _means(value: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, n) of (batch, ..., n): over the real positions, which is what is pooled."""
    if mask is None or value.shape[:2] != mask.shape:
        return value.flatten(1, -2).mean(1)
    real = mask.to(value.dtype)[:, :, *[None] * (value.dim() - 2)]
    return ((value * real).sum(1) / real.sum(1)).flatten(1)


class Targets:
    """The dense model's states, one file for each batch in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, index: int, found: Mapping[str, Tensor]) -> None:
        """Store a batch's states."""
        save_file({name: _narrow(tensor) for name, tensor in found.items()}, self._path(index))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor.float() for name, tensor in load_file(self._path(index)).items()}

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.safetensors"


def _narrow(tensor: Tensor) -> Tensor:
    fits = SMALLEST < float(tensor.abs().max()) < LARGEST if tensor.numel() else True
    return (tensor.half() if fits else tensor.float()).contiguous()
