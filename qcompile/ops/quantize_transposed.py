"""Codes of a matrix in both orientations, and statistics of it, from one read.

    codes    = quantize(x, scale, ...)                 the meaning of `qtrain::quantize`
    codes_t  = codes.t(), contiguous
    amax     = max |x|                                 fp32; NaN if any x is NaN
    outside  = number of x with |x| > bound            int64

What `qtrain::quantize`, `qtrain::transpose_codes` and two reductions compute, each of which reads a matrix of its own. Int8 tensor
cores read both operands with the summed axis contiguous, so a gradient is needed in both orientations and a weight in two halves of
a step: on a GPU this is one kernel. In bf16 it moves 4 bytes a value (2 read, 1 + 1 written); apart they move 5, and 2 more for the
statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.ops._checks import check_dtype
from qcompile.ops._library import checked, define
from qcompile.ops.quantize import check_quantize, quantize_reference

__all__ = ["check_quantize_transposed", "quantize_transposed", "quantize_transposed_reference"]


def quantize_transposed_reference(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    seed: Tensor | None,
    salt: int,
    codes: bool,
    amax: bool,
    bound: Tensor | None,
) -> list[Tensor]:
    """`qtrain::quantize_transposed` in aten, unchecked."""
    straight = quantize_reference(x, scale, zero_point, bits, seed, salt).contiguous()
    outputs = [straight] if codes else []
    outputs.append(straight.t().clone(memory_format=torch.contiguous_format))
    magnitude = x.to(torch.float32).abs()
    if amax:
        outputs.append(magnitude.amax() if x.numel() else magnitude.sum())
    if bound is not None:
        outputs.append((magnitude > bound).sum())
    return outputs


def check_quantize_transposed(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    seed: Tensor | None,
    salt: int,
    codes: bool,
    amax: bool,
    bound: Tensor | None,
) -> None:
    """Refuse what `qtrain::quantize_transposed` does not take, for every device. `KernelError`; `ValueError` (bits)."""
    op = "quantize_transposed"
    if x.ndim != 2:
        raise KernelError(f"{op}: x has shape {list(x.shape)}; a matrix is needed. Flatten the leading axes.")
    check_quantize(x, scale, zero_point, bits, seed, salt)
    if bound is not None:
        check_dtype(op, "bound", bound, torch.float32)
        if bound.ndim != 0:
            raise KernelError(f"{op}: bound has shape {list(bound.shape)}; allowed: 0-d, or None.")


def _fake(x: Tensor, *rest: Any) -> list[Tensor]:
    codes, amax, bound = rest[-3:]
    m, n = x.shape
    outputs = [x.new_empty((m, n), dtype=torch.int8)] if codes else []
    outputs.append(x.new_empty((n, m), dtype=torch.int8))
    outputs += [x.new_empty((), dtype=torch.float32)] * amax
    if bound is not None:
        outputs.append(x.new_empty((), dtype=torch.int64))
    return outputs


quantize_transposed = define(
    "quantize_transposed(Tensor x, Tensor scale, Tensor? zero_point, int bits, Tensor? seed, int salt, bool codes, bool amax, "
    "Tensor? bound) -> Tensor[]",
    checked(check_quantize_transposed, quantize_transposed_reference),
    fake=checked(check_quantize_transposed, _fake),
)
"""x (fp32, bf16, fp16, fp64) [M, N], any strides -> the outputs that are asked for, in this order:

    codes      with `codes`: int8 [M, N], contiguous
    codes_t    always: int8 [N, M], contiguous
    amax       with `amax`: fp32, 0-d, in units of x
    outside    with a `bound` (fp32, 0-d, in units of x): int64, 0-d

The other operands are those of `qtrain::quantize`. Errors: `KernelError`; `ValueError` for bits.
"""
