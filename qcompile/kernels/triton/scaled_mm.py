"""INT8 matrix product with zero points, scales, bias and one rounding. M rows, N columns, K summed.

    acc[m, n] = sum_k (a[m, k] - a_zero[m]) * (b[k, n] - b_zero[n])                          exact, int32
              = sum_k a b - b_zero[n] * a_sum[m] - a_zero[m] * (b_sum[n] - K * b_zero[n])
    a_sum[m]  = sum_k a[m, k],    b_sum[n] = sum_k b[k, n]
    out[m, n] = cast(float32(acc[m, n]) * (a_scale[m] * b_scale[n]) + float32(bias[m, n]))

Three kernels compute it: `scaled_mm_pointers` takes every operand, `scaled_mm_tma` and `scaled_mm_gluon` are for compute capability
9.0. `scaled_mm_launch` launches each of them. Here operands are checked, and a long K is split.

An int32 holds a sum of `tuning.max_k` products. A longer K is split: every part is exact, and the parts are added in fp32, in
order. Within a part single terms of the corrected sum may wrap, their total modulo 2**32 does not care.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.kernels.quantized_tensor import zero_point_count
from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.launch import family
from qcompile.kernels.triton.scaled_mm_launch import RUNS, SHARED_FIELDS, Epilogue, Packing
from qcompile.kernels.triton.scaled_mm_tma import takes
from qcompile.ops.pack_codes import codes_per_byte

__all__ = ["prepare", "scaled_mm"]

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.int32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

CHUNK = 128
"""K is split at multiples of this, so that only the last part has a tail."""


def scaled_mm(
    a: Tensor,
    b_t: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    k: int | None = None,
    a_bits: int = 8,
    b_bits: int = 8,
    kernel: str = "triton",
    config: tuning.MatmulConfig | None = None,
) -> Tensor:
    """a int8 [M, K] and b_t int8 [N, K], both with contiguous rows -> out_dtype [M, N], contiguous.

        a_scale, a_zero  fp32, int32 or None: 0-d, [1, 1] or [M, 1]; a zero point is a code, -128 to 127
        b_scale, b_zero  likewise, or [1, N]
        bias             any float dtype, broadcastable to [M, N], or None
        out_dtype        fp32, bf16 or fp16; int32: the bare sum, no scales, no bias, K up to `tuning.max_k`
        k, a_bits,       packed operands: the number of codes along K, and 4, 3 or 2 bits for one that is packed; both packed:
        b_bits           with equally many codes a byte; K up to `tuning.max_k`
        kernel           "triton" takes every operand; "triton_tma" and "triton_gluon" (compute capability 9.0) no packed ones, and
                         others where `scaled_mm_tma.takes` them
        config           launch configuration; `tuning.choose` picks one if not given

    Errors: `KernelError`.
    """
    _check(a, b_t, a_scale, b_scale, a_zero, b_zero, bias, out_dtype)
    m, n = a.shape[0], b_t.shape[0]
    k, fields = _fields(a, b_t, k, a_bits, b_bits)
    out = a.new_empty((m, n), dtype=out_dtype)
    if m == 0 or n == 0:
        return out
    if config is None:
        config = tuning.choose(family(a.device), m, n, k, kernel)
        if fields > 1:
            config = tuning.for_packed(config, fields)

    last = Epilogue(out, None, a_scale, b_scale, a_zero, b_zero, bias=bias)
    longest = tuning.max_k(zero_point_count(a_zero, b_zero))
    if k <= longest:
        _launch(kernel, a, b_t, last, config, Packing(a_bits < 5, b_bits < 5, fields, k))
        return out
    if fields > 1:
        raise KernelError(f"scaled_mm: K is {k}; packed operands go up to {longest}. Unpack them first.")
    if out_dtype is torch.int32:
        raise KernelError(f"scaled_mm: K is {k}; an int32 sum holds at most {longest} products. Ask for a float out_dtype.")
    length = longest // CHUNK * CHUNK
    partial = None
    for start in range(0, k, length):
        parts = a[:, start : start + length], b_t[:, start : start + length]
        if start + length < k:
            sums = a.new_empty((m, n), dtype=torch.float32) if partial is None else partial  # each tile reads and writes its own
            epilogue = Epilogue(sums, partial, a_zero=a_zero, b_zero=b_zero)
            partial = sums
        else:
            epilogue = last._replace(partial=partial)
        _launch(kernel, *parts, epilogue, config, Packing(False, False, 1, parts[0].shape[1]))
    return out


def prepare(
    a: Tensor,
    b_t: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    kernel: str,
) -> Callable[..., Tensor] | None:
    """`scaled_mm` of checked operands, as a function of others, up to the bias, that differ from these in their values alone.

    None where that is more than one launch: nothing to sum, a K that is split, values to be copied first.
    """
    (m, k), n = a.shape, b_t.shape[0]
    if 0 in (m, n, k) or k > tuning.max_k(zero_point_count(a_zero, b_zero)) or a.stride(1) != 1 or b_t.stride(1) != 1:
        return None
    if kernel != "triton" and not (takes(a) and takes(b_t)):
        return None
    packing = Packing(False, False, 1, k)
    given = Epilogue(a.new_empty((m, n), dtype=out_dtype), None, a_scale, b_scale, a_zero, b_zero, bias=bias)
    tensors, constants = given.complete(a, b_t, packing)
    if any(getattr(tensors, name) is not getattr(given, name) for name in SHARED_FIELDS):
        return None
    run = RUNS[kernel](a, b_t, tensors, constants, tuning.choose(family(a.device), m, n, k, kernel), packing)

    def again(a: Tensor, b_t: Tensor, *applied: Tensor | None) -> Tensor:
        a_scale, b_scale, a_zero, b_zero, bias = applied
        out = a.new_empty((m, n), dtype=out_dtype)
        epilogue = Epilogue(out, None, a_scale, b_scale, a_zero, b_zero, bias=bias)
        run(a, b_t, epilogue if a_zero is b_zero is None else epilogue.with_sums(a, b_t, packing))
        return out

    return again


def _fields(a: Tensor, b_t: Tensor, k: int | None, a_bits: int, b_bits: int) -> tuple[int, int]:
    """K, and how many codes a byte of a packed operand holds (1: none is packed). Errors: `KernelError`."""
    counts = {"a": codes_per_byte(a_bits), "b_t": codes_per_byte(b_bits)}
    packed = {count for count in counts.values() if count > 1}
    if len(packed) > 1:
        raise KernelError(f"scaled_mm: a has {counts['a']} codes a byte and b_t {counts['b_t']}; unpack one of them.")
    if k is None:
        k = a.shape[1]
    for name, codes in (("a", a), ("b_t", b_t)):
        if codes.shape[1] != -(-k // counts[name]):
            what = "both must have K columns" if not packed else f"{k} codes, {counts[name]} a byte, must lie along K of {name}"
            raise KernelError(f"scaled_mm: a is {list(a.shape)} and b_t {list(b_t.shape)}; {what}.")
    return k, max(packed, default=1)


def _check(
    a: Tensor,
    b_t: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    for name, codes in (("a", a), ("b_t", b_t)):
        if codes.dtype is not torch.int8 or codes.ndim != 2:
            raise KernelError(f"scaled_mm: {name} is {codes.dtype} of shape {list(codes.shape)}; allowed: an int8 matrix.")
        if codes.stride(1) != 1 and codes.shape[1] > 1:
            raise KernelError(
                f"scaled_mm: {name} has strides {codes.stride()}; its rows (the summed axis) must be "
                f"contiguous. Pass a transposed copy (`transpose`)."
            )
    if out_dtype not in OUTPUTS:
        raise KernelError(f"scaled_mm: out_dtype is {out_dtype}; allowed: {', '.join(map(str, OUTPUTS))}.")
    if out_dtype is torch.int32:
        if a_scale is not None or b_scale is not None or bias is not None:
            raise KernelError("scaled_mm: out_dtype is int32, the bare sum; scales and bias must be None.")
    elif a_scale is None or b_scale is None:
        raise KernelError(f"scaled_mm: out_dtype is {out_dtype} and a scale is None; only int32 has no scales.")
    for name, values, dtypes in (
        ("a_scale", a_scale, (torch.float32,)),
        ("b_scale", b_scale, (torch.float32,)),
        ("a_zero", a_zero, (torch.int32,)),
        ("b_zero", b_zero, (torch.int32,)),
        ("bias", bias, FLOATS),
        ("b_t", b_t, (torch.int8,)),
    ):
        if values is not None and (values.dtype not in dtypes or values.device != a.device):
            raise KernelError(
                f"scaled_mm: {name} is {values.dtype} on {values.device}; allowed: {', '.join(map(str, dtypes))} on {a.device}."
            )


def _launch(
    kernel: str, a: Tensor, b_t: Tensor, epilogue: Epilogue, config: tuning.MatmulConfig, packing: Packing
) -> None:
    tensors, constants = epilogue.complete(a, b_t, packing)
    RUNS[kernel](a, b_t, tensors, constants, config, packing)(a, b_t, tensors)
