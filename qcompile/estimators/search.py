"""Which part of a tensor's range serves it best: a search over clipping factors.

    ratio = argmin over c in (0, 1] of error(x, [c * low, c * high])

All of it is our choice: a grid of `POINTS` factors, then one as fine around the best of them, on a sample. Two passes over the
sample whatever the number of factors, where a golden section would take one for each; no assumption that the error has one
minimum only. The factor is exact to (1 - floor) / POINTS**2 * 2 of the grid's own minimum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.estimators.statistics import Elements

__all__ = ["POINTS", "angle_error", "angle_error_that_counts", "best_ratio", "squared_error"]

POINTS = 16

NO_TURN = 1e-6
"""An angle's d that is none: a tenth of what rounding to 8 bits does to a tensor of evenly spread values."""

Error = Callable[[Elements, Tensor], Tensor]
"""(elements, their quantized values) -> error of each group that shares a scale."""


def squared_error(x: Elements, quantized: Tensor) -> Tensor:
    """Mean of (quantized - x)**2."""
    return x.mean((quantized - x.values).square())


def angle_error(x: Elements, quantized: Tensor) -> Tensor:
    """d = 1 - cos(angle between x and its quantized values), 0..2; 0 for a tensor of zeros.

    From sin**2, by what is not along x: 1 - cos itself would lose all its digits in fp32, d being about 1e-5 at 8 bits.
    """
    xx, qq, xq = x.sum(x.values.square()), x.sum(quantized.square()), x.sum(quantized * x.values)
    across = x.sum((quantized - x.values * (xq / xx)).square())
    sin2 = (across / qq).clamp(0.0, 1.0)
    cos = (1.0 - sin2).sqrt() * torch.sign(xq)
    d = torch.where(cos > 0, sin2 / (1.0 + cos), 1.0 - cos)
    return torch.where(xx > 0, torch.where(qq > 0, d, 1.0), 0.0)


def angle_error_that_counts(x: Elements, quantized: Tensor) -> Tensor:
    """For a search: what turns x by less than `NO_TURN` does not turn it.

    Elements of one size keep their direction under any clipping, and the least would make them 20 times smaller.
    """
    return angle_error(x, quantized).clamp(min=NO_TURN)


def best_ratio(x: Elements, low: Tensor, high: Tensor, error: Error, floor: float) -> Tensor:
    """The factor in [floor, 1], of statistic shape, that makes `error` smallest, the largest of several; see the module."""
    step = (1.0 - floor) / (POINTS - 1)
    coarse = floor + step * _ramp(0, POINTS, low)
    best = _pick(x, low, high, error, coarse)
    # Between the neighbours of the best, itself included.
    fine = best.unsqueeze(0) + step * _ramp(-POINTS + 1, POINTS, low, 2) / POINTS
    return _pick(x, low, high, error, fine.clamp(floor, 1.0))


def _ramp(start: int, stop: int, like: Tensor, stride: int = 1) -> Tensor:
    values = torch.arange(start, stop, stride, dtype=torch.float32, device=like.device)
    return values.reshape(-1, *[1] * like.ndim)


def _pick(x: Elements, low: Tensor, high: Tensor, error: Error, ratios: Tensor) -> Tensor:
    """Of the ratios [P, ...], broadcastable to [P, *statistic], the best for each group."""
    scalar = low.ndim == 0
    lifted = Elements(x.values.unsqueeze(0), tuple(d + 1 for d in x.dims), x.format)
    shape = [ratios.shape[0], *([1] * x.values.ndim if scalar else low.shape)]
    ratios = (ratios.reshape(-1, *[1] * x.values.ndim) if scalar else ratios).expand(shape)
    errors = error(lifted, lifted.dequantized(ratios * low, ratios * high)).expand(shape)
    best = ratios.flip(0).gather(0, errors.flip(0).argmin(0, keepdim=True)).squeeze(0)  # argmin takes the first of equal ones
    return best.reshape([]) if scalar else best
