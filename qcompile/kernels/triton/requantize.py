"""INT8 matrix product whose result leaves as codes. M rows, N columns, K summed.

    x          = cast(scaled product + bias)                 as `scaled_mm` would write it
    x          = relu(x), or where(gate < 0, 0, x)           if asked
    codes      = clamp(round_half_even(float32(x) * inv) + zero_point, qmin, qmax),    inv = float32(1) / scale
    marked     = where(x > 0, codes, -1)                     if asked
    statistics = [max |x|, min x, max x, share of x outside [low, high], or of |x| above high]

The values stay in registers: of the 2 bytes a value that a GEMM writes and the 2 that a quantize reads, none go through memory,
and the statistics cost one atomic operation each for a tile. They are taken as integers that are ordered like the floats, so they
are the same in any order; a second, tiny kernel makes floats of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.quantized_tensor import Requantization
from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.epilogue import scaled_tile, tile_of, without_zero_points
from qcompile.kernels.triton.kernel_call import kernel_call
from qcompile.kernels.triton.launch import cdiv, family
from qcompile.kernels.triton.numerics import MAGIC
from qcompile.kernels.triton.scaled_mm_launch import Epilogue, Packing, tiles_of
from qcompile.kernels.triton.scaled_mm_pointers import sum_of_tile
from qcompile.ops.quantize import code_range

__all__ = ["requantize_kernel", "scaled_mm_requantize"]

LEAST = tl.constexpr(-(2**31))
MOST = tl.constexpr(2**31 - 1)


@triton.jit
def ordered(x):
    """fp32 -> int32, ordered like the floats; NaN above infinity, or below its negative if its sign is set."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & MOST)


@triton.jit
def unordered(key):
    """The fp32 of a key."""
    return (key ^ ((key >> 31) & MOST)).to(tl.float32, bitcast=True)


