"""Measures of error: how far a tensor is from its reference, and what a quantization did to a tensor.

All sums are taken in fp64. A measure is `nan` if either tensor has an element that is not finite, or if it is not defined
for a reference of zeros. The ratio of signal to noise of two equal tensors is infinite, even if both are all zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.ops.quantize import code_range

__all__ = ["LARGE", "Agreement", "Rounding", "agreement", "rounding", "snr_db"]

LARGE = 0.01
"""The share of entries, largest magnitude first, that counts as large. Our choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far `value` is from `reference`, with `error = value - reference`.

    snr_db       10 log10(sum reference^2 / sum error^2); infinite where both are equal
    row_snr_db   the median of that over rows (the last axis), rows of zeros left out
    cosine       of the angle between the two, as vectors
    large_error  |error| / |reference| over the `LARGE` share of entries with the largest reference
    """

    snr_db: float
    row_snr_db: float
    cosine: float
    large_error: float


def agreement(value: Tensor, reference: Tensor) -> Agreement:
    """Compare two tensors of one shape, of any floating dtypes. Errors: `ValueError` for unequal shapes."""
    if value.shape != reference.shape:
        raise ValueError(f"agreement: shapes {tuple(value.shape)} and {tuple(reference.shape)}; they must be equal")
    got, want = value.detach().double(), reference.detach().double()
    error = got - want
    if not error.isfinite().all():
        return Agreement(snr_db=math.nan, row_snr_db=math.nan, cosine=math.nan, large_error=math.nan)
    norms = want.norm() * got.norm()
    return Agreement(
        snr_db=_snr(want.square().sum(), error.square().sum()),
        row_snr_db=_row_snr(want, error),
        cosine=float((got * want).sum() / norms) if norms > 0 else math.nan,
        large_error=_large_error(want.flatten(), error.flatten()),
    )


def snr_db(got: Tensor, want: Tensor) -> float:
    """10 log10(sum want^2 / sum (got - want)^2) of two tensors of one shape; infinite and `nan` as in the module's docstring."""
    got, want = got.detach().double(), want.detach().double()
    return _snr(want.square().sum(), (got - want).square().sum())


def _snr(signal: Tensor, noise: Tensor) -> float:
    signal_power, noise_power = float(signal), float(noise)
    if not math.isfinite(signal_power) or not math.isfinite(noise_power):
        return math.nan
    if noise_power == 0:
        return math.inf
    return 10 * math.log10(signal_power / noise_power) if signal_power > 0 else math.nan


def _row_snr(want: Tensor, error: Tensor) -> float:
    if want.ndim < 2 or not error.any():
        return _snr(want.square().sum(), error.square().sum())
    signal, noise = want.square().sum(-1).flatten(), error.square().sum(-1).flatten()
    ratios = (signal / noise)[signal > 0]  # infinite for an exact row
    return 10 * math.log10(float(ratios.quantile(0.5, interpolation="lower"))) if 0 < len(ratios) <= 2**24 else math.nan


def _large_error(want: Tensor, error: Tensor) -> float:
    if want.numel() == 0:
        return math.nan
    largest = want.abs().topk(max(1, int(LARGE * want.numel()))).indices
    size = want[largest].norm()
    return float(error[largest].norm() / size) if size > 0 else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """What quantizing a tensor did to it.

    amax       the largest magnitude of the tensor
    limit      the largest magnitude that a code stands for: how far the range reaches
    clipped    share of the elements that lay outside the range, by more than rounding
    underflow  share of the elements other than zero that got the code of zero
    snr_db     of the dequantized tensor against the tensor
    """

    amax: float
    limit: float
    clipped: float
    underflow: float
    snr_db: float


def rounding(x: Tensor, dequantized: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Rounding:
    """Measure a quantization of x with `scale` and `zero_point` (as `qtrain::quantize` takes them) and its result."""
    qmin, qmax = code_range(bits, symmetric=zero_point is None)
    zero = 0 if zero_point is None else zero_point.double()
    x, dequantized, scale = x.detach().double(), dequantized.detach().double(), scale.double()
    code = x / scale + zero  # before rounding and clamping
    reach = torch.maximum((qmax - zero) * scale, (zero - qmin) * scale)
    return Rounding(
        amax=float(x.abs().amax()) if x.numel() else 0.0,
        limit=float(reach.amax()) if reach.numel() else 0.0,
        clipped=_share((code > qmax + 0.5) | (code < qmin - 0.5)),
        underflow=_share(dequantized[x != 0] == 0),
        snr_db=_snr(x.square().sum(), (dequantized - x).square().sum()),
    )


def _share(which: Tensor) -> float:
    return float(which.to(torch.float64).mean()) if which.numel() else 0.0
