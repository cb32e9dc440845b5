"""Largest magnitudes, for recipes that take the scale from the tensor at hand. M rows, N columns.

    tensor  = max_mn |x|      rows[m] = max_n |x[m, n]|      columns[n] = max_m |x[m, n]|

One read gives any of the three: a per-row operand is quantized along its rows for one GEMM and along its
columns for another. A maximum over bit patterns is exact in any order, and keeps an infinity, and a NaN above
it (an fp32 maximum on a GPU would drop the NaN). An empty maximum is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.launch import EXACT, cdiv, device_guard

__all__ = ["Amax", "amax", "amax_kernel", "amax_reference"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Amax(NamedTuple):
    """fp32, in units of x. What was asked for, and None for what was not."""

    tensor: Tensor | None  # 0-d
    rows: Tensor | None  # [M, 1]
    columns: Tensor | None  # [1, N]


def amax_reference(x: Tensor) -> Amax:
    """Plain torch, every output. The padding makes empty maxima 0."""
    padded = torch.nn.functional.pad(x.float().abs(), (0, 1, 0, 1))
    return Amax(padded.amax(), padded.amax(1, keepdim=True)[:-1], padded.amax(0, keepdim=True)[:, :-1])


@triton.jit
def amax_kernel(
    x_ptr,  # [M, N], any strides; fast with stride_xn == 1
    tensor_ptr,  # int32 bit patterns of fp32, zero to begin with; each may be None
    rows_ptr,
    columns_ptr,
    M,
    N,
    stride_xm,
    stride_xn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    rm = (pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    offsets = rm.to(tl.int64)[:, None] * stride_xm + rn.to(tl.int64)[None, :] * stride_xn
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    pattern = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if rows_ptr is not None:
        tl.atomic_max(rows_ptr + rm, tl.max(pattern, axis=1), mask=rm < M, sem="relaxed")
    if columns_ptr is not None:
        tl.atomic_max(columns_ptr + rn, tl.max(pattern, axis=0), mask=rn < N, sem="relaxed")
    if tensor_ptr is not None:
        tl.atomic_max(tensor_ptr, tl.max(tl.max(pattern, axis=1), axis=0), sem="relaxed")


def amax(x: Tensor, *, tensor: bool = False, rows: bool = False, columns: bool = False) -> Amax:
    """x (fp32, bf16, fp16) [M, N], any strides -> the maxima that are asked for. Errors: `KernelError`."""
    if x.ndim != 2 or x.dtype not in FLOATS:
        raise KernelError(
            f"amax: x is {x.dtype} of shape {list(x.shape)}; allowed: a matrix of "
            f"{', '.join(map(str, FLOATS))}. Flatten the leading axes."
        )
    if x.stride(0) == 1 and x.stride(1) != 1:
        found = amax(x.t(), tensor=tensor, rows=columns, columns=rows)  # reads with unit stride
        return Amax(
            found.tensor,
            None if found.columns is None else found.columns.t(),
            None if found.rows is None else found.rows.t(),
        )
    m, n = x.shape
    found = Amax(
        x.new_zeros((), dtype=torch.float32) if tensor else None,
        x.new_zeros((m, 1), dtype=torch.float32) if rows else None,
        x.new_zeros((1, n), dtype=torch.float32) if columns else None,
    )
    if m == 0 or n == 0:
        return found
    config = tuning.tile_config(m, n)
    patterns = [None if values is None else values.view(torch.int32) for values in found]
    with device_guard(x):
        amax_kernel[(cdiv(m, config.block_m) * cdiv(n, config.block_n),)](
            x,
            *patterns,
            m,
            n,
            x.stride(0),
            x.stride(1),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.num_warps,
            **EXACT,
        )
    return found