@triton.jit
def requantize_kernel(
    a_ptr,  # int8 [M, K], rows stride_a apart
    b_ptr,  # int8 [N, K], rows stride_b apart
    codes_ptr,  # int8 [M, N]
    marked_ptr,  # int8 [M, N], or None
    found_ptr,  # int64 [4], zeros: pattern of max |x|, key of max x - LEAST, MOST - key of min x, how many lie outside
    gate_ptr,  # int8 [M, N], rows stride_gate apart, or None
    scale_ptr,  # fp32, one value
    zero_ptr,  # int32, one value, or None
    low_ptr,  # fp32, one value, or None
    high_ptr,
    rounded_ptr,  # a pointer to the type that values are rounded to; never followed
    a_scale_ptr,  # from here on as in `scaled_mm_kernel`
    b_scale_ptr,
    a_zero_ptr,
    b_zero_ptr,
    a_sum_ptr,
    b_sum_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_a,
    stride_b,
    stride_gate,
    stride_bias_m,
    stride_bias_n,
    A_SCALE: tl.constexpr,
    B_SCALE: tl.constexpr,
    A_ZERO: tl.constexpr,
    B_ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program a tile of the result."""
    m, n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rm = m * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = sum_of_tile(
        a_ptr, b_ptr, rm, rn, M, N, K, K, stride_a, stride_b, False, False, 1, False, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K
    )
    acc = without_zero_points(acc, rm, rn, M, N, K, a_zero_ptr, b_zero_ptr, a_sum_ptr, b_sum_ptr, A_ZERO, B_ZERO)
    x = scaled_tile(
        acc.to(tl.float32), rm, rn, M, N, a_scale_ptr, b_scale_ptr, bias_ptr, stride_bias_m, stride_bias_n, A_SCALE, B_SCALE, BIAS
    )  # fmt: skip
    x = x.to(rounded_ptr.dtype.element_ty).to(tl.float32)

    mask = (rm < M)[:, None] & (rn < N)[None, :]
    row, column = rm.to(tl.int64), rn.to(tl.int64)
    offsets = row[:, None] * N + column[None, :]
    if RELU:
        x = tl.where(x < 0, 0.0, x)  # keeps NaN
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + row[:, None] * stride_gate + column[None, :], mask=mask, other=0)
        x = tl.where(gate < 0, 0.0, x)

    v = x * tl.div_rn(1.0, tl.load(scale_ptr))
    if zero_ptr is None:
        code = (tl.minimum(tl.maximum(v, QMIN * 1.0), QMAX * 1.0) + MAGIC).to(tl.int32, bitcast=True)
    else:
        zero = tl.load(zero_ptr)
        lowest, highest = (QMIN - zero).to(tl.float32), (QMAX - zero).to(tl.float32)
        code = (tl.minimum(tl.maximum(v, lowest), highest) + MAGIC).to(tl.int32, bitcast=True) + zero
    codes = code.to(tl.int8)  # the low byte
    tl.store(codes_ptr + offsets, codes, mask=mask)
    if marked_ptr is not None:
        tl.store(marked_ptr + offsets, tl.where(x > 0, codes, -1).to(tl.int8), mask=mask)

    pattern = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    key = ordered(x)
    if low_ptr is None:
        beyond = tl.abs(x) > tl.load(high_ptr)
    else:
        beyond = (x < tl.load(low_ptr)) | (x > tl.load(high_ptr))
    amax = tl.max(tl.max(tl.where(mask, pattern, 0), axis=1), axis=0)
    largest = tl.max(tl.max(tl.where(mask, key, LEAST), axis=1), axis=0)
    smallest = tl.min(tl.min(tl.where(mask, key, MOST), axis=1), axis=0)
    tl.atomic_max(found_ptr, amax.to(tl.int64), sem="relaxed")
    tl.atomic_max(found_ptr + 1, largest.to(tl.int64) - LEAST, sem="relaxed")
    tl.atomic_max(found_ptr + 2, -smallest.to(tl.int64) + MOST, sem="relaxed")
    count = tl.sum(tl.sum((beyond & mask).to(tl.int32), axis=1), axis=0).to(tl.int64)
    tl.atomic_add(found_ptr + 3, count, sem="relaxed")


@triton.jit
def statistics_kernel(found_ptr, statistics_ptr, elements):
    """int64 [4] as `requantize_kernel` leaves it -> fp32 [4]: amax, min, max, share outside. NaN is in all of the first three."""
    amax = tl.load(found_ptr).to(tl.int32).to(tl.float32, bitcast=True)
    nothing = amax != amax
    largest = unordered((tl.load(found_ptr + 1) + LEAST).to(tl.int32))
    smallest = unordered((-tl.load(found_ptr + 2) + MOST).to(tl.int32))
    tl.store(statistics_ptr, amax)
    tl.store(statistics_ptr + 1, tl.where(nothing, amax, smallest))
    tl.store(statistics_ptr + 2, tl.where(nothing, amax, largest))
    share = tl.div_rn(tl.load(found_ptr + 3).to(tl.float32), elements)
    tl.store(statistics_ptr + 3, share)


def scaled_mm_requantize(
    a: Tensor,
    b_t: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *requantization: Any,
    config: tuning.MatmulConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qtrain::scaled_mm_requantize` of checked operands, b as b_t int8 [N, K], both with contiguous rows; K up to `tuning.max_k`.

    requantization  the fields of a `Requantization`
    config          launch configuration; the one for `scaled_mm` if not given
    """
    to = Requantization(*requantization)
    (m, k), n = a.shape, b_t.shape[0]
    config = tuning.spare_registers(tuning.choose(family(a.device), m, n, k)) if config is None else config
    codes = a.new_empty((m, n))
    marked = a.new_empty((m, n) if to.mark else (0,))
    found, statistics = a.new_zeros(4, dtype=torch.int64), a.new_empty(4, dtype=torch.float32)
    gate = to.gate if to.gate is None or to.gate.stride(1) == 1 else to.gate.contiguous()
    qmin, qmax = code_range(to.bits, symmetric=to.zero_point is None)
    # The shape of the values that are not written, for the layouts of what is applied to them.
    values = a.new_empty(1, dtype=out_dtype).expand(m, n)
    epilogue = Epilogue(values, None, a_scale, b_scale, a_zero, b_zero, bias=bias)
    (_, _, *applied), constants = epilogue.complete(a, b_t, Packing(False, False, 1, k))
    del constants["stride_o"]  # codes lie side by side
    rest = {
        "M": m,
        "N": n,
        "K": k,
        "stride_a": a.stride(0),
        "stride_b": b_t.stride(0),
        "stride_gate": 0 if gate is None else gate.stride(0),
        "RELU": to.relu,
        "QMIN": qmin,
        "QMAX": qmax,
        "EVEN_K": k % config.block_k == 0,
        **tiles_of(config),
        **constants,
    }
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n),)
    kernel_call(requantize_kernel, grid, rest, num_warps=config.warps, num_stages=config.stages)(
        a,
        b_t,
        codes,
        marked if to.mark else None,
        found,
        gate,
        to.scale.reshape(1),
        None if to.zero_point is None else to.zero_point.reshape(1),
        None if to.low is None else to.low.reshape(1),
        to.high.reshape(1),
        values,
        *applied,
    )
    kernel_call(statistics_kernel, (1,), {"elements": float(m * n)}, num_warps=1)(found, statistics)
    return codes, marked, statistics
