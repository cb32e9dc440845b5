"""Ranges of a few standard deviations: where learned ranges of weights and activations start.

Source: the release of Kim et al. (arXiv 2407.12637) starts its learned ranges there:

    weights, and activations that can be negative   3 * std(x)
    activations that cannot (after a ReLU)          [0, 3 * std(x) / sqrt(1 - 2 / pi)]: std of the half normal distribution

and then *learns* them, at a rate of 1e-5. Ours: instead of learning, the range follows the tensors' own deviation, as an average
of past ones; std is divided by the number of elements, not by one less; and the range reaches a tensor that lies far from zero,
for its deviation: of elements that are alike it would be 0, and they with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile._checks import check_number, check_share
from qcompile.estimators.base import RangeEstimator, State, Stats, register_estimator

_HALF_NORMAL = math.sqrt(1 - 2 / math.pi)


@register_estimator
@dataclass(frozen=True)
class Sigma(RangeEstimator):
    """`multiple` standard deviations of past tensors; static.

    symmetric   [-m * std, m * std]
    asymmetric  [0, m * std / sqrt(1 - 2 / pi)] if the first tensor has no negative element, else as symmetric

    Never less than the mean (symmetric), or than the element next to zero where all have one sign (asymmetric).

    multiple  above 0.
    momentum  share of the old deviation that is kept, 0..1; 1 keeps the first tensor's, the release's start without learning.

    State: `bound`, the range's upper end; asymmetric also `signed`, 1 or 0.
    """

    multiple: float = 3.0
    momentum: float = 0.9

    name: ClassVar[str] = "sigma"

    def __post_init__(self) -> None:
        check_number("Sigma.multiple", self.multiple, 0, math.inf, above=True)
        check_share("Sigma.momentum", self.momentum)

    @property
    def static(self) -> bool:
        return True

    def statistics_for(self, symmetric: bool) -> tuple[str, ...]:
        return ("std", "mean") if symmetric else ("std", "min", "max")

    def state_fields(self, symmetric: bool) -> dict[str, float]:
        return {"bound": 0.0} if symmetric else {"bound": 0.0, "signed": 0.0}

    def _bound(self, stats: Stats, signed: Tensor | None) -> Tensor:
        bound = self.multiple * stats["std"]
        if signed is None:
            return torch.maximum(bound, stats["mean"].abs())
        bound = torch.where(signed > 0, bound, bound / _HALF_NORMAL)
        return torch.maximum(bound, torch.maximum(stats["min"], -stats["max"]))  # the element next to zero, of one sign

    def _first(self, stats: Stats) -> dict[str, Tensor]:
        if "min" not in stats:
            return {"bound": self._bound(stats, None)}
        signed = (stats["min"] < 0).to(torch.float32)
        return {"bound": self._bound(stats, signed), "signed": signed}

    def _range(self, fields: State) -> tuple[Tensor, Tensor]:
        bound = fields["bound"]
        return (-bound if "signed" not in fields else -bound * fields["signed"]), bound

    def first_range(self, stats: Stats) -> tuple[Tensor, Tensor]:
        return self._range(self._first(stats))

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        return self._range(state)

    def update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        signed = state.get("signed")
        bound = (1 - self.momentum) * self._bound(stats, signed) + self.momentum * state["bound"]
        return {"bound": bound} if signed is None else {"bound": bound, "signed": signed}

    def first_update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        return self._first(stats)
