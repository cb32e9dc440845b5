"""Current min-max: the range of the current tensor itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompile.estimators.base import RangeEstimator, State, Stats, register_estimator


@register_estimator
@dataclass(frozen=True)
class MinMax(RangeEstimator):
    """Dynamic, without memory: nothing is ever clipped, and a reduction comes before every quantize."""

    name: ClassVar[str] = "min_max"

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        return self.first_range(stats)
