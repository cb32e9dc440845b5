"""Statistics of a tensor.

A statistic is reduced over `dims`: over all axes it is 0-d, over some it keeps the tensor's axes with size 1. All are fp32.
Plain aten: they are traced into graphs, where Inductor fuses them with the tensor's producer, and reductions over the same axes
with each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from qcompile.estimators.base import STATISTICS, IntegerFormat, scale_and_zero_point

__all__ = ["Elements", "clipped_share", "coarser", "never_empty", "statistics"]


def statistics(x: Tensor, dims: Sequence[int], names: Iterable[str]) -> dict[str, Tensor]:
    """The named statistics of `x` over `dims`, of `STATISTICS`. Those of no element are 0."""
    filled = never_empty(x, dims)
    return {name: _reduced(x if name == "count" else filled, list(dims), name) for name in names}


def never_empty(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The tensor itself; with a zero where one of these axes turns out to be empty, if that is known at run time only.

    Such sizes ("unbacked", of data: the rows that were routed to an expert) have no graph of their own for 0 as others have, and
    amax of nothing is an error.
    """
    missing = [0] * x.ndim
    for d in dims:
        size = x.shape[d]
        if free_unbacked_symbols(size) and not statically_known_true(size > 0):
            missing[d] = torch.sym_max(1 - size, 0)
    if not any(isinstance(m, torch.SymInt) for m in missing):
        return x
    return torch.constant_pad_nd(x, [n for m in reversed(missing) for n in (0, m)], 0)


def _reduced(x: Tensor, dims: list[int], name: str) -> Tensor:
    keep = len(dims) != x.ndim
    count = _count(x, dims)
    empty = isinstance(x.numel(), int) and x.numel() == 0  # groups without elements, or no groups
    if name == "count" or empty:
        shape = [1 if d in dims else s for d, s in enumerate(x.shape)] if keep else []
        return x.new_ones(shape, dtype=torch.float32) * count
    match name:
        case "amax":
            return x.abs().amax(dims, keepdim=keep).to(torch.float32)
        case "min":
            return x.amin(dims, keepdim=keep).to(torch.float32)
        case "max":
            return x.amax(dims, keepdim=keep).to(torch.float32)
        case "mean":
            return x.to(torch.float32).mean(dims, keepdim=keep)
        case "mean_abs":
            return x.to(torch.float32).abs().mean(dims, keepdim=keep)
        case "std":
            return x.to(torch.float32).var(dims, correction=0, keepdim=keep).sqrt()
    raise ValueError(f"statistic {name!r} is not known; allowed: {', '.join(STATISTICS)}")


def coarser(value: Tensor, name: str) -> Tensor | None:
    """A statistic over all axes from the same one over some of them, where that is exact; else None."""
    value = never_empty(value, range(value.ndim))
    match name:
        case "amax" | "max":
            return value.amax()
        case "min":
            return value.amin()
    return None


def _count(x: Tensor, dims: Sequence[int]) -> int:
    count = 1
    for d in dims:
        count = count * x.shape[d]
    return count


def clipped_share(x: Tensor, dims: Sequence[int], low: Tensor | None, high: Tensor) -> Tensor:
    """Share of the elements outside [low, high] (of |x| above `high` if `low` is None), 0..1, in the shape of a statistic."""
    x = never_empty(x, dims).to(torch.float32)
    outside = x.abs() > high if low is None else (x < low) | (x > high)
    count = _count(x, dims)
    if isinstance(count, int) and count == 0:
        return torch.zeros_like(high)
    return outside.to(torch.float32).sum(list(dims), keepdim=len(dims) != x.ndim) / count


@dataclass(frozen=True)
class Elements:
    """A tensor as an estimator's `measure` sees it: its elements, in groups that share a scale.

    values  fp32, the tensor's shape; the estimator's statistics broadcast to it
    dims    the axes that share a scale
    format  bits, codes and symmetry that the range is for
    """

    values: Tensor
    dims: tuple[int, ...]
    format: IntegerFormat

    @property
    def bits(self) -> int:
        """Bits a code."""
        return self.format.bits

    @property
    def count(self) -> int:
        """Elements that share a scale; a symbolic size where the batch is dynamic."""
        return _count(self.values, self.dims)

    @property
    def _keep(self) -> bool:
        return len(self.dims) != self.values.ndim

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each group of what is given in the tensor's shape; fp32."""
        return values.to(torch.float32).sum(list(self.dims), keepdim=self._keep)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each group; of a condition, the share of the elements for which it holds."""
        return self.sum(values) / self.count

    def share_above(self, threshold: Tensor) -> Tensor:
        """Share (0..1) of the elements with |x| > threshold."""
        return self.mean(self.values.abs() > threshold)

    def constant(self, value: float) -> Tensor:
        """A number in the shape of a statistic."""
        return statistics(self.values, self.dims, ["count"])["count"] * 0 + value

    def sorted(self, values: Tensor) -> Tensor:
        """Each group's values in ascending order, along a new last axis: [..., count]; of an empty group one zero."""
        kept = [d for d in range(values.ndim) if d not in self.dims] if self._keep else []
        sizes = [self.values.shape[d] for d in kept]
        if isinstance(self.count, int) and self.count == 0:
            return values.new_zeros((*sizes, 1))
        return values.permute(*kept, *self.dims).reshape(*sizes, self.count).sort(-1).values

    def quantile(self, values: Tensor, share: float) -> Tensor:
        """The smallest value with at least `share` (0..1) of the group at or below it (nearest rank)."""
        ranked = self.sorted(values)
        rank = min(max(math.ceil(share * ranked.shape[-1]) - 1, 0), ranked.shape[-1] - 1)
        chosen = ranked[..., rank]
        return chosen.reshape(self.constant(0.0).shape) if self._keep else chosen

    def dequantized(self, low: Tensor, high: Tensor) -> Tensor:
        """The values as they come back from codes to nearest under that range."""
        scale, zero = scale_and_zero_point(low, high, self.format)
        codes = torch.round(self.values * torch.reciprocal(scale))
        if zero is None:
            return codes.clamp(self.format.qmin, self.format.qmax) * scale
        offset = zero.to(torch.float32)
        return ((codes + offset).clamp(self.format.qmin, self.format.qmax) - offset) * scale

    def sample(self, size: int) -> Elements:
        """About `size` elements of each group, evenly spaced; all of them where there are no more.

        The stride is odd to the length of a row, so that all columns take part. Where the size is dynamic,
        exactly `size`, by a multiplicative hash of their number.
        """
        x, count = self.values, self.count
        if isinstance(count, int) and count <= size:
            return self
        if not self._keep:
            flat = x.reshape(-1)
            if not isinstance(count, int):
                return Elements(flat[_spread(size, count, x.device)], (0,), self.format)
            row = x.shape[-1] if x.ndim else 1
            return Elements(flat[:: _stride(count, size, row)], (0,), self.format)
        if len(self.dims) != 1:
            return self
        (d,) = self.dims
        if not isinstance(count, int):
            return Elements(x.index_select(d, _spread(size, count, x.device)), self.dims, self.format)
        return Elements(x[(slice(None),) * d + (slice(None, None, count // size),)], self.dims, self.format)


def _stride(count: int, size: int, row: int) -> int:
    stride = count // size
    while stride > 1 and math.gcd(stride, row) != 1:
        stride -= 1
    return stride


def _spread(size: int, count: int, device: torch.device) -> Tensor:
    return (torch.arange(size, dtype=torch.int64, device=device) * 0x9E37_79B1) % count
