"""An integer matrix product whose result leaves as codes: int8 in, int8 out.

    x      = scaled_mm(a, b, ...)                      rounded to out_dtype, as if it were written
    x      = relu(x)                                   with `relu`
    x      = where(gate < 0, 0, x)                     with `gate`: the backward of a ReLU whose mask rides in the sign of codes
    codes  = quantize(x, scale, zero_point, bits)      to nearest
    marked = where(x > 0, codes, -1)                   with `mark`: that mask, for codes that have no sign of their own
    statistics = [max|x|, min x, max x, share of x outside [low, high] (of |x| above high, if low is None)]

The range is known before the product, from past steps; the statistics are of the values before quantization. Nothing but codes and
four numbers is written: the values themselves live in a block of rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.estimators.statistics import clipped_share
from qcompile.kernels import cpu
from qcompile.kernels.quantized_tensor import Requantization, as_operator
from qcompile.ops._checks import check_dtype, check_shared, same_size
from qcompile.ops._library import LIBRARY, checked, define
from qcompile.ops.quantize import quantize_reference
from qcompile.ops.scaled_mm import check_scaled_mm, scaled_mm

__all__ = ["check_scaled_mm_requantize", "scaled_mm_requantize", "scaled_mm_requantize_reference"]


def scaled_mm_requantize_reference(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *requantization: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qtrain::scaled_mm_requantize` by its parts, unchecked; the last arguments are those of a `Requantization`."""
    to = Requantization(*requantization)
    x = scaled_mm(a, b, a_scale, b_scale, a_zero, b_zero, bias, out_dtype)
    if to.relu:
        x = torch.relu(x)
    if to.gate is not None:
        x = torch.where(to.gate < 0, 0.0, x)
    codes = quantize_reference(x, to.scale, to.zero_point, to.bits, None, 0)
    marked = torch.where(x > 0, codes, -1) if to.mark else codes.new_empty(0)
    wide = x.to(torch.float32)
    share = clipped_share(wide, [0, 1], to.low, to.high).reshape([])
    return codes, marked, torch.stack([wide.abs().amax(), wide.amin(), wide.amax(), share])


def check_scaled_mm_requantize(a: Tensor, b: Tensor, *rest: Any) -> None:
    """Refuse operands that `qtrain::scaled_mm_requantize` does not take, for every device. `KernelError`; `ValueError` (bits)."""
    op = "scaled_mm_requantize"
    check_scaled_mm(a, b, *rest[:6])
    to = Requantization(*rest[6:])
    shape = (a.shape[0], b.shape[1])
    if 0 in [size for size in shape if isinstance(size, int)]:
        raise KernelError(f"{op}: the result is {list(shape)}, which has no range; allowed: M and N above 0.")
    for name, value, dtype in (
        ("scale", to.scale, torch.float32),
        ("zero_point", to.zero_point, torch.int32),
        ("low", to.low, torch.float32),
        ("high", to.high, torch.float32),
    ):
        if value is not None:
            check_dtype(op, name, value, dtype)
            check_shared(op, name, value, (1, 1))
    if to.gate is not None:
        check_dtype(op, "gate", to.gate, torch.int8)
        if to.gate.ndim != 2 or not all(map(same_size, to.gate.shape, shape)):
            raise KernelError(f"{op}: gate has shape {list(to.gate.shape)}; allowed: {list(shape)}, as the result.")
    if not 2 <= to.bits <= 8:
        raise ValueError(f"{op}: bits is {to.bits}; allowed: 2 to 8 (a code is one int8).")


def _fake(a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (a.shape[0], b.shape[1])
    marked = a.new_empty(shape if rest[-1] else (0,), dtype=torch.int8)
    return a.new_empty(shape, dtype=torch.int8), marked, a.new_empty(4, dtype=torch.float32)


scaled_mm_requantize = define(
    "scaled_mm_requantize(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? a_zero, Tensor? b_zero, Tensor? bias, "
    "ScalarType out_dtype, bool relu, Tensor? gate, Tensor scale, Tensor? zero_point, int bits, Tensor? low, Tensor high, "
    "bool mark) -> (Tensor, Tensor, Tensor)",
    # A device without a kernel of its own writes the values and reads them back.
    checked(check_scaled_mm_requantize, scaled_mm_requantize_reference),
    fake=checked(check_scaled_mm_requantize, _fake),
)
"""a int8 [M, K], b int8 [K, N] -> codes int8 [M, N], marked int8 [M, N] (or [0]), statistics fp32 [4]; see the module.

    a_scale .. out_dtype  as in `scaled_mm`
    gate                  int8 [M, N] or None
    scale, zero_point     of the result, one for all: fp32, int32 or None; 0-d or [1, 1]
    low, high             fp32 like `scale`: the range used, for the share clipped

M and N above 0. Errors: `KernelError`; `ValueError` for bits.
"""
LIBRARY.impl("scaled_mm_requantize", checked(check_scaled_mm_requantize, as_operator(cpu.scaled_mm_requantize)), "CPU")
