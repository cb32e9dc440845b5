"""Direction sensitive clipping of gradients, and learning rates that shrink with the deviation that remains.

Source: Zhu et al., "Towards Unified INT8 Training for Convolutional Neural Network" (CVPR 2020), arXiv 1912.12607, which we know
by published notes. With g a layer's gradient and g_hat its quantized values under clipping at c:

    d(c) = 1 - <g, g_hat> / (|g| * |g_hat|)
    c    = argmin d(c)                                            direction sensitive gradient clipping
    learning rate of the layer *= max(exp(-a * d), b),  a = 20, b = 0.1    deviation counteractive scaling

These are the paper's. Ours, where nothing was found: how c is searched (`qcompile.estimators.search`, on a sample), that of
several c that turn nothing the widest counts, that a new c counts every `period` steps, and that between searches c keeps its ratio
to the current max|g|, so that a change of the loss scale changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from qcompile._checks import check_int, check_number
from qcompile.errors import StateError
from qcompile.estimators.base import RangeEstimator, State, Stats, register_estimator
from qcompile.estimators.search import angle_error, angle_error_that_counts, best_ratio
from qcompile.estimators.statistics import Elements
from qcompile.wrappers import clean_names

if TYPE_CHECKING:
    from qcompile.state.range_state import RangeState

__all__ = ["DirectionSensitive", "learning_rate_factors", "scale_learning_rates"]


@register_estimator
@dataclass(frozen=True)
class DirectionSensitive(RangeEstimator):
    """[-c, c] with the c that turns the gradient least; one reduction before the quantize.

    period  steps between two searches that count. (Each step searches: on a sample that costs less than a branch.)
    floor   smallest c that is tried, as a share of max|g|, 0..1.
    sample  elements of each scale that the deviation is taken over, evenly spaced.

    State: `ratio`, c over max|g|; `deviation`, d of the last tensor under the range it was quantized with.
    """

    period: int = 100
    floor: float = 0.05
    sample: int = 2**12

    name: ClassVar[str] = "direction_sensitive"
    asymmetric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_int("DirectionSensitive.period", self.period, "an int from 1", low=1)
        check_number("DirectionSensitive.floor", self.floor, 0, 1, above=True)
        check_int("DirectionSensitive.sample", self.sample, "an int from 16", low=16)

    def statistics_for(self, symmetric: bool) -> tuple[str, ...]:
        return ("amax",)

    def measure(self, x: Elements, stats: Stats, state: State) -> dict[str, Tensor]:
        part, amax = x.sample(self.sample), stats["amax"]
        found = best_ratio(part, -amax, amax, angle_error_that_counts, self.floor)
        used = torch.where(state["steps"] > 0, state["ratio"], found) * amax
        deviation = angle_error(part, part.dequantized(-used, used)).reshape(amax.shape)
        due = torch.remainder(state["steps"], self.period) == 0
        return {"found": found, "next": torch.where(due, found, state["ratio"]), "deviation": deviation}

    def state_fields(self, symmetric: bool) -> dict[str, float]:
        return {"ratio": 1.0, "deviation": 0.0}

    def reductions(self, symmetric: bool) -> dict[str, str]:
        return {"ratio": "mean", "deviation": "mean"}

    def first_range(self, stats: Stats) -> tuple[Tensor, Tensor]:
        return -stats["found"] * stats["amax"], stats["found"] * stats["amax"]

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        return -state["ratio"] * stats["amax"], state["ratio"] * stats["amax"]

    def update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        return {"ratio": stats["next"], "deviation": stats["deviation"]}


def learning_rate_factors(state: RangeState, *, a: float = 20.0, b: float = 0.1) -> dict[str, float]:
    """Name of a module with Parameters -> max(exp(-a * d), b), where the range state of its gradient keeps the deviation d.

    a, b  of the paper; a above 0, b 0..1. Reads the state: on a GPU it waits for the step to end.
    Errors: `StateError` if no gradient has a `DirectionSensitive` range.
    """
    check_number("learning_rate_factors.a", a, 0, math.inf, above=True)
    check_number("learning_rate_factors.b", b, 0, 1)
    deviations: dict[str, float] = {}
    for name, fields in state.snapshot().items():
        module, _, operand = name.rpartition(".")
        if not operand.startswith("grad_output") or "deviation" not in fields:
            continue
        owner, is_no_layer, product = module.partition(":")
        if is_no_layer and "#" not in product:  # of activations: there is no rate
            continue
        layer = owner.rpartition(".")[0] if is_no_layer else module.partition("#")[0]  # "proj#1": its second use in a step
        deviations[layer] = max(deviations.get(layer, 0.0), float(fields["deviation"].max()))
    if not deviations:
        raise StateError(
            "learning_rate_factors: no gradient's range keeps a deviation. Train a step first, under a recipe whose grad_output "
            "has the estimator DirectionSensitive(), as 'int8_unified' has."
        )
    return {module: max(math.exp(-a * d), b) for module, d in deviations.items()}


def scale_learning_rates(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, factors: Mapping[str, float]
) -> dict[str, float]:
    """Multiply the learning rates of single layers, for one `optimizer.step()`: call it before each, after the schedule.

        factors = learning_rate_factors(qcompile.range_state(model))
        scale_learning_rates(optimizer, model, factors)
        optimizer.step()

    The optimizer's groups are split so that each layer of `factors` (module names as in `model.named_modules()`) has groups of its
    own; a group remembers the factor that is in its rate (key "qtrain_factor"), so that rates do not shrink step by step. A group
    that is there already stays the same object in the same place and keeps the first of its layers, as a schedule may hold it; its
    other layers get new groups, behind all that are there. The split changes the optimizer's `state_dict`, and a schedule of torch
    knows the groups that it was made with: split once, with factors of 1, before loading the one and making the other, and undo the
    factors (1 again) before the schedule's step. Returns Parameter's name -> learning rate.
    """
    clean = clean_names(model)
    names = {p: clean(n) for n, p in model.named_parameters()}
    layers_of_model = {name.rpartition(".")[0] for name in names.values()}
    if unknown := [module for module in factors if module not in layers_of_model]:
        raise ValueError(f"scale_learning_rates: the model has no Parameters in {', '.join(map(repr, unknown))}")
    added: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        layers: dict[str | None, list[Tensor]] = {}
        for p in group["params"]:
            layer = names[p].rpartition(".")[0] if p in names else None  # another model's
            layers.setdefault(layer if layer in factors else None, []).append(p)
        base = group["lr"] / group.get("qtrain_factor", 1.0)
        parts: list[dict[str, Any]] = []
        for module, params in layers.items():
            factor = 1.0 if module is None else factors[module]
            parts.append({**group, "params": params, "lr": base * factor, "qtrain_factor": factor})
        if parts:  # none of a group without Parameters
            group.update(parts[0])
            added += parts[1:]
    optimizer.param_groups.extend(added)
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"] if p in names}
