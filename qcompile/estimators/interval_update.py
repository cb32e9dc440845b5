"""An interval of gradients that follows the share of the large ones.

Source: Kim et al., "Toward INT4 Fixed-Point Training via Exploring Quantization Error for Gradients" (ECCV 2024), arXiv
2407.12637, and the authors' project page and release, from which the formulas and constants are. With b bits, g_max = max|G| of
the current gradient, and gamma one number a layer:

    range    [-gamma * g_max, gamma * g_max]
    R        = mean(|G| > gamma * g_max)
    T        = alpha / (2**b - 1),                              alpha = 1e-3
    gamma    = clip(gamma + beta * sign(R - T), 0.001, 1),      beta = 1e-3;   the new one from the next step on

The first tensor only sets gamma, `init`:

    "release"   gamma = 1, Rbar = 0; repeat R = mean(|G| > gamma * g_max); Rbar = 0.999 * Rbar + 0.001 * R;
                gamma += beta * sign(Rbar - T); until Rbar > T. (The release takes no optimizer step on it.)
    "quantile"  our choice, and the default: gamma = quantile(|G|, 1 - T) / g_max, where the update comes to rest.
    "one"       gamma = 1, and about 500 steps to come down.

Stochastic rounding of the codes is the recipe's (`int4_interval`).

Our choice too, for tensors of fewer than 1 / T elements (15,000 at 4 bits), in which a single clipped element makes R > T:
`small`: "alpha" takes `small_alpha` in place of alpha; "pool" averages R over as many steps as make 1 / T elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompile._checks import check_choice, check_number
from qcompile.estimators.base import RangeEstimator, State, Stats, register_estimator
from qcompile.estimators.statistics import Elements

LOWEST = 0.001
_KEPT = 0.999  # of Rbar, a step of the release's first search


@register_estimator
@dataclass(frozen=True)
class IntervalUpdate(RangeEstimator):
    """[-gamma * max|G|, gamma * max|G|] with a learnt gamma; one reduction before the quantize.

    alpha        share of the gradients that count as large, 0..1, above 0.
    beta         what gamma moves by in a step, 0..1; 0 fixes it at `fixed` or what `init` finds.
    init         "quantile", "release" or "one".
    small        what tensors too small for alpha do: "alpha" or "pool".
    small_alpha  their alpha.
    fixed        a constant gamma, for comparison (0.001..1); None: the method.

    State: `gamma`; with small="pool" also `share`, the pooled R. R itself is the bookkeeping's `clipped`.
    """

    alpha: float = 1e-3
    beta: float = 1e-3
    init: Literal["quantile", "release", "one"] = "quantile"
    small: Literal["alpha", "pool"] = "alpha"
    small_alpha: float = 1e-2
    fixed: float | None = None

    name: ClassVar[str] = "interval_update"
    asymmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("IntervalUpdate.alpha", self.alpha, 0, 1, above=True)
        check_number("IntervalUpdate.beta", self.beta, 0, 1)
        check_choice("IntervalUpdate.init", self.init, ("quantile", "release", "one"))
        check_choice("IntervalUpdate.small", self.small, ("alpha", "pool"))
        check_number("IntervalUpdate.small_alpha", self.small_alpha, 0, 1, above=True)
        if self.fixed is not None:
            check_number("IntervalUpdate.fixed", self.fixed, LOWEST, 1)

    def statistics_for(self, symmetric: bool) -> tuple[str, ...]:
        return ("amax", "count")

    def measure(self, x: Elements, stats: Stats, state: State) -> dict[str, Tensor]:
        if self.fixed is not None:
            return {}
        codes = 2**x.bits - 1
        target = x.constant(self.alpha / codes)
        if self.small == "alpha":
            target = torch.where(stats["count"] * target < 1 - 1e-6, self.small_alpha / codes, target)
        return {"target": target, "start": self._start(x, stats["amax"], target)}

    def state_fields(self, symmetric: bool) -> dict[str, float]:
        if self.fixed is not None:
            return {}
        return {"gamma": 1.0, "share": 0.0} if self.small == "pool" else {"gamma": 1.0}

    def reductions(self, symmetric: bool) -> dict[str, str]:
        return dict.fromkeys(self.state_fields(symmetric), "mean")

    def first_range(self, stats: Stats) -> tuple[Tensor, Tensor]:
        bound = stats["start"] * stats["amax"]
        return -bound, bound

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        bound = (state["gamma"] if self.fixed is None else self.fixed) * stats["amax"]
        return -bound, bound

    def update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        share = stats["clipped"]
        new = {}
        if self.small == "pool":
            fresh = (stats["count"] * stats["target"]).clamp_max(1.0)
            share = new["share"] = fresh * share + (1 - fresh) * state["share"]
        moved = state["gamma"] + self.beta * torch.sign(share - stats["target"])
        return {"gamma": moved.clamp(LOWEST, 1.0), **new}

    def first_update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        new = {"gamma": stats["start"]}
        return new | {"share": stats["target"]} if self.small == "pool" else new

    # ---- the first tensor

    def _start(self, x: Elements, amax: Tensor, target: Tensor) -> Tensor:
        if self.init == "one":
            return x.constant(1.0)
        sizes = x.sorted(x.values.abs())
        if self.init == "quantile":
            rank = (torch.ceil((1 - target.to(torch.float64)) * sizes.shape[-1]).to(torch.int64) - 1).clamp_min(0)
            gamma = sizes.gather(-1, rank.reshape(*sizes.shape[:-1], 1)).reshape(amax.shape) / amax
        else:
            gamma = self._release_start(sizes, amax, target)
        return torch.where(amax > 0, gamma.clamp(LOWEST, 1.0), 1.0)

    def _release_start(self, sizes: Tensor, amax: Tensor, target: Tensor) -> Tensor:
        """The release's loop without a loop: R at every gamma it could pass, and Rbar as a running sum."""
        step = self.beta or 1e-3
        turns = torch.arange(math.ceil(1 / step) + 200, dtype=torch.float64, device=sizes.device)
        gammas = 1.0 - step * turns
        flat = amax.reshape(*sizes.shape[:-1], 1)
        inside = torch.searchsorted(sizes, (gammas * flat).to(torch.float32), right=True)
        shares = 1.0 - inside.to(torch.float64) / sizes.shape[-1]
        weight = _KEPT**turns
        average = (1 - _KEPT) * weight * torch.cumsum(shares / weight, -1)
        stops = average > target.to(torch.float64).reshape(*sizes.shape[:-1], 1)
        last = stops.to(torch.int8).argmax(-1)  # the first turn with Rbar > T, in which gamma went up again
        return (1.0 - step * last.to(torch.float64) + step).to(torch.float32).reshape(amax.shape)
