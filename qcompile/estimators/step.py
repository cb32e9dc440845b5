"""A step of an estimator: the parts that the compiler traces into a graph, and all of them together in eager mode.

`EagerRange` drives an estimator over a sequence of tensors exactly as compiled code does: for experiments on recorded tensors,
and for tests of an estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompile.estimators.base import BOOKKEEPING, STATISTICS, RangeEstimator, State, Stats, scale_and_zero_point
from qcompile.estimators.statistics import Elements, clipped_share, never_empty, statistics

if TYPE_CHECKING:
    from qcompile.specs import QuantSpec

__all__ = [
    "EagerRange",
    "first_range",
    "first_scale_and_zero_point",
    "initial_state",
    "measured",
    "current_statistics",
    "reductions",
    "stored_range",
    "updated",
    "where_valid",
]


def initial_state(estimator: RangeEstimator, symmetric: bool) -> dict[str, float]:
    """Field -> first value: the estimator's own and the bookkeeping; empty without memory."""
    own = estimator.state_fields(symmetric)
    return dict(own) | BOOKKEEPING if own else {}


def reductions(estimator: RangeEstimator, symmetric: bool) -> dict[str, str]:
    """Field -> how data-parallel ranks bring it together, one of `REDUCTIONS`; the bookkeeping included."""
    own = estimator.reductions(symmetric)
    return dict(own) | dict.fromkeys(BOOKKEEPING, "max") if own else {}


def current_statistics(spec: QuantSpec, x: Tensor, dims: Sequence[int]) -> dict[str, Tensor]:
    """What `statistics_for` asks for."""
    return statistics(x, dims, spec.estimator.statistics_for(spec.symmetric))


def measured(
    spec: QuantSpec, x: Tensor, dims: Sequence[int], stats: Stats, state: State | None
) -> dict[str, Tensor]:
    """The statistics and what the estimator's `measure` adds. State None: as before the first update."""
    elements = Elements(never_empty(x, dims).to(torch.float32), tuple(dims), spec)
    if state is None:
        state = {f: elements.constant(v) for f, v in initial_state(spec.estimator, spec.symmetric).items()}
    return dict(stats) | spec.estimator.measure(elements, stats, state)


def first_range(spec: QuantSpec, stats: Stats) -> tuple[Tensor, Tensor]:
    """(low, high) where there is no memory: always, for an estimator without."""
    if spec.estimator.state_fields(spec.symmetric):
        return spec.estimator.first_range(stats)
    return spec.estimator.range(stats, {})


def stored_range(spec: QuantSpec, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
    """(low, high) where there is memory."""
    return spec.estimator.range({} if spec.estimator.static else stats, state)


def first_scale_and_zero_point(spec: QuantSpec, x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scale (fp32) and zero point (int32; zeros for symmetric codes) of the current tensor where there is no memory."""
    low, high = first_range(spec, measured(spec, x, dims, current_statistics(spec, x, dims), None))
    scale, zero_point = scale_and_zero_point(low, high, spec)
    return scale, torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point


def where_valid(stored: Tensor, valid: Tensor, present: Tensor) -> Tensor:
    """`stored` where there is memory (`valid` above 0), else `present`: what `qtrain::select_range` means."""
    return torch.where(valid > 0, stored, present)


def updated(
    estimator: RangeEstimator, stats: Stats, old: State, select: Callable[[Tensor, Tensor, Tensor], Tensor] = where_valid
) -> dict[str, Tensor]:
    """New values of every field, the bookkeeping included.

    An entry keeps its own where it is frozen, where a statistic or what would be learnt from it is not finite, and where the tensor
    is zero: nothing is learnt from a bad batch.

    select  `where_valid`, or the operator that a graph has in its place
    """
    new = estimator.update(stats, old)
    if type(estimator).first_update is not RangeEstimator.first_update:
        first = estimator.first_update(stats, old)
        if estimator.restart_above is not None:
            jumped = stats["clipped"] > estimator.restart_above
            new = {f: torch.where(jumped, first[f], value) for f, value in new.items()}
        # In a graph: compiled away once all entries have memory.
        new = {f: select(_like(value, old[f]), old["steps"], _like(first[f], old[f])) for f, value in new.items()}
    learns = (_width(stats) > 0) & (old["frozen"] == 0)
    # Not all that `measure` gave: what only the first update reads is not to be computed for this.
    for value in (*(value for name, value in stats.items() if name in STATISTICS), *new.values()):
        learns = learns & value.isfinite()
    new = new | {"steps": old["steps"] + 1, "clipped": stats["clipped"], "frozen": old["frozen"]}
    return {f: torch.where(learns, new[f], old[f]) for f in old}


def _like(value: Tensor, field: Tensor) -> Tensor:
    return value if value.shape == field.shape else value.expand_as(field)


def _width(stats: Stats) -> Tensor:
    """Above 0 unless all elements are 0 (or, where nothing but their deviation is known, alike)."""
    if "amax" in stats:
        return stats["amax"]
    if "min" in stats and "max" in stats:
        return stats["max"].clamp_min(0) - stats["min"].clamp_max(0)  # a range has 0 in it
    if "std" in stats:
        return torch.maximum(stats["std"], stats["mean"].abs()) if "mean" in stats else stats["std"]
    return next(stats[name] for name in ("mean_abs", "max", "min", "mean") if name in stats).abs()


class EagerRange:
    """The range of one operand, step by step.

        past = EagerRange(QuantSpec(estimator=InHindsight()))
        for x in tensors:
            scale, zero_point = past.step(x)
        past.state["amax"], past.low, past.high

    spec   the operand's spec.
    dims   axes of the tensors that share a scale; None: all.
    state  field -> fp32 tensor, of 0 elements before the first step; empty for an estimator without memory.
    """

    def __init__(self, spec: QuantSpec, dims: Sequence[int] | None = None) -> None:
        self.spec, self.dims = spec, dims
        self.state: dict[str, Tensor] = {}
        self.stats: Mapping[str, Tensor] = {}

    def step(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(scale, zero point or None) that `x` is quantized with; then learns from it."""
        spec, estimator = self.spec, self.spec.estimator
        dims = tuple(range(x.ndim)) if self.dims is None else tuple(self.dims)
        stats = current_statistics(spec, x, dims)
        like = next(iter(stats.values()))
        if not self.state:
            first = initial_state(estimator, spec.symmetric)
            self.state = {f: torch.full_like(like, v) for f, v in first.items()}
        state = self.state
        stats = measured(spec, x, dims, stats, state)
        low, high = first_range(spec, stats)
        if state:
            known = state["steps"] > 0
            stored = stored_range(spec, stats, state)
            low, high = (torch.where(known, s, f) for s, f in zip(stored, (low, high), strict=True))
        stats["clipped"] = clipped_share(x, dims, None if spec.symmetric else low, high)
        if state:
            self.state = updated(estimator, stats, state)
        self.stats, self.low, self.high = stats, low, high
        return scale_and_zero_point(low, high, spec)
