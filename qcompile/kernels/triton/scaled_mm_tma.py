"""INT8 matrix product for compute capability 9.0, read by its tensor memory accelerator (TMA). M rows, N columns, K summed.

The meaning, the operands and the epilogue are those of `scaled_mm`; the loop is another:

- A copy engine fetches tiles by descriptor: one thread asks for one, instead of every thread computing addresses, and what lies
  past the end of a matrix is zero without a mask.
- Programs are persistent: as many as fit on the device, P of them, each taking every P-th tile. `FLATTEN` makes one loop of the
  loop over tiles and that over K, so that the next tile's operands are on their way while this one is written.

A descriptor wants a matrix on a 16-byte boundary, with rows a multiple of 16 bytes apart: `takes` says whether an operand is one.
Descriptors are made on the host, and copied to the device with the launch: nothing is allocated, and a CUDA graph keeps them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.triton.epilogue import finish_tile, tile_of

__all__ = ["ALIGNMENT", "scaled_mm_tma_kernel", "takes"]

ALIGNMENT = 16
"""Bytes (CUDA driver API, cuTensorMapEncodeTiled): of the address and of the strides."""


def takes(codes: Tensor) -> bool:
    """Whether a descriptor can be made for int8 codes with contiguous rows."""
    rows_apart = codes.stride(0) % ALIGNMENT == 0 and codes.stride(0) >= codes.shape[1]  # not one row expanded
    return codes.data_ptr() % ALIGNMENT == 0 and rows_apart and codes.numel() > 0


@triton.jit
def scaled_mm_tma_kernel(
    a_desc,  # int8 [M, K] in blocks of BLOCK_M x BLOCK_K
    b_desc,  # int8 [N, K] in blocks of BLOCK_N x BLOCK_K
    out_ptr,  # from here on as in `scaled_mm_kernel`
    partial_ptr,
    a_scale_ptr,
    b_scale_ptr,
    a_zero_ptr,
    b_zero_ptr,
    a_sum_ptr,
    b_sum_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_o,
    stride_bias_m,
    stride_bias_n,
    A_SCALE: tl.constexpr,
    B_SCALE: tl.constexpr,
    A_ZERO: tl.constexpr,
    B_ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """One program takes every P-th tile of the output."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for step in range(0, steps):
            a = a_desc.load([m * BLOCK_M, step * BLOCK_K])
            b = b_desc.load([n * BLOCK_N, step * BLOCK_K])
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        rm = m * BLOCK_M + tl.arange(0, BLOCK_M)
        rn = n * BLOCK_N + tl.arange(0, BLOCK_N)
        finish_tile(
            acc, rm, rn, M, N, K, out_ptr, stride_o, partial_ptr, a_scale_ptr, b_scale_ptr, a_zero_ptr, b_zero_ptr, a_sum_ptr,
            b_sum_ptr, bias_ptr, stride_bias_m, stride_bias_n, A_SCALE, B_SCALE, A_ZERO, B_ZERO, BIAS,
        )  # fmt: skip
