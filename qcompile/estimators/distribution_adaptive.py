"""Distribution adaptive ranges of gradients.

Source: Zhao et al., "Distribution Adaptive INT8 Quantization for Training CNNs" (AAAI 2021), arXiv 2102.04782, which we know by
its published explanations and a re-implementation. With g the gradients of one scale, sigma their standard deviation and
P = mean(|g| > sigma):

    P > 0.3   Gaussian     s[t] = max|g|
    else      inverted T   s[t] = (1 - k * A) * s[t-1] + A * max|g|,   k = 1, A = 0.8;   s[0] = max|g|

These are the paper's. Ours, where nothing was found: sigma is taken about the mean; classification at every step (`period`); the
scale of the whole tensor goes through the same rules as those of the channels.

The paper's other half, a scale for each output channel in the GEMM of the weight's gradient, is the recipe's: `PerRow()` for
`grad_output` in `grad_weight` (`int8_dai8`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile._checks import check_int, check_number
from qcompile.estimators.base import RangeEstimator, State, Stats, register_estimator
from qcompile.estimators.statistics import Elements


@register_estimator
@dataclass(frozen=True)
class DistributionAdaptive(RangeEstimator):
    """Maximum of what is Gaussian, averaged maximum of what has a long tail; dynamic.

    share_above_sigma  lambda of the paper, 0..1: above it, the elements count as Gaussian (a true Gaussian has 0.317).
    k, a               k and A of the paper; 0 < a <= 1, 0 <= k * a <= 1.
    period             steps between two classifications.

    State: `bound` (s), `gaussian` (1 or 0).
    """

    share_above_sigma: float = 0.3
    k: float = 1.0
    a: float = 0.8
    period: int = 1

    name: ClassVar[str] = "distribution_adaptive"
    asymmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("DistributionAdaptive.share_above_sigma", self.share_above_sigma, 0, 1)
        check_number("DistributionAdaptive.a", self.a, 0, 1, above=True)
        check_number("DistributionAdaptive.k", self.k, 0, 1 / self.a)
        check_int("DistributionAdaptive.period", self.period, "an int from 1", low=1)

    def statistics_for(self, symmetric: bool) -> tuple[str, ...]:
        return ("amax", "std")

    def measure(self, x: Elements, stats: Stats, state: State) -> dict[str, Tensor]:
        is_gaussian = (x.share_above(stats["std"]) > self.share_above_sigma).to(torch.float32)
        if self.period == 1:
            return {"gaussian": is_gaussian}
        due = torch.remainder(state["steps"], self.period) == 0
        return {"gaussian": torch.where(due, is_gaussian, state["gaussian"])}

    def state_fields(self, symmetric: bool) -> dict[str, float]:
        return {"bound": 0.0, "gaussian": 0.0}

    def _bound(self, stats: Stats, state: State) -> Tensor:
        tail = (1 - self.k * self.a) * state["bound"] + self.a * stats["amax"]
        return torch.where(stats["gaussian"] > 0, stats["amax"], tail)

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        bound = self._bound(stats, state)
        return -bound, bound

    def update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        return {"bound": self._bound(stats, state), "gaussian": stats["gaussian"]}

    def first_update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        return {"bound": stats["amax"], "gaussian": stats["gaussian"]}
