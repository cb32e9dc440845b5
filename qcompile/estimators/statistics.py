"""Statistics of a tensor, and the range of the present one.

A statistic is reduced over `dims`: over all axes it is 0-d, over some it keeps the tensor's axes with size 1. All are fp32.
Plain aten: they are traced into graphs, where Inductor fuses them with the tensor's producer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qcompile.estimators.base import scale_and_zero_point
from qcompile.specs import QuantSpec

__all__ = ["clipped_share", "first_scale_and_zero_point", "statistics"]


def statistics(x: Tensor, dims: Sequence[int], names: Iterable[str]) -> dict[str, Tensor]:
    """The named statistics of `x` over `dims`: "amax", "min", "max". Those of no element are 0."""
    return {name: _reduced(x, dims, name) for name in names}


def _reduced(x: Tensor, dims: Sequence[int], name: str) -> Tensor:
    dims, keep = list(dims), len(dims) != x.ndim
    if any(isinstance(x.shape[d], int) and x.shape[d] == 0 for d in dims):
        shape = [1 if d in dims else s for d, s in enumerate(x.shape)] if keep else []
        return x.new_zeros(shape, dtype=torch.float32)
    if name == "amax":
        return x.abs().amax(dims, keepdim=keep).to(torch.float32)
    if name == "min":
        return x.amin(dims, keepdim=keep).to(torch.float32)
    if name == "max":
        return x.amax(dims, keepdim=keep).to(torch.float32)
    raise ValueError(f"statistic {name!r} is not known; allowed: amax, min, max")


def clipped_share(x: Tensor, dims: Sequence[int], low: Tensor | None, high: Tensor) -> Tensor:
    """Share of the elements outside [low, high] (of |x| above `high` if `low` is None), 0..1, in the shape of a statistic."""
    dims, keep = list(dims), len(dims) != x.ndim
    x = x.to(torch.float32)
    outside = x.abs() > high if low is None else (x < low) | (x > high)
    count = 1
    for d in dims:
        count = count * x.shape[d]
    if isinstance(count, int) and count == 0:
        return torch.zeros_like(high)
    return outside.to(torch.float32).sum(dims, keepdim=keep) / count


def first_scale_and_zero_point(x: Tensor, dims: Sequence[int], spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale (fp32) and zero point (int32) by which the present tensor alone would be quantized."""
    stats = statistics(x, dims, spec.estimator.statistics_for(spec.symmetric))
    low, high = spec.estimator.first_range(stats)
    scale, zero_point = scale_and_zero_point(low, high, spec)
    return scale, torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
