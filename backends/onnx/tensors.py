"""torch on one side, ONNX on the other: dtypes and tensors, shared where the layout allows."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype, to_torch_dtype
from torch import Tensor

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def torch_dtype(dtype: ir.DataType | None) -> torch.dtype | None:
    """None for what torch does not have."""
    try:
        return None if dtype is None else to_torch_dtype(dtype)
    except (TypeError, ValueError):
        return None


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """TypeError for what ONNX does not have."""
    return from_torch_dtype(dtype)


def from_torch(tensor: Tensor, name: str) -> ir.TensorProtocol:
    """The tensor as an initialiser holds it; the storage is shared."""
    return TorchTensor(tensor.detach().cpu().contiguous(), name=name)


def to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """Memory-mapped weights stay mapped; nobody may write to the result."""
    if isinstance(tensor, TorchTensor):
        raw: Tensor = tensor.raw
        return raw
    return array_to_torch(tensor.numpy())


def array_to_torch(array: np.ndarray[Any, Any]) -> Tensor:
    """Including the float types that numpy only has through ml_dtypes."""
    array = np.asarray(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        if array.dtype.kind != "V" and array.dtype.type.__module__ != "ml_dtypes":
            return torch.from_numpy(array if all(stride >= 0 for stride in array.strides) else np.ascontiguousarray(array))
        dtype = to_torch_dtype(ir.DataType.from_numpy(array.dtype))
        words = torch.from_numpy(np.ascontiguousarray(array).view(f"i{array.itemsize}" if array.itemsize > 1 else "u1"))
        return words.view(dtype)
