"""Quantize and dequantize with a learned scale, and the gradients of both.

    r      = float32(x) * (1 / scale)
    codes  = clamp(round_half_even(r), low, high)                    `qtrain::quantize`
    x_hat  = cast(codes * scale)                                     `qtrain::dequantize`

`form` says which codes there are at b bits:

    signed     -(2**(b-1) - 1) ... 2**(b-1) - 1      symmetric
    full       -2**(b-1)       ... 2**(b-1) - 1      every code
    unsigned    0              ... 2**b - 1          for what is never negative
    offset     low ... low + 2**b - 1 with low = -2**(b-1) - z, z = clamp(round(-offset / scale), -128, 127)

Gradients of <g, x_hat>, with rc = clamp(r, low, high), e = rc - round(rc), n elements that share a scale:

    to x       g * soft'(rc) * (1 + delta * sign(g) * e)             inside the clamp, 0 outside
    to scale   sum g * (round(rc) - rc * soft'(rc))                  inside; `low` below, `high` above
               / sqrt(n * high)
    to offset  sum g outside the clamp / sqrt(n * high)
    soft'(r)   = k / (2 atan(k/2) (1 + (k u)**2)),  u = r - floor(r) - 1/2,  k = sharpness

Without `sharpness`, soft' = 1, and with delta = 0 this is LSQ (arXiv 1902.08153), with an offset LSQ+ (arXiv 2004.09576). soft'
is the derivative of an arctangent soft round, and the factor with delta is the element-wise scaling of EWGS (CVPR 2021) on top:
our construction, not a paper's formula. `simulated` takes the scale's gradient from a central difference of x_hat instead (step
1 %; our construction too).

Our choices: the offset is rounded to a whole number of steps, so that zero has a code (a convolution pads with it: an int8) and
integer GEMMs can have it as a zero point; its slope beyond the clamp is that of the code, as in LSQ+. Unsigned codes of up to 7
bits are stored as the non-negative half of signed codes that are one bit wider: no zero point, so the fastest kernels run; 8 bits
need one. A tensor that is not finite makes x_hat NaN, as everywhere in qtrain: its codes alone would look harmless.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.estimators.statistics import statistics
from qcompile.ops._library import LIBRARY

__all__ = ["FORMS", "fake_quantize", "fake_quantize_codes", "levels", "soft_round_slope", "whole_zero_point"]

FORMS = ("signed", "full", "unsigned", "offset")

_FLAT = 1e-4
"""Smallest sharpness: in fp32 the slope is 1 there to rounding, and atan(k / 2) is no 0."""

_DIFFERENCE = 0.01
"""Relative step of the simulated gradient."""


def levels(bits: int, form: str) -> tuple[int, int]:
    """(low, high) in steps of the scale, before an offset."""
    if form == "unsigned":
        return 0, 2**bits - 1
    high = 2 ** (bits - 1) - 1
    return (-high if form == "signed" else -high - 1), high


def whole_zero_point(offset: Tensor, scale: Tensor) -> Tensor:
    """The code of zero, fp32: whole, and one that an int8 holds, however far training has moved the offset."""
    return torch.round(-offset / scale).clamp(-128, 127)


def soft_round_slope(r: Tensor, sharpness: Tensor) -> Tensor:
    """soft'(r): positive, of mean 1 over every cell [i, i + 1]; 1 everywhere as sharpness -> 0."""
    k = sharpness.clamp_min(_FLAT)
    u = r - torch.floor(r) - 0.5
    return k / (2 * torch.atan(k / 2) * (1 + (k * u) ** 2))


def fake_quantize_codes(
    x: Tensor, scale: Tensor, offset: Tensor | None, bits: int, form: str
) -> tuple[Tensor, Tensor | None]:
    """(codes int8, zero point int32 or None) of `qtrain::fake_quantize`'s forward."""
    quantize = torch.ops.qtrain.quantize
    if form == "signed":
        return quantize(x, scale, None, bits, None, 0), None
    if form == "unsigned" and bits < 8:
        return quantize(x.clamp_min(0), scale, None, bits + 1, None, 0), None
    zero = _zero_point(scale, offset, bits, form)
    return quantize(x, scale, zero, bits, None, 0), zero


def _zero_point(scale: Tensor, offset: Tensor | None, bits: int, form: str) -> Tensor:
    if offset is not None:
        return whole_zero_point(offset, scale).to(torch.int32)
    return torch.full_like(scale, -(2 ** (bits - 1)) if form == "unsigned" else 0, dtype=torch.int32)


