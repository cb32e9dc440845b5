"""Real values to the grid of powers of two of a scale, from where `quantize` takes them into codes as they are.

    round_to_powers    m     = min(|x| * inv, 2**(2**(bits - 1) - 2))         inv = float32(1) / scale
                       low   = the largest power of two <= m, 0 where m < 1;  step = max(low, 1)
                       value = sign(x) * scale * (low + step * [m - low > v * step])

`v` is 1/2 without a seed (to nearest, a tie to the smaller magnitude), else 1/2 + the draw of `qcompile.ops.random`: up with the
probability of the distance, so the mean over draws is x, small values included. The grid has a bit for the sign and bits - 1 for an
exponent or zero: 4 bits hold 0, +-1, +-2, ... +-64, which an INT8 GEMM multiplies as it does any codes. That is what makes a
logarithmic format pay on integer hardware.

From LUQ (arXiv 2112.10769): the grid, stochastic pruning below it, stochastic rounding between powers. Ours: all 2**(bits - 1) - 1
magnitudes of the format are used, so the smallest is amax / 64 at 4 bits; codes are integers.

Every product by a power of two is exact, so the result over the scale is a power of two up to one rounding, and `quantize` (8 bits,
to nearest) gives that power whatever the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.ops._checks import FLOATS, check_dtype, check_shared
from qcompile.ops._library import define
from qcompile.ops.random import draw_key, draws_of_key

__all__ = ["round_to_powers", "round_to_powers_by_key", "round_to_powers_reference"]


def round_to_powers_reference(x: Tensor, scale: Tensor, bits: int, seed: Tensor | None, salt: int) -> Tensor:
    """`qtrain::round_to_powers` in aten, unchecked."""
    return round_to_powers_by_key(x, scale, bits, None if seed is None else draw_key(seed, salt))


def round_to_powers_by_key(x: Tensor, scale: Tensor, bits: int, key: Tensor | None) -> Tensor:
    """The same by the key of seed and salt: elementwise, without a logarithm, so that devices agree."""
    magnitudes = 2 ** (bits - 1) - 1
    value = x.to(torch.float32) * torch.reciprocal(scale)
    m = value.abs().clamp_max(2.0 ** (magnitudes - 1))
    low = (m >= 1).to(torch.float32)
    for exponent in range(1, magnitudes):
        low = low + torch.where(m >= 2.0**exponent, 2.0 ** (exponent - 1), 0.0)
    step = low.clamp_min(1.0)
    threshold = 0.5 * step if key is None else (draws_of_key(key, value) + 0.5) * step
    return torch.sign(value) * (low + torch.where(m - low > threshold, step, 0.0)) * scale


def _round_to_powers(x: Tensor, scale: Tensor, bits: int, seed: Tensor | None, salt: int) -> Tensor:
    check_dtype("round_to_powers", "x", x, *FLOATS)
    check_dtype("round_to_powers", "scale", scale, torch.float32)
    check_shared("round_to_powers", "scale", scale, x.shape)
    if not 2 <= bits <= 4:
        raise ValueError(f"round_to_powers: bits is {bits}; allowed: 2 to 4 (a code is one int8).")
    if seed is not None and (seed.dtype is not torch.int64 or seed.ndim != 0):
        given = f"{seed.dtype} of shape {list(seed.shape)}"
        raise KernelError(f"round_to_powers: seed is {given}; allowed: int64, 0-d, or None.")
    return round_to_powers_reference(x, scale, bits, seed, salt)


round_to_powers = define(
    "round_to_powers(Tensor x, Tensor scale, int bits, Tensor? seed, int salt) -> Tensor",
    _round_to_powers,
    fake=_round_to_powers,
)
"""x (fp32, bf16, fp16, fp64; any shape and strides) -> fp32 of the same shape, on the grid of `scale`.

    scale       fp32, the smallest magnitude of the grid: 0-d, or x.ndim axes with sizes 1 where shared
    bits        2 to 4
    seed, salt  int64 0-d and an int: stochastic rounding; seed None: to nearest

Errors: `KernelError`; `ValueError` for bits.
"""
