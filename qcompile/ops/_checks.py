"""Checks that the operators share: dtypes and number of axes always, sizes where they are plain numbers.

They run once per call, in the kernels and in the fakes. Symbolic sizes are not looked at: comparing them
would put guards into the caller's graph, and the real call checks them anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile._sizes import same_size
from qcompile.errors import KernelError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(op: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Refuse a tensor of a dtype that is not in `allowed`."""
    if tensor.dtype not in allowed:
        raise KernelError(
            f"{op}: {name} is {tensor.dtype}; allowed: {', '.join(map(str, allowed))}. Convert it first."
        )


def check_shared(op: str, name: str, tensor: Tensor, shape: torch.Size | tuple[int, ...]) -> None:
    """Refuse what is neither 0-d nor has `len(shape)` axes, each of size 1 or of its size in `shape`."""
    if tensor.ndim == 0:
        return
    fits = tensor.ndim == len(shape) and all(
        same_size(size, 1) or same_size(size, full) for size, full in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise KernelError(
            f"{op}: {name} has shape {list(tensor.shape)}; allowed: 0-d, or {len(shape)} axes with sizes 1 "
            f"where it is shared and otherwise those of {list(shape)}. Keep the reduced axes (keepdim=True)."
        )


def check_matrix(op: str, name: str, tensor: Tensor) -> None:
    """Refuse anything but an int8 matrix."""
    check_dtype(op, name, tensor, torch.int8)
    if tensor.ndim != 2:
        raise KernelError(
            f"{op}: {name} has shape {list(tensor.shape)}; a matrix is needed. Flatten the leading axes."
        )
