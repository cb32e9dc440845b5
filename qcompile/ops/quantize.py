"""Real values to integer codes and back.

    quantize    code = clamp(round_half_even(float32(x) * inv + u) + zero_point, qmin, qmax)
                inv = float32(1) / scale
    dequantize  hp   = cast((float32(code) - zero_point) * scale)

`u` is the draw of `qcompile.ops.random` with a seed, and absent without one. One multiplication by a rounded
reciprocal instead of a division: every implementation does it so, and a GPU's division is slow. Without a
zero point the codes are symmetric, -qmax ... qmax with qmax = 2**(bits - 1) - 1; with one they use all
2**bits values.

The references are the meaning *and* what a graph is lowered to: few elementwise operators that Inductor fuses
into the producer of x, and no int64 tensor unless draws are written out. The fakes run them too (of
quantize what decides the strides), so that fake strides cannot differ from real ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.ops._checks import FLOATS, OUTPUTS, check_dtype, check_shared
from qcompile.ops._library import checked, define
from qcompile.ops.random import check_key, draw_key, draws_of_key, has_lowering

__all__ = ["code_range", "codes", "dequantize", "dequantize_reference", "quantize", "quantize_by_key", "quantize_reference"]


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """(qmin, qmax) of `bits` bits, 2 to 8; symmetric codes leave out -2**(bits - 1)."""
    qmax = 2 ** (bits - 1) - 1
    return (-qmax if symmetric else -qmax - 1), qmax


def quantize_reference(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, seed: Tensor | None, salt: int
) -> Tensor:
    """`qtrain::quantize` in aten, unchecked."""
    return _arithmetic(x, scale, zero_point, bits, None if seed is None else draw_key(seed, salt))


def quantize_by_key(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, key: Tensor | None) -> Tensor:
    """The same by the key of seed and salt (`qtrain::draw_keys`), which a graph computes for all its quantizes at once.

    Where Inductor has a lowering of `qtrain::codes` it is that, else its arithmetic.
    """
    return (codes if has_lowering(x, scale) else _arithmetic)(x, scale, zero_point, bits, key)


def _arithmetic(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, key: Tensor | None) -> Tensor:
    qmin, qmax = code_range(bits, symmetric=zero_point is None)
    value = x.to(torch.float32) * torch.reciprocal(scale)
    if key is not None:
        value = value + draws_of_key(key, value)
    value = torch.round(value)  # half to even
    if zero_point is not None:
        value = value + zero_point.to(torch.float32)  # exact: integers below 2**24, or far outside the clamp
    return torch.clamp(value, qmin, qmax).to(torch.int8)


def dequantize_reference(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`qtrain::dequantize` in aten, unchecked."""
    value = codes.to(torch.float32)
    if zero_point is not None:
        value = value - zero_point.to(torch.float32)
    return (value * scale).to(dtype)


def _check_ranges(op: str, shape: torch.Size, scale: Tensor, zero_point: Tensor | None) -> None:
    check_dtype(op, "scale", scale, torch.float32)
    check_shared(op, "scale", scale, shape)
    if zero_point is not None:
        check_dtype(op, "zero_point", zero_point, torch.int32)
        check_shared(op, "zero_point", zero_point, shape)


def check_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, seed: Tensor | None, salt: int
) -> None:
    """Refuse what `qtrain::quantize` does not take, for every device. `KernelError`; `ValueError` (bits)."""
    check_dtype("quantize", "x", x, *FLOATS)
    _check_ranges("quantize", x.shape, scale, zero_point)
    if not 2 <= bits <= 8:
        raise ValueError(f"quantize: bits is {bits}; allowed: 2 to 8 (a code is one int8).")
    if seed is not None and (seed.dtype is not torch.int64 or seed.ndim != 0):
        raise KernelError(
            f"quantize: seed is {seed.dtype} of shape {list(seed.shape)}; allowed: int64, 0-d, or None."
        )


def check_dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> None:
    """Refuse operands that `qtrain::dequantize` does not take, for every device. Errors: `KernelError`."""
    check_dtype("dequantize", "codes", codes, torch.int8)
    _check_ranges("dequantize", codes.shape, scale, zero_point)
    if dtype not in OUTPUTS:
        raise KernelError(f"dequantize: dtype is {dtype}; allowed: {', '.join(map(str, OUTPUTS))}.")


def _check_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, key: Tensor | None) -> None:
    check_quantize(x, scale, zero_point, bits, None, 0)
    if key is not None:
        check_key("codes", key)


def _empty_codes(x: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    """For fakes: the codes get the strides of the product."""
    return torch.empty_like(x.to(torch.float32) * torch.reciprocal(scale), dtype=torch.int8)


_checked_dequantize = checked(check_dequantize, dequantize_reference)

quantize = define(
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, int bits, Tensor? seed, int salt) -> Tensor",
    checked(check_quantize, quantize_reference),
    fake=checked(check_quantize, _empty_codes),
)
"""x (fp32, bf16, fp16, fp64; any shape and strides) -> codes int8 of the same shape.

    scale       fp32, real value per code: 0-d, or x.ndim axes with sizes 1 where shared
    zero_point  int32 like `scale`, or None: symmetric codes
    bits        2 to 8
    seed, salt  int64 0-d and an int: stochastic rounding; seed None: to nearest, ties to even

The codes have the strides that an elementwise operator would give them. The code of a NaN is unspecified.
Errors: `KernelError`; `ValueError` for bits.
"""

codes = define(
    "codes(Tensor x, Tensor scale, Tensor? zero_point, int bits, Tensor? key) -> Tensor",
    checked(_check_codes, _arithmetic),
    fake=checked(_check_codes, _empty_codes),
)
"""`qtrain::quantize` by the key of seed and salt (int64, one element, of `draw_keys`; None: to nearest).

What a quantize becomes where Inductor has a lowering of this operator (`qcompile.backend.inductor_operations`). Errors: those of
`quantize`.
"""

dequantize = define(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, ScalarType dtype) -> Tensor",
    _checked_dequantize,
    fake=_checked_dequantize,
)
"""codes int8 -> real values of `dtype` (fp32, bf16, fp16); scale, zero_point, strides as in `quantize`.

Errors: `KernelError`.
"""
