"""In-hindsight min-max: quantize with the range that past tensors left; measure the present one on the side.

Source: Fournarakis and Nagel, "In-Hindsight Quantization Range Estimation for Quantized Training", arXiv
2105.04246. With T the present tensor and eta the momentum, the range used at step t is

    low[t]  = (1 - eta) * min(T[t-1]) + eta * low[t-1]
    high[t] = (1 - eta) * max(T[t-1]) + eta * high[t-1]

The formula is known to us in its symmetric form, amax[t] = (1 - eta) * max|T[t-1]| + eta * amax[t-1], as a
later paper restates it (LUQ, arXiv 2112.10769, eq. 18); the min/max pair is our reconstruction, and so are
the dynamic first step (low[0] = min(T[0]), high[0] = max(T[0])) and the momentum of 0.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile._checks import check_share
from qcompile.estimators.base import RangeEstimator, State, Stats, register_estimator


@register_estimator
@dataclass(frozen=True)
class InHindsight(RangeEstimator):
    """Exponential average of past ranges; static: no pass over the tensor before it is quantized.

    momentum     share of the old range that is kept, 0..1; 0 takes the previous tensor's range as it is.
    max_clipped  our choice: where more than this share of the elements (0..1) lay outside the range used, the
                 new range is the present tensor's own. After a jump (the loss scale was doubled) the average
                 would clip for many steps. None is the paper's formula alone.
    """

    momentum: float = 0.9
    max_clipped: float | None = 0.05

    name: ClassVar[str] = "in_hindsight"

    def __post_init__(self) -> None:
        check_share("InHindsight.momentum", self.momentum)
        check_share("InHindsight.max_clipped", self.max_clipped, optional=True)

    @property
    def static(self) -> bool:
        return True

    def state_fields(self, symmetric: bool) -> dict[str, float]:
        return {"amax": 0.0} if symmetric else {"low": 0.0, "high": 0.0}

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        if "amax" in state:
            return -state["amax"], state["amax"]
        return state["low"], state["high"]

    def update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        present = {"amax": "amax"} if "amax" in state else {"low": "min", "high": "max"}
        restart = state["steps"] == 0
        if self.max_clipped is not None:
            restart = restart | (stats["clipped"] > self.max_clipped)
        return {
            field: torch.where(
                restart, stats[stat], (1 - self.momentum) * stats[stat] + self.momentum * state[field]
            )
            for field, stat in present.items()
        }
