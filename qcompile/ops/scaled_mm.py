"""Integer matrix product with scales, bias and one rounding. M rows, N columns, K summed.

    acc[m, n] = sum_k (a[m, k] - a_zero[m]) * (b[k, n] - b_zero[n])                      exact
    out[m, n] = cast(float32(acc[m, n]) * (a_scale[m] * b_scale[n]) + float32(bias[m, n]))

The scale multiplies before the cast (an fp16 accumulator would overflow). K = 0 is legal and gives the bias
or zero; a scale of NaN or infinity gives what the formula gives, so that an overflow stays visible to a loss
scaler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile._sizes import same_size
from qcompile.errors import KernelError
from qcompile.kernels import cpu
from qcompile.kernels.quantized_tensor import as_operator
from qcompile.ops._checks import FLOATS, OUTPUTS, check_dtype, check_matrix, check_shared
from qcompile.ops._library import LIBRARY, checked, define

__all__ = ["check_scaled_mm", "scaled_mm", "scaled_mm_reference"]


def scaled_mm_reference(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`qtrain::scaled_mm` in aten, unchecked. fp64 holds every integer up to 2**53, so its sums are exact in
    any order."""
    a64, b64 = a.to(torch.float64), b.to(torch.float64)
    if a_zero is not None:
        a64 = a64 - a_zero
    if b_zero is not None:
        b64 = b64 - b_zero
    out = torch.mm(a64, b64).to(torch.float32) * (a_scale * b_scale)
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(out_dtype)


def check_scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Refuse operands that `qtrain::scaled_mm` does not take, for every device. Errors: `KernelError`."""
    op = "scaled_mm"
    check_matrix(op, "a", a)
    check_matrix(op, "b", b)
    if not same_size(a.shape[1], b.shape[0]):
        raise KernelError(
            f"{op}: a is {list(a.shape)} and b is {list(b.shape)}; a's columns must be as many as b's rows."
        )
    (m, _), n = a.shape, b.shape[1]
    rows, columns = (m, 1), (1, n)
    check_dtype(op, "a_scale", a_scale, torch.float32)
    check_dtype(op, "b_scale", b_scale, torch.float32)
    check_shared(op, "a_scale", a_scale, rows)
    check_shared(op, "b_scale", b_scale, columns)
    if a_zero is not None:
        check_dtype(op, "a_zero", a_zero, torch.int32)
        check_shared(op, "a_zero", a_zero, rows)
    if b_zero is not None:
        check_dtype(op, "b_zero", b_zero, torch.int32)
        check_shared(op, "b_zero", b_zero, columns)
    if bias is not None:
        check_dtype(op, "bias", bias, *FLOATS)
        check_shared(op, "bias", bias, (n,) if bias.ndim == 1 else (m, n))
    if out_dtype not in OUTPUTS:
        raise KernelError(f"{op}: out_dtype is {out_dtype}; allowed: {', '.join(map(str, OUTPUTS))}.")


def _fake(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=rest[-1])


scaled_mm = define(
    "scaled_mm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? a_zero, Tensor? b_zero, "
    "Tensor? bias, ScalarType out_dtype) -> Tensor",
    checked(check_scaled_mm, scaled_mm_reference),  # a device without a kernel of its own computes the reference
    fake=checked(check_scaled_mm, _fake),
)
"""a int8 [M, K], b int8 [K, N], any strides -> out_dtype (fp32, bf16, fp16) [M, N], contiguous.

    a_scale, a_zero  fp32, int32 or None: 0-d, [1, 1] or [M, 1]
    b_scale, b_zero  fp32, int32 or None: 0-d, [1, 1] or [1, N]
    bias             any float dtype, broadcastable to [M, N], or None

Errors: `KernelError`.
"""
LIBRARY.impl("scaled_mm", checked(check_scaled_mm, as_operator(cpu.scaled_mm)), "CPU")
