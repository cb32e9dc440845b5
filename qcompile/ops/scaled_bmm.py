"""Integer product of a batch of matrices. B batches, M rows, N columns, K summed.

    acc[b, m, n] = sum_k (a[b, m, k] - a_zero[b, m]) * (b[b, k, n] - b_zero[b, n])             exact
    out[b, m, n] = cast(float32(acc) * (a_scale[b, m] * b_scale[b, n]) + float32(bias[b, m, n]))

The meaning is that of `scaled_mm`, matrix by matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile._sizes import same_size
from qcompile.errors import KernelError
from qcompile.kernels import cpu
from qcompile.kernels.quantized_tensor import as_operator
from qcompile.ops._checks import FLOATS, OUTPUTS, check_dtype, check_shared
from qcompile.ops._library import LIBRARY, checked, define

__all__ = ["check_scaled_bmm", "scaled_bmm", "scaled_bmm_reference"]


def scaled_bmm_reference(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`qtrain::scaled_bmm` in aten, unchecked. fp64 holds every integer up to 2**53: its sums are exact."""
    a64, b64 = a.to(torch.float64), b.to(torch.float64)
    if a_zero is not None:
        a64 = a64 - a_zero
    if b_zero is not None:
        b64 = b64 - b_zero
    out = torch.bmm(a64, b64).to(torch.float32) * (a_scale * b_scale)
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(out_dtype)


def check_scaled_bmm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Refuse operands that `qtrain::scaled_bmm` does not take, for every device. Errors: `KernelError`."""
    op = "scaled_bmm"
    for name, tensor in (("a", a), ("b", b)):
        check_dtype(op, name, tensor, torch.int8)
        if tensor.ndim != 3:
            raise KernelError(
                f"{op}: {name} has shape {list(tensor.shape)}; a batch of matrices is needed. Flatten the batch axes."
            )
    if not (same_size(a.shape[0], b.shape[0]) and same_size(a.shape[2], b.shape[1])):
        raise KernelError(
            f"{op}: a is {list(a.shape)} and b is {list(b.shape)}; the batches must be as many, and a's columns as b's rows."
        )
    (batch, m, _), n = a.shape, b.shape[2]
    for name, values, dtype, shape in (
        ("a_scale", a_scale, torch.float32, (batch, m, 1)),
        ("b_scale", b_scale, torch.float32, (batch, 1, n)),
        ("a_zero", a_zero, torch.int32, (batch, m, 1)),
        ("b_zero", b_zero, torch.int32, (batch, 1, n)),
    ):
        if values is not None:
            check_dtype(op, name, values, dtype)
            check_shared(op, name, values, shape)
    if bias is not None:
        check_dtype(op, "bias", bias, *FLOATS)
        check_shared(op, "bias", bias, (batch, m, n)[3 - bias.ndim :] if bias.ndim <= 3 else (batch, m, n))
    if out_dtype not in OUTPUTS:
        raise KernelError(f"{op}: out_dtype is {out_dtype}; allowed: {', '.join(map(str, OUTPUTS))}.")


def _fake(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]), dtype=rest[-1])


scaled_bmm = define(
    "scaled_bmm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? a_zero, Tensor? b_zero, "
    "Tensor? bias, ScalarType out_dtype) -> Tensor",
    checked(check_scaled_bmm, scaled_bmm_reference),
    fake=checked(check_scaled_bmm, _fake),
)
"""a int8 [B, M, K], b int8 [B, K, N], any strides -> out_dtype (fp32, bf16, fp16) [B, M, N], contiguous.

    a_scale, a_zero  fp32, int32 or None: 0-d, or [B, M, 1] with 1 where shared
    b_scale, b_zero  fp32, int32 or None: 0-d, or [B, 1, N] with 1 where shared
    bias             any float dtype, broadcastable to [B, M, N], or None

Errors: `KernelError`.
"""
LIBRARY.impl("scaled_bmm", checked(check_scaled_bmm, as_operator(cpu.scaled_bmm)), "CPU")
