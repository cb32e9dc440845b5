"""INT8 GEMM of a batch of matrices in one launch: attention and experts would otherwise start hundreds of small ones.

    acc[b, m, n] = sum_k (a[b, m, k] - a_zero[b, m]) * (b_t[b, n, k] - b_zero[b, n])                        int32, exact
    out[b, m, n] = cast(float32(acc) * (a_scale[b, m] * b_scale[b, n]) + float32(bias[b, m, n]))

The meaning is that of `scaled_mm`, matrix by matrix, and so are a program's tile and what becomes of it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.kernels.quantized_tensor import zero_point_count
from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.epilogue import finish_tile, tile_of
from qcompile.kernels.triton.kernel_call import kernel_call
from qcompile.kernels.triton.launch import cdiv, family
from qcompile.kernels.triton.numerics import FULL, Layout, layout_of
from qcompile.kernels.triton.scaled_mm_launch import tiles_of
from qcompile.kernels.triton.scaled_mm_pointers import sum_of_tile

__all__ = ["scaled_bmm", "scaled_bmm_kernel"]


@triton.jit
def scaled_bmm_kernel(
    a_ptr,  # int8 [B, M, K]: matrices step_a apart, rows stride_a
    b_ptr,  # int8 [B, N, K]: likewise
    out_ptr,  # [B, M, N], contiguous: fp32, bf16, fp16
    a_scale_ptr,  # fp32; from here on: the values of each matrix as `scaled_mm_kernel` has them, step_* apart (0: shared)
    b_scale_ptr,
    a_zero_ptr,  # int32, or None
    b_zero_ptr,
    a_sum_ptr,  # int32 [B, M], with b_zero
    b_sum_ptr,  # int32 [B, N], with a_zero
    bias_ptr,  # any float [B, M, N] in any strides, or None
    M,
    N,
    K,
    step_a,
    stride_a,
    step_b,
    stride_b,
    step_a_scale,
    step_b_scale,
    step_a_zero,
    step_b_zero,
    step_bias,
    stride_bias_m,
    stride_bias_n,
    A_SCALE: tl.constexpr,  # Layout of a matrix's values
    B_SCALE: tl.constexpr,
    A_ZERO: tl.constexpr,
    B_ZERO: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program a tile of a matrix; the tiles of a matrix run together."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    number = tl.program_id(0)
    matrix = (number // (tiles_m * tiles_n)).to(tl.int64)
    m, n = tile_of(number % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    rm = m * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = sum_of_tile(
        a_ptr + matrix * step_a, b_ptr + matrix * step_b, rm, rn, M, N, K, K, stride_a, stride_b, False, False, 1, False, EVEN_K,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if a_zero_ptr is not None:
        a_zero_ptr += matrix * step_a_zero
        b_sum_ptr += matrix * N
    if b_zero_ptr is not None:
        b_zero_ptr += matrix * step_b_zero
        a_sum_ptr += matrix * M
    if bias_ptr is not None:
        bias_ptr += matrix * step_bias
    finish_tile(
        acc, rm, rn, M, N, K, out_ptr + matrix * M * N, N, None, a_scale_ptr + matrix * step_a_scale,
        b_scale_ptr + matrix * step_b_scale, a_zero_ptr, b_zero_ptr, a_sum_ptr, b_sum_ptr, bias_ptr, stride_bias_m, stride_bias_n,
        A_SCALE, B_SCALE, A_ZERO, B_ZERO, FULL,
    )  # fmt: skip


def scaled_bmm(
    a: Tensor,
    b_t: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    config: tuning.MatmulConfig | None = None,
) -> Tensor:
    """a int8 [B, M, K] and b_t int8 [B, N, K], both with contiguous rows -> out_dtype [B, M, N], contiguous.

        a_scale, a_zero  fp32, int32 or None: 0-d, or [B, M, 1] with sizes of 1 where values are shared
        b_scale, b_zero  likewise, [B, 1, N]
        bias             any float dtype, broadcastable to [B, M, N], or None
        out_dtype        fp32, bf16 or fp16
        config           launch configuration; `tuning.choose` picks one for a matrix if not given

    Errors: `KernelError` where K is longer than `tuning.max_k`, or a row is not contiguous.
    """
    (batch, m, k), n = a.shape, b_t.shape[1]
    longest = tuning.max_k(zero_point_count(a_zero, b_zero))
    if k > longest or (k > 1 and (a.stride(2) != 1 or b_t.stride(2) != 1)):
        raise KernelError(
            f"scaled_bmm: a has strides {a.stride()}, b_t {b_t.stride()}, K is {k}; rows (the summed axis) must be contiguous and "
            f"K at most {longest}."
        )
    out = a.new_empty((batch, m, n), dtype=out_dtype)
    if out.numel() == 0:
        return out
    if config is None:
        config = tuning.choose(family(a.device), m, n, k)
        config = config if bias is None else tuning.spare_registers(config)
    biases = None if bias is None else bias.expand(batch, m, n)
    step_bias, stride_bias_m, stride_bias_n = (0, 0, 0) if biases is None else biases.stride()
    rest = {
        "M": m,
        "N": n,
        "K": k,
        "step_a": a.stride(0),
        "stride_a": a.stride(1),
        "step_b": b_t.stride(0),
        "stride_b": b_t.stride(1),
        "step_bias": step_bias,
        "stride_bias_m": stride_bias_m,
        "stride_bias_n": stride_bias_n,
        **_of_each_matrix("a_scale", a_scale, m, n, Layout.ROW),
        **_of_each_matrix("b_scale", b_scale, m, n, Layout.COLUMN),
        **_of_each_matrix("a_zero", a_zero, m, n, Layout.ROW),
        **_of_each_matrix("b_zero", b_zero, m, n, Layout.COLUMN),
        "EVEN_K": k % config.block_k == 0,
        **tiles_of(config),
    }
    grid = (batch * cdiv(m, config.block_m) * cdiv(n, config.block_n),)
    kernel_call(scaled_bmm_kernel, grid, rest, num_warps=config.warps, num_stages=config.stages)(
        a,
        b_t,
        out,
        a_scale.contiguous(),
        b_scale.contiguous(),
        None if a_zero is None else a_zero.contiguous(),
        None if b_zero is None else b_zero.contiguous(),
        None if b_zero is None else a.sum(2, dtype=torch.int32),
        None if a_zero is None else b_t.sum(2, dtype=torch.int32),
        biases,
    )
    return out


def _of_each_matrix(name: str, values: Tensor | None, m: int, n: int, along: Layout) -> dict[str, int]:
    """How scales or zero points of a batch lie: the kernel's arguments."""
    step, layout = f"step_{name}", name.upper()
    if values is None:
        return {step: 0, layout: int(Layout.TENSOR)}
    shared = values.ndim < 3 or values.shape[0] == 1
    of_one = values if values.ndim < 3 else values[0]
    return {
        step: 0 if shared else math.prod(of_one.shape),
        layout: int(layout_of("scaled_bmm", name, of_one, m, n, Layout.TENSOR, along)),
    }
