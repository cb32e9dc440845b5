"""What the INT8 GEMM kernels have in common: the order of the tiles, and what becomes of a tile's integer sum.

    acc   -= b_zero * a_sum + a_zero * (b_sum - K * b_zero)                                  int32, exact
    out    = cast((partial + float32(acc)) * (a_scale * b_scale) + float32(bias))            each operation rounded once
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompile.kernels.triton.numerics import COLUMN, FULL, ROW, load_shared

__all__ = ["finish_tile", "scaled_tile", "tile_of", "without_zero_points"]


@triton.jit
def tile_of(number, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile by its number: GROUP_M rows of tiles run together, so that they find each other's columns in the L2
    cache."""
    in_group = GROUP_M * tiles_n
    first_m = (number // in_group) * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    return first_m + (number % in_group) % group_m, (number % in_group) // group_m


@triton.jit
def without_zero_points(
    acc,  # int32 sum of products, tile of rows rm and columns rn
    rm,
    rn,
    M,
    N,
    K,
    a_zero_ptr,  # int32, or None
    b_zero_ptr,
    a_sum_ptr,  # int32 [M], with b_zero
    b_sum_ptr,  # int32 [N], with a_zero
    A_ZERO: tl.constexpr,  # Layout
    B_ZERO: tl.constexpr,
):
    """The sum of products of codes less their zero points, int32."""
    if b_zero_ptr is not None:
        b_zero = load_shared(b_zero_ptr, B_ZERO, rm, rn, M, N, 0)
        acc -= b_zero * load_shared(a_sum_ptr, ROW, rm, rn, M, N, 0)
    if a_zero_ptr is not None:
        b_sum = load_shared(b_sum_ptr, COLUMN, rm, rn, M, N, 0)
        if b_zero_ptr is not None:
            b_sum -= K * b_zero  # b_zero is shared along the rows: still one value per column
        acc -= load_shared(a_zero_ptr, A_ZERO, rm, rn, M, N, 0) * b_sum
    return acc


@triton.jit
def scaled_tile(
    out,  # fp32 sums
    rm,
    rn,
    M,
    N,
    a_scale_ptr,  # fp32, or None: no scales
    b_scale_ptr,
    bias_ptr,  # any float, or None
    stride_bias_m,
    stride_bias_n,
    A_SCALE: tl.constexpr,  # Layout
    B_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Scales and bias, fp32."""
    if a_scale_ptr is not None:
        a_scale = load_shared(a_scale_ptr, A_SCALE, rm, rn, M, N, 0.0)
        out = out * (a_scale * load_shared(b_scale_ptr, B_SCALE, rm, rn, M, N, 0.0))
    if bias_ptr is not None:
        if BIAS == FULL:
            offsets = rm.to(tl.int64)[:, None] * stride_bias_m + rn.to(tl.int64)[None, :] * stride_bias_n
            mask = (rm < M)[:, None] & (rn < N)[None, :]
            out = out + tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            out = out + load_shared(bias_ptr, BIAS, rm, rn, M, N, 0.0).to(tl.float32)
    return out


@triton.jit
def finish_tile(
    acc,  # int32 sum of products, tile of rows rm and columns rn
    rm,
    rn,
    M,
    N,
    K,
    out_ptr,  # [M, N], rows stride_o apart: fp32, bf16, fp16; int32 for the bare sum
    stride_o,
    partial_ptr,  # fp32 [M, N] like out: the sum of earlier parts of K, or None
    a_scale_ptr,  # fp32, or None: no scales and no bias
    b_scale_ptr,
    a_zero_ptr,  # int32, or None
    b_zero_ptr,
    a_sum_ptr,  # int32 [M], with b_zero
    b_sum_ptr,  # int32 [N], with a_zero
    bias_ptr,  # any float, or None
    stride_bias_m,
    stride_bias_n,
    A_SCALE: tl.constexpr,  # Layout
    B_SCALE: tl.constexpr,
    A_ZERO: tl.constexpr,
    B_ZERO: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Zero points, scales, bias, one rounding, and the store."""
    acc = without_zero_points(acc, rm, rn, M, N, K, a_zero_ptr, b_zero_ptr, a_sum_ptr, b_sum_ptr, A_ZERO, B_ZERO)
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    offsets = rm.to(tl.int64)[:, None] * stride_o + rn.to(tl.int64)[None, :]
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_ptr + offsets, acc, mask=mask)
    else:
        out = acc.to(tl.float32)
        if partial_ptr is not None:
            out = tl.load(partial_ptr + offsets, mask=mask, other=0.0) + out
        out = scaled_tile(
            out, rm, rn, M, N, a_scale_ptr, b_scale_ptr, bias_ptr, stride_bias_m, stride_bias_n, A_SCALE, B_SCALE, BIAS
        )  # fmt: skip
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
