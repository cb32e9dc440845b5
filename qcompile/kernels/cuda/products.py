"""Products of codes on a GPU. M rows, N columns, K summed.

    triton       a kernel of ours: any shape; zero points, scales, bias, cast fused; capability 8.0 or newer
    triton_tma   the same, persistent and fed by TMA: capability 9.0, K a multiple of 16
    triton_gluon the same with a step of the tensor cores in flight
    int_mm       torch._int_mm (cuBLASLt, hipBLASLt): int32 out, the rest in passes of its own; 7.5 or newer

All read a [M, K] and b as b_t [N, K], rows contiguous. Another layout is copied first: on compute capability 9.0 cuBLASLt has no
tensor-core kernel for a row-major b (about 8 times slower), and one copy of 1-byte codes is far cheaper.

The integer sum is exact in all of them up to K = 131,071 (less with zero points, `max_k`); longer sums are added up in fp32, part
by part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.kernels.cuda.transpose import rows_contiguous
from qcompile.kernels.quantized_tensor import QuantizedTensor, zero_point_count
from qcompile.kernels.triton.tuning import max_k

__all__ = ["CANDIDATES", "DESCRIBED", "k_major"]

DESCRIBED = ("triton_tma", "triton_gluon")
"""Candidates that read their operands through TMA descriptors."""

INT_MM_ROWS = 17
INT_MM_MULTIPLE = 16
"""`torch._int_mm` wants M > 16, and K and N in multiples of 8, its own tests have multiples of 16; zeros are added up to there."""


def k_major(a: QuantizedTensor, b: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The operands as our launchers take them: a [M, K] and b_t [N, K] with contiguous rows, scales, zero points."""
    return rows_contiguous(a.codes), rows_contiguous(b.codes.t()), a.scale, b.scale, a.zero, b.zero


def _triton(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    from qcompile.kernels.triton.scaled_mm import scaled_mm  # Triton may be missing where this file is imported

    return scaled_mm(*k_major(a, b), bias, out_dtype)


def _described(
    kernel: str, a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    from qcompile.kernels.triton.scaled_mm import scaled_mm
    from qcompile.kernels.triton.scaled_mm_tma import takes

    *codes, a_scale, b_scale, a_zero, b_zero = k_major(a, b)
    # A copy, and not `contiguous`: that leaves a matrix of one row as it is, whatever its stride.
    left, b_t = (c if takes(c) else c.clone(memory_format=torch.contiguous_format) for c in codes)
    return scaled_mm(left, b_t, a_scale, b_scale, a_zero, b_zero, bias, out_dtype, kernel=kernel)


def _int_mm(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    left, b_t, a_scale, b_scale, *zeros = k_major(a, b)
    longest = max_k(zero_point_count(*zeros))
    longest -= longest % INT_MM_MULTIPLE
    parts = [slice(start, start + longest) for start in range(0, left.shape[1], longest)]  # nearly always one
    out = _int_sum(left[:, parts[0]], b_t[:, parts[0]], *zeros).to(torch.float32)
    for part in parts[1:]:
        out += _int_sum(left[:, part], b_t[:, part], *zeros).to(torch.float32)
    out *= a_scale * b_scale
    if bias is not None:
        out += bias.to(torch.float32)
    return out.to(out_dtype)


def _int_sum(a: Tensor, b_t: Tensor, a_zero: Tensor | None, b_zero: Tensor | None) -> Tensor:
    """sum_k (a - a_zero)(b - b_zero), int32 [M, N]. Terms may wrap; their total modulo 2**32 is right because
    the sum fits."""
    (m, k), n = a.shape, b_t.shape[0]
    padding = (-k % INT_MM_MULTIPLE, -n % INT_MM_MULTIPLE, max(0, INT_MM_ROWS - m))
    padded_a = pad(a, (0, padding[0], 0, padding[2])) if padding[0] or padding[2] else _aligned(a)
    padded_b = pad(b_t, (0, padding[0], 0, padding[1])) if padding[0] or padding[1] else _aligned(b_t)
    acc = torch._int_mm(padded_a, padded_b.t())[:m, :n]
    if a_zero is not None:
        column_sums = b_t.sum(1, dtype=torch.int32)
        acc = acc - a_zero * (column_sums if b_zero is None else column_sums - k * b_zero)
    if b_zero is not None:
        acc = acc - b_zero * a.sum(1, dtype=torch.int32, keepdim=True)
    return acc


def _aligned(codes: Tensor) -> Tensor:
    """Contiguous from a 16-byte boundary on, as cuBLASLt's int8 kernels want it; a view into a larger tensor may be neither."""
    codes = codes.contiguous()
    return codes if codes.data_ptr() % 16 == 0 else codes.clone()


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "triton": _triton,
    **{name: functools.partial(_described, name) for name in DESCRIBED},
    "int_mm": _int_mm,
}
"""Name -> `scaled_mm` of checked operands that are not empty."""
