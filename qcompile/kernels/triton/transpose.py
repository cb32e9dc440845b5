"""A transposed copy of a matrix of codes, for operands that no quantize transposed: out[n, m] = codes[m,
n]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.kernel_call import kernel_call
from qcompile.kernels.triton.launch import cdiv
from qcompile.ops.transpose import transpose_codes_reference

__all__ = ["prepare", "transpose", "transpose_kernel"]


@triton.jit
def transpose_kernel(
    codes_ptr,  # int8 [M, N], any strides; fast with stride_cn == 1
    out_ptr,  # int8 [N, M], rows stride_o apart
    M,
    N,
    stride_cm,
    stride_cn,
    stride_o,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    rm = (pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = rm.to(tl.int64), rn.to(tl.int64)
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    codes = tl.load(codes_ptr + row[:, None] * stride_cm + column[None, :] * stride_cn, mask=mask, other=0)
    mask_t = (rn < N)[:, None] & (rm < M)[None, :]
    tl.store(out_ptr + column[:, None] * stride_o + row[None, :], tl.trans(codes), mask=mask_t)


def transpose(codes: Tensor) -> Tensor:
    """codes int8 [M, N], any strides -> int8 [N, M], contiguous, in memory of its own. Errors: `KernelError`."""
    return prepare(codes)(codes)


def prepare(codes: Tensor) -> Callable[[Tensor], Tensor]:
    """`transpose` as a function of codes that differ from these in their values alone."""
    if codes.ndim != 2 or codes.dtype is not torch.int8:
        raise KernelError(f"transpose: codes is {codes.dtype} of shape {list(codes.shape)}; allowed: an int8 matrix.")
    m, n = codes.shape
    if codes.stride(0) == 1:
        return transpose_codes_reference  # already lies transposed: a plain copy
    config = tuning.tile_config(m, n)
    rest = {
        "M": m,
        "N": n,
        "stride_cm": codes.stride(0),
        "stride_cn": codes.stride(1),
        "stride_o": m,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n),)
    call = kernel_call(transpose_kernel, grid, rest, num_warps=config.num_warps)

    def run(codes: Tensor) -> Tensor:
        out = codes.new_empty((n, m))
        if m and n:
            call(codes, out)
        return out

    return run
