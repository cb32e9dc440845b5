"""A block-diagonal Hadamard transform along one axis: what spreads outliers before few-bit codes are made.

    H_1 = [1],  H_2k = [[H_k, H_k], [H_k, -H_k]] / sqrt(2)
    y   = x with each run of `block` elements along `axis` multiplied by H_block

H is symmetric and its own inverse, so where both operands of a GEMM are transformed along the axis that it sums over, the product
is that of the operands themselves: (X H)(H W^T) = X W^T. Codes are made in between, of tensors whose largest elements are smaller.

From arXiv 2306.11987 (Training Transformers with 4-bit Integers): the transform along the summed axis, blocks of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.ops._checks import FLOATS, check_dtype
from qcompile.ops._library import define

__all__ = ["hadamard", "hadamard_reference"]


def hadamard_reference(x: Tensor, axis: int, block: int) -> Tensor:
    """`qtrain::hadamard` in aten, unchecked. Signs are exact in any dtype, so the only roundings are those of the sums."""
    dtype = torch.float32 if x.dtype is torch.float16 else x.dtype  # sums of fp16 could overflow
    runs, signs = x.to(dtype), _signs(block, x.device, dtype)
    if axis % x.ndim == x.ndim - 1:
        runs = runs.reshape(-1, block) @ signs
    else:
        before, after = x.shape[: axis % x.ndim], x.shape[axis % x.ndim + 1 :]
        runs = signs @ runs.reshape(*before, -1, block, after.numel())
    return runs.reshape(x.shape) * block**-0.5


def _signs(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """+-1 where the number of common ones in the binary row and column is even or odd (Sylvester)."""
    index = torch.arange(block, device=device)
    common = index[:, None] & index[None, :]
    for shift in (16, 8, 4, 2, 1):  # the parity of all bits, folded into the lowest
        common = common ^ (common >> shift)
    return (1 - 2 * (common & 1)).to(dtype)


def _hadamard(x: Tensor, axis: int, block: int) -> Tensor:
    check_dtype("hadamard", "x", x, *FLOATS)
    if block < 2 or block & (block - 1):
        raise ValueError(f"hadamard: block is {block}; allowed: a power of two from 2.")
    if not -x.ndim <= axis < x.ndim or x.shape[axis] % block:
        raise KernelError(f"hadamard: axis {axis} of {list(x.shape)}; allowed: one whose size {block} divides.")
    return hadamard_reference(x, axis, block)


hadamard = define("hadamard(Tensor x, int axis, int block) -> Tensor", _hadamard, fake=_hadamard)
"""x (fp32, bf16, fp16, fp64; any shape and strides) -> its transform, of the same shape and dtype (fp32 for fp16).

    axis   whose runs of `block` elements are transformed; `block` divides its size
    block  a power of two from 2

Errors: `KernelError`; `ValueError` for the block.
"""
