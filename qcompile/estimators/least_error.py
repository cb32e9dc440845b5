"""Ranges of the current tensor that clip what is rare: by percentile, or by the least squared error.

Both are common calibration rules of quantization; the constants and the search are our choice. Dynamic and without memory; both
look at a sample of the tensor, the least error besides at its minimum and maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompile._checks import check_int, check_number
from qcompile.estimators.base import RangeEstimator, State, Stats, register_estimator
from qcompile.estimators.search import best_ratio, squared_error
from qcompile.estimators.statistics import Elements


@register_estimator
@dataclass(frozen=True)
class Percentile(RangeEstimator):
    """The range that holds a given share of the elements.

    symmetric   amax = the `share` quantile of |x|
    asymmetric  low, high = the (1 - share) / 2 and (1 + share) / 2 quantiles

    share   0..1, above 0; the quantile is the nearest rank's.
    sample  elements of each scale that are looked at, evenly spaced.
    """

    share: float = 0.999
    sample: int = 2**14

    name: ClassVar[str] = "percentile"

    def __post_init__(self) -> None:
        check_number("Percentile.share", self.share, 0, 1, above=True)
        check_int("Percentile.sample", self.sample, "an int from 16", low=16)

    def statistics_for(self, symmetric: bool) -> tuple[str, ...]:
        return ("amax",)  # a sample may miss what is not finite

    def measure(self, x: Elements, stats: Stats, state: State) -> dict[str, Tensor]:
        part = x.sample(self.sample)
        if x.format.symmetric:
            return {"high": part.quantile(part.values.abs(), self.share)}
        tail = (1 - self.share) / 2
        # Nearest rank from both ends: a mirrored tensor has a mirrored range.
        return {"low": -part.quantile(-part.values, 1 - tail), "high": part.quantile(part.values, 1 - tail)}

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        unfinite = stats["amax"] - stats["amax"]  # zero; NaN where the tensor is not finite (Inductor folds a product with zero)
        high = stats["high"] + unfinite
        return (stats["low"] + unfinite if "low" in stats else -high), high


@register_estimator
@dataclass(frozen=True)
class LeastSquaredError(RangeEstimator):
    """The clipping factor c that makes mean((x_quantized - x)**2) smallest; range [c * min, c * max] (c * amax).

    floor   the smallest factor tried, 0..1.
    sample  elements of each scale that the error is taken over, evenly spaced.
    """

    floor: float = 0.05
    sample: int = 2**12

    name: ClassVar[str] = "least_squared_error"

    def __post_init__(self) -> None:
        check_number("LeastSquaredError.floor", self.floor, 0, 1, above=True)
        check_int("LeastSquaredError.sample", self.sample, "an int from 16", low=16)

    def measure(self, x: Elements, stats: Stats, state: State) -> dict[str, Tensor]:
        low, high = self.first_range(stats)
        return {"ratio": best_ratio(x.sample(self.sample), low, high, squared_error, self.floor)}

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        low, high = self.first_range(stats)
        return stats["ratio"] * low, stats["ratio"] * high
