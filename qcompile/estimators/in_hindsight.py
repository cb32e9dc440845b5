"""In-hindsight min-max: quantize with the range that past tensors left; measure the current one on the side.

Source: Fournarakis and Nagel, "In-Hindsight Quantization Range Estimation for Quantized Training", arXiv
2105.04246. With T the current tensor and eta the momentum, the range used at step t is

    low[t]  = (1 - eta) * min(T[t-1]) + eta * low[t-1]
    high[t] = (1 - eta) * max(T[t-1]) + eta * high[t-1]

The formula is known to us in its symmetric form, amax[t] = (1 - eta) * max|T[t-1]| + eta * amax[t-1], as a
later paper restates it (LUQ, arXiv 2112.10769, eq. 18); the min/max pair is our reconstruction, and so are
the dynamic first step (low[0] = min(T[0]), high[0] = max(T[0])) and the momentum of 0.9.

`RunningMinMax` is the method that the paper compares with: the current tensor takes part in its own range, so
a reduction comes before the quantize.

    low[t] = (1 - eta) * min(T[t]) + eta * low[t-1],   high likewise

`InHindsightMax` is a relative, the delayed scaling of fp8 training: the range is the largest of the last
`length` steps. It clips less than the average, and comes down later.

    amax[t] = max(max|T[t-1]|, ..., max|T[t-length]|)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile._checks import check_int, check_number, check_share
from qcompile.estimators.base import RangeEstimator, State, Stats, register_estimator


def _present(stats: Stats) -> dict[str, Tensor]:
    """The current tensor's range, under the names of the fields that remember one."""
    return {"amax": stats["amax"]} if "amax" in stats else {"low": stats["min"], "high": stats["max"]}


def _bounds(fields: State | dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return (-fields["amax"], fields["amax"]) if "amax" in fields else (fields["low"], fields["high"])


class _Average(RangeEstimator):
    """What averages of ranges share."""

    momentum: float

    def state_fields(self, symmetric: bool) -> dict[str, float]:
        return {"amax": 0.0} if symmetric else {"low": 0.0, "high": 0.0}

    def reductions(self, symmetric: bool) -> dict[str, str]:
        return {"amax": "max"} if symmetric else {"low": "min", "high": "max"}

    def update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        return {f: (1 - self.momentum) * now + self.momentum * state[f] for f, now in _present(stats).items()}

    def first_update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        return _present(stats)


@register_estimator
@dataclass(frozen=True)
class InHindsight(_Average):
    """Exponential average of past ranges; static: no pass over the tensor before it is quantized.

    momentum     share of the old range that is kept, 0..1; 0 takes the previous tensor's range as it is.
    max_clipped  our choice: where more than this share of the elements (0..1) lay outside the range used, the
                 new range is the current tensor's own.
    max_excess   our choice: the new range reaches no further than this many times the current tensor, >= 1. An
                 average forgets one garbage batch (a gradient of 1e27) only after hundreds of steps in which every
                 code is 0; under the default of 64 the next tensor has at least two levels of 8 bits.

    None for both is the paper's formula alone.
    """

    momentum: float = 0.9
    max_clipped: float | None = 0.05
    max_excess: float | None = 64.0

    name: ClassVar[str] = "in_hindsight"

    def __post_init__(self) -> None:
        check_share("InHindsight.momentum", self.momentum)
        check_share("InHindsight.max_clipped", self.max_clipped, optional=True)
        if self.max_excess is not None:
            check_number("InHindsight.max_excess", self.max_excess, 1.0, float("inf"))

    @property
    def static(self) -> bool:
        return True

    @property
    def restart_above(self) -> float | None:
        return self.max_clipped

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        return _bounds(state)

    def update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        new = super().update(stats, state)
        if self.max_excess is None:
            return new
        if "amax" in new:
            return {"amax": torch.minimum(new["amax"], self.max_excess * stats["amax"])}
        reach = self.max_excess * torch.maximum(stats["min"].abs(), stats["max"].abs())
        return {"low": torch.maximum(new["low"], -reach), "high": torch.minimum(new["high"], reach)}


@register_estimator
@dataclass(frozen=True)
class RunningMinMax(_Average):
    """Exponential average of ranges, the current one included.

    momentum  share of the old range that is kept, 0..1; 0 is `MinMax`.
    """

    momentum: float = 0.9

    name: ClassVar[str] = "running_min_max"

    def __post_init__(self) -> None:
        check_share("RunningMinMax.momentum", self.momentum)

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        return _bounds(self.update(stats, state))


@register_estimator
@dataclass(frozen=True)
class InHindsightMax(RangeEstimator):
    """The widest range of the last `length` tensors; static.

    length       steps remembered, 1..64. Our choice: the library that we know the method from keeps 1024; a
                 field of the state each, 16 cost little and are what fp8 recipes commonly take.
    max_clipped  as for `InHindsight`.
    """

    length: int = 16
    max_clipped: float | None = 0.05

    name: ClassVar[str] = "in_hindsight_max"

    def __post_init__(self) -> None:
        check_int("InHindsightMax.length", self.length, "an int from 1 to 64", low=1, high=64)
        check_share("InHindsightMax.max_clipped", self.max_clipped, optional=True)

    @property
    def static(self) -> bool:
        return True

    @property
    def restart_above(self) -> float | None:
        return self.max_clipped

    def _names(self, field: str) -> list[str]:
        """Oldest first."""
        return [f"{field}_{i}" for i in range(self.length)]

    def state_fields(self, symmetric: bool) -> dict[str, float]:
        kept = ("amax",) if symmetric else ("low", "high")
        return {name: 0.0 for field in kept for name in self._names(field)}

    def reductions(self, symmetric: bool) -> dict[str, str]:
        return {name: "min" if name.startswith("low") else "max" for name in self.state_fields(symmetric)}

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        def past(field: str) -> Tensor:
            return torch.stack([state[name] for name in self._names(field)])

        if "amax_0" in state:
            high = past("amax").amax(0)
            return -high, high
        return past("low").amin(0), past("high").amax(0)  # 0, before there is a value, is in every range

    def update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        new: dict[str, Tensor] = {}
        for field, now in _present(stats).items():
            names = self._names(field)
            new |= dict(zip(names, [*(state[name] for name in names[1:]), now], strict=True))
        return new

    def first_update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        new: dict[str, Tensor] = {}
        for field, now in _present(stats).items():
            names = self._names(field)
            new |= dict.fromkeys(names, torch.zeros_like(now)) | {names[-1]: now}
        return new
