"""Quantize with a known scale: one read of x, codes in both orientations, statistics. M rows, N columns.

    inv        = float32(1) / scale                                       rounded once, IEEE
    v          = float32(x) * inv                   (+ u, with a seed)    u: the draw of `qcompile.ops.random`
    codes      = clamp(round_half_even(v) + zero_point, qmin, qmax)
    codes_t    = codes.t()
    amax       = max |x|                            not finite if any x is not
    outside    = how many x with |x| > bound       what an estimator calls clipped: in units of x, not in codes

An int8 tensor core wants both operands with the summed axis contiguous, so `grad_weight` needs X^T and G^T,
`grad_input` W^T: the transposed copy costs one byte a value here, and four more (read 1, write 1, read 2) if
something else makes it. The statistics are those that an estimator wants for the next step; taken here, they
cost no read.

Where the bits come from: `inv` is `div_rn` in the kernel (plain `/` is approximate on a GPU; a reciprocal
made on the host would be one more launch). The clamp comes *before* the rounding: its bounds are integers, so
the result is the same, and the value stays in the range in which `MAGIC` rounds. `amax` is the maximum of bit
patterns: those of non-negative floats are ordered like the floats, with infinity and then NaN on top, and an
integer atomic is the same in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.kernel_call import kernel_call
from qcompile.kernels.triton.launch import cdiv, takes_ptx
from qcompile.kernels.triton.numerics import (
    MAGIC,
    Layout,
    add_draw,
    draw_key,
    layout_of,
    load_shared,
    to_float32,
)
from qcompile.ops.quantize import code_range

__all__ = ["Quantized", "prepare", "quantize", "quantize_kernel"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Quantized(NamedTuple):
    """What was asked for, and None for what was not."""

    codes: Tensor | None  # int8 [M, N], contiguous
    codes_t: Tensor | None  # int8 [N, M], contiguous
    amax: Tensor | None  # fp32, 0-d, in units of x
    outside: Tensor | None = None  # int64, 0-d


# --- Kernel -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["salt"])
def quantize_kernel(
    x_ptr,  # [M, N], any strides; fast with stride_xn == 1
    scale_ptr,
    zero_ptr,  # int32 or None
    q_ptr,  # int8 [M, N] or None
    qt_ptr,  # int8 [N, M] or None
    amax_ptr,  # int32 bit pattern of an fp32, or None
    outside_ptr,  # int64 or None
    bound_ptr,  # fp32, >= 0; with outside_ptr
    seed_ptr,  # int64 or None
    salt,
    M,
    N,
    stride_xm,
    stride_xn,
    stride_q,
    stride_qt,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    SCALE: tl.constexpr,  # Layout
    ZERO: tl.constexpr,  # Layout
    TRANSPOSED: tl.constexpr,  # x is the caller's x.t(); draws count elements in the caller's order
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASM: tl.constexpr,  # the target takes NVIDIA instructions
):
    """One program a tile; neighbours along N run next to each other."""
    pid = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    rm = (pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    # Offsets are 64-bit: a tensor may have more than 2**31 elements.
    row, column = rm.to(tl.int64), rn.to(tl.int64)
    x = tl.load(x_ptr + row[:, None] * stride_xm + column[None, :] * stride_xn, mask=mask, other=0.0)
    x = to_float32(x, ASM)

    if amax_ptr is not None:
        pattern = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        tl.atomic_max(amax_ptr, tl.max(tl.max(pattern, axis=1), axis=0), sem="relaxed")
    if outside_ptr is not None:
        beyond = tl.abs(x) > tl.load(bound_ptr)  # false for NaN, and for the zeros outside x
        tl.atomic_add(outside_ptr, tl.sum(tl.sum(beyond.to(tl.int32), axis=1), axis=0).to(tl.int64), sem="relaxed")

    v = x * tl.div_rn(1.0, load_shared(scale_ptr, SCALE, rm, rn, M, N, 1.0))
    if zero_ptr is None:
        low, high = QMIN * 1.0, QMAX * 1.0
    else:
        zero = load_shared(zero_ptr, ZERO, rm, rn, M, N, 0)
        low, high = (QMIN - zero).to(tl.float32), (QMAX - zero).to(tl.float32)
    if seed_ptr is not None:
        key = draw_key(tl.load(seed_ptr), salt)
        element = row[:, None] + (column * M)[None, :] if TRANSPOSED else (row * N)[:, None] + column[None, :]
        v = add_draw(v, key, element.to(tl.uint32))
    code = (tl.minimum(tl.maximum(v, low), high) + MAGIC).to(tl.int32, bitcast=True)
    if zero_ptr is not None:
        code = code + zero
    q = code.to(tl.int8)  # the low byte

    if q_ptr is not None:
        tl.store(q_ptr + row[:, None] * stride_q + column[None, :], q, mask=mask)
    if qt_ptr is not None:
        mask_t = (rn < N)[:, None] & (rm < M)[None, :]
        tl.store(qt_ptr + column[:, None] * stride_qt + row[None, :], tl.trans(q), mask=mask_t)


# --- Launcher -----------------------------------------------------------------------------------------------


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    bits: int = 8,
    seed: Tensor | None = None,
    salt: int = 0,
    codes: bool = True,
    codes_t: bool = False,
    amax: bool = False,
    bound: Tensor | None = None,
) -> Quantized:
    """x (fp32, bf16, fp16) [M, N], any strides -> the outputs that are asked for.

        scale       fp32, real value per code: 0-d, [1, 1], [M, 1] or [1, N]
        zero_point  int32 of such a shape, each |zero point| < 2**21, or None: symmetric codes
        bits        2 to 8
        seed, salt  int64 0-d on x's device and an int: stochastic rounding; seed None: to nearest, ties to
                    even
        bound       fp32, one value >= 0, in units of x: ask for `outside`; None: do not

    Errors: `KernelError`; `ValueError` for bits.
    """
    _check(x, scale, zero_point, bits, seed, bound)
    return prepare(x, scale, zero_point, bits, seed, salt, codes, codes_t, amax, bound)(x, scale, zero_point, seed, bound)


def prepare(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    seed: Tensor | None,
    salt: int,
    codes: bool,
    codes_t: bool,
    amax: bool,
    bound: Tensor | None,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Quantized]:
    """`quantize` of checked operands, as a function of (x, scale, zero_point, seed, bound) that differ from these in their values
    alone."""
    (m, n), (stride_m, stride_n) = x.shape, x.stride()
    shared = (Layout.TENSOR, Layout.ROW, Layout.COLUMN)
    scales = layout_of("quantize", "scale", scale, m, n, *shared)
    zeros = Layout.TENSOR if zero_point is None else layout_of("quantize", "zero_point", zero_point, m, n, *shared)
    # Column-major: x.t() reads with unit stride, and the two outputs change places. Only draws see the difference.
    transposed = stride_m == 1 and stride_n != 1
    if transposed:
        m, n, stride_m, stride_n, scales, zeros = n, m, stride_n, stride_m, _TRANSPOSED[scales], _TRANSPOSED[zeros]
    qmin, qmax = code_range(bits, symmetric=zero_point is None)
    config = tuning.tile_config(m, n)
    rest = {
        "salt": (salt & 0xFFFFFFFF ^ 0x80000000) - 0x80000000,  # as a signed 32-bit integer
        "M": m,
        "N": n,
        "stride_xm": stride_m,
        "stride_xn": stride_n,
        "stride_q": n,
        "stride_qt": m,
        "QMIN": qmin,
        "QMAX": qmax,
        "SCALE": int(scales),
        "ZERO": int(zeros),
        "TRANSPOSED": transposed,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "ASM": takes_ptx(x.device),
    }
    call = kernel_call(quantize_kernel, (cdiv(m, config.block_m) * cdiv(n, config.block_n),), rest, num_warps=config.num_warps)

    def run(
        x: Tensor, scale: Tensor, zero_point: Tensor | None, seed: Tensor | None, bound: Tensor | None
    ) -> Quantized:
        outputs = Quantized(
            codes=x.new_empty(x.shape, dtype=torch.int8) if codes else None,
            codes_t=x.new_empty((x.shape[1], x.shape[0]), dtype=torch.int8) if codes_t else None,
            amax=x.new_empty((), dtype=torch.float32) if amax else None,
            outside=None if bound is None else x.new_empty((), dtype=torch.int64),
        )
        _set_to_zero([statistic for statistic in (outputs.amax, outputs.outside) if statistic is not None])
        if m and n:
            call(
                x,
                scale.contiguous(),
                None if zero_point is None else zero_point.contiguous(),
                outputs.codes_t if transposed else outputs.codes,
                outputs.codes if transposed else outputs.codes_t,
                None if outputs.amax is None else outputs.amax.view(torch.int32),
                outputs.outside,
                bound,
                seed,
            )
        return outputs

    return run


_TRANSPOSED = {Layout.TENSOR: Layout.TENSOR, Layout.ROW: Layout.COLUMN, Layout.COLUMN: Layout.ROW}


def _set_to_zero(statistics: list[Tensor]) -> None:
    """In one kernel, for which they have to be of one dtype: zeros have the same bits in all. They share no memory."""
    if statistics:
        torch._foreach_zero_([statistic.view(1).view(torch.float32) for statistic in statistics])


def _check(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, seed: Tensor | None, bound: Tensor | None
) -> None:
    if x.ndim != 2 or x.dtype not in FLOATS:
        raise KernelError(
            f"quantize: x is {x.dtype} of shape {list(x.shape)}; allowed: a matrix of "
            f"{', '.join(map(str, FLOATS))}. Flatten the leading axes."
        )
    if scale.dtype is not torch.float32 or (zero_point is not None and zero_point.dtype is not torch.int32):
        raise KernelError(
            f"quantize: scale is {scale.dtype}, zero_point {getattr(zero_point, 'dtype', None)}; allowed: float32, int32 or None."
        )
    if not 2 <= bits <= 8:
        raise ValueError(f"quantize: bits is {bits}; allowed: 2 to 8 (a code is one int8).")
    if seed is not None and (seed.dtype is not torch.int64 or seed.ndim != 0):
        raise KernelError(f"quantize: seed is {seed.dtype} of shape {list(seed.shape)}; allowed: int64, 0-d, or None.")
    if bound is not None and (bound.dtype is not torch.float32 or bound.numel() != 1):
        raise KernelError(f"quantize: bound is {bound.dtype} of shape {list(bound.shape)}; allowed: float32, one value, or None.")
    for name, tensor in (("scale", scale), ("zero_point", zero_point), ("seed", seed), ("bound", bound)):
        if tensor is not None and tensor.device != x.device:
            raise KernelError(f"quantize: {name} is on {tensor.device} and x on {x.device}; move it.")