class _FakeQuantize(torch.autograd.Function):
    """The formulas above. Forward: our operators, which the passes recognise. Backward: plain aten."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        offset: Tensor | None,
        sharpness: Tensor | None,
        bits: int,
        form: str,
        delta: float,
        simulated: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, offset, sharpness)
        ctx.bits, ctx.form, ctx.delta, ctx.simulated = bits, form, delta, simulated
        codes, zero = fake_quantize_codes(x, scale, offset, bits, form)
        return torch.ops.qtrain.dequantize(codes, _scale_or_nan(x, scale), zero, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, offset, sharpness = ctx.saved_tensors
        g = grads[0].to(torch.float32)
        low, high = levels(ctx.bits, ctx.form)
        bottom: Tensor | float = low
        top: Tensor | float = high
        if offset is not None:
            shift = whole_zero_point(offset, scale)
            bottom, top = low - shift, high - shift
        value = x.to(torch.float32)
        r = value * torch.reciprocal(scale)
        nearest = torch.round(r)
        below, above = r < bottom, r > top
        inside = ~(below | above)
        slope = None if sharpness is None else soft_round_slope(r, sharpness)
        through = g if slope is None else g * slope
        if ctx.delta:
            through = through * (1 + ctx.delta * torch.sign(g) * (r - nearest))
        to_x = torch.where(inside, through, 0.0).to(x.dtype)
        if ctx.simulated:
            to_scale = (_at(value, scale * (1 + _DIFFERENCE), bottom, top) - _at(value, scale * (1 - _DIFFERENCE), bottom, top)) / (
                2 * _DIFFERENCE * scale
            )
        else:
            to_scale = nearest - (r if slope is None else r * slope)
            to_scale = torch.where(below, float(low), torch.where(above, float(high), to_scale))
        share = _gradient_scale(x, scale, high)
        scale_grad = _sum_to(g * to_scale, scale) * share
        offset_grad = None if offset is None else _sum_to(torch.where(inside, 0.0, g), offset) * share
        return to_x, scale_grad, offset_grad, None, None, None, None, None


def _scale_or_nan(x: Tensor, scale: Tensor) -> Tensor:
    """The scale, NaN where the tensor was not finite."""
    amax = statistics(x, range(x.ndim), ("amax",))["amax"]
    return torch.where(amax.isfinite(), scale, math.nan)


def _at(value: Tensor, scale: Tensor, bottom: Tensor | float, top: Tensor | float) -> Tensor:
    low, high = (torch.as_tensor(v, dtype=torch.float32, device=value.device) for v in (bottom, top))
    return torch.minimum(torch.maximum(torch.round(value / scale), low), high) * scale


def _gradient_scale(x: Tensor, scale: Tensor, high: int) -> Tensor:
    """1 / sqrt(n * high). A tensor: with a dynamic batch n is symbolic."""
    shared = x.numel() // scale.numel()
    elements = torch.full((), shared * high, dtype=torch.float32, device=x.device)
    return elements.clamp_min(1).rsqrt()  # of an empty batch the sums are 0, and so must be their product


def _sum_to(value: Tensor, like: Tensor) -> Tensor:
    if like.ndim == 0:
        return value.sum()
    shared = [d for d in range(value.ndim) if like.shape[d] == 1]
    return value.sum(shared, keepdim=True) if shared else value


def _check(x: Tensor, scale: Tensor, offset: Tensor | None, bits: int, form: str) -> None:
    if form not in FORMS:
        raise KernelError(f"fake_quantize: form is {form!r}; allowed: {', '.join(FORMS)}.")
    if not 2 <= bits <= 8:
        raise ValueError(f"fake_quantize: bits is {bits}; allowed: 2 to 8 (a code is one int8).")
    if (form == "offset") != (offset is not None):
        raise KernelError(f"fake_quantize: form is {form!r} and offset is {offset}; the form 'offset', and only it, needs one.")


def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    sharpness: Tensor | None,
    bits: int,
    form: str,
    delta: float,
    simulated: bool,
) -> Tensor:
    _check(x, scale, offset, bits, form)
    return _FakeQuantize.apply(x, scale, offset, sharpness, bits, form, delta, simulated)


LIBRARY.define(
    "fake_quantize(Tensor x, Tensor scale, Tensor? offset, Tensor? sharpness, int bits, str form, float delta, bool simulated)"
    " -> Tensor"
)
# Composite: a trace takes it apart, so a joint graph holds our quantize and dequantize, and plain aten for the gradients.
LIBRARY.impl("fake_quantize", _fake_quantize, "CompositeImplicitAutograd")
fake_quantize = torch.ops.qtrain.fake_quantize.default
"""x (fp32, bf16, fp16) -> x_hat of the same dtype and shape, differentiable in x, scale and offset.

    scale, offset  fp32 > 0, fp32 or None: 0-d, or x.ndim axes with sizes 1 where shared
    sharpness      fp32 0-d: k of the soft round's slope; None: straight through
    bits, form     2 to 8, and one of `FORMS`
    delta          share by which the rounding error scales an element's gradient, in steps of the scale
    simulated      the scale's gradient by a central difference

Errors: `KernelError`; `ValueError` for bits.
"""
