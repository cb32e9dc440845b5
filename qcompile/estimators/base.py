"""What a range estimator is, and how a range becomes a scale.

A range estimator turns statistics of the current tensor, and the memory of past ones, into a range (low,
high) in units of the tensor. It only says *formulas*: the compiler computes the statistics, keeps the memory
and decides when to update it. A statistic that is zero or not finite never reaches the memory, so estimators
need no guard of their own.

Every method is plain tensor arithmetic, elementwise in the elements of the state (`measure` apart, which may
reduce the tensor). The compiler may therefore put the entries of many operands into one vector, and trace the
methods into a graph: no Python branch on a tensor's value.

What happens in a step, for one operand (`qcompile.estimators.step` is the same in eager mode):

    stats  = the statistics of `statistics_for`, then what `measure` adds to them
    range  = range(stats, state)                        first_range(stats) before the first update
    stats["clipped"] = share of the elements outside that range
    state  = update(stats, state)                       first_update(stats, state) at the first update, and
                                                        where "clipped" is above `restart_above`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from qcompile._checks import refuse
from qcompile._named import named_from_dict, named_to_dict
from qcompile.errors import RecipeError

if TYPE_CHECKING:
    from qcompile.estimators.statistics import Elements

Stats = Mapping[str, Tensor]
"""Statistics of the current tensor, fp32: those of `STATISTICS` that were asked for, and what `measure` added;
in `update` also "clipped", the share (0..1) of elements that lay outside the range used. Shape: the
granularity's, or broadcasts to it."""

State = Mapping[str, Tensor]
"""The estimator's own fields, fp32, each in the shape of the granularity, and "steps", the number of updates
so far, which has that shape or broadcasts to it."""

STATISTICS = ("amax", "min", "max", "mean", "mean_abs", "std", "count")
"""What `statistics_for` may ask for, over the elements that share a scale: the largest |x|, the smallest and
largest x, the means of x and |x|, the standard deviation about the mean (divided by the count), and the
number of elements."""

REDUCTIONS = ("max", "min", "mean")
"""How a field of the state may be brought together across data-parallel ranks."""

BOOKKEEPING = {"steps": 0.0, "frozen": 0.0, "clipped": 0.0}
"""Fields that every entry with memory has beside its estimator's own, with their first values: the number of
updates, the flag that stops them, the share of the last tensor that lay outside the range used. Across ranks
each is reduced by "max"."""


@dataclass(frozen=True)
class RangeEstimator:
    """Base of all range estimators.

    A subclass is a frozen dataclass with a `name`; its fields are parameters that recipe files may set:

        @register_estimator
        @dataclass(frozen=True)
        class MaxSoFar(RangeEstimator):
            name = "max_so_far"

            def state_fields(self, symmetric):
                return {"amax": 0.0}

            def range(self, stats, state):
                amax = torch.maximum(stats["amax"], state["amax"])
                return -amax, amax

            def update(self, stats, state):
                return {"amax": torch.maximum(stats["amax"], state["amax"])}
    """

    name: ClassVar[str] = ""
    """How recipe files call the class."""

    asymmetric: ClassVar[bool] = True
    """Whether it also has ranges that are not centred on 0 (`QuantSpec(symmetric=False)`)."""

    @property
    def static(self) -> bool:
        """Whether the range comes from past tensors alone: no reduction comes before the quantize."""
        return False

    @property
    def restart_above(self) -> float | None:
        """Share (0..1) of clipped elements above which the memory is rebuilt from the current tensor, by
        `first_update`; None: never. After a jump (the loss scale was doubled) an average would clip for many
        steps."""
        return None

    # ---- what it needs

    def statistics_for(self, symmetric: bool) -> tuple[str, ...]:
        """Names of `STATISTICS` that the methods read ("clipped" is always given to `update`)."""
        return ("amax",) if symmetric else ("min", "max")

    def measure(self, x: Elements, stats: Stats, state: State) -> dict[str, Tensor]:
        """Statistics beyond `STATISTICS`: shares above a threshold, quantiles, the error of a range, ...

        Called once a tensor, with the statistics of `statistics_for` and the state *before* the update; the
        result joins `stats`. Each value has the shape of a statistic. What depends on the stored range alone
        and is read by `update` alone delays no quantize: a static estimator stays static.
        """
        return {}

    def state_fields(self, symmetric: bool) -> dict[str, float]:
        """Field name -> value before the first update. No field: the estimator has no memory."""
        return {}

    def reductions(self, symmetric: bool) -> dict[str, str]:
        """Field name -> how ranks agree on it, one of `REDUCTIONS`.

        "max" is right for a bound that grows with the tensor's: the ranks then hold the range of the whole
        batch.
        """
        return dict.fromkeys(self.state_fields(symmetric), "max")

    # ---- what it says

    def first_range(self, stats: Stats) -> tuple[Tensor, Tensor]:
        """(low, high) of the current tensor itself: what the compiler uses as long as `steps` is 0."""
        if "amax" in stats:
            return -stats["amax"], stats["amax"]
        return stats["min"], stats["max"]

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        """(low, high) to quantize the current tensor with; a static estimator gets no statistics, {}."""
        raise NotImplementedError(f"{type(self).__name__}.range: say which range to use")

    def update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        """New values of the fields, from the statistics of the tensor that was just quantized."""
        return {}

    def first_update(self, stats: Stats, state: State) -> dict[str, Tensor]:
        """The same for the first tensor, and for one that was clipped beyond `restart_above`: forget the past.

        What only this method and `first_range` read is computed until there is memory, and not after (unless
        there is a `restart_above`): it may be expensive.
        """
        return self.update(stats, state)

    # ---- as a table

    def to_dict(self) -> dict[str, Any]:
        """`{"name": ..., parameter: value}`; `from_dict` reads it."""
        return named_to_dict(self)

    @staticmethod
    def from_dict(data: object, where: str = "estimator") -> RangeEstimator:
        """The registered estimator that a table (or a bare name) describes.

        Errors: `RecipeError` for an unknown name, an unknown or missing parameter, or a value that it
        refuses.
        """
        unknown = "Make a class of your own known with @register_estimator before the recipe is read."
        return named_from_dict(data, _REGISTRY, where, unknown)


_REGISTRY: dict[str, type[RangeEstimator]] = {}

E = TypeVar("E", bound=type[RangeEstimator])


def register_estimator(cls: E) -> E:
    """Class decorator: recipes may use the class, and recipe files find it by `name`.

    A class may be registered again under its own module and qualified name (a notebook cell that is run
    twice). Errors: `RecipeError` if it is no frozen dataclass, has no name, or the name belongs to another
    class.
    """
    where = f"register_estimator({getattr(cls, '__name__', cls)})"
    if not (isinstance(cls, type) and issubclass(cls, RangeEstimator)):
        raise RecipeError(f"{where}: not a subclass of RangeEstimator.")
    # Looked up in the class itself: an undecorated subclass inherits its parent's dataclass machinery,
    # without its own fields.
    parameters = cls.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise RecipeError(
            f"{where}: recipes are compared and hashed; put @dataclass(frozen=True) below the decorator."
        )
    name = cls.__dict__.get("name")
    if not isinstance(name, str) or not name:
        raise RecipeError(
            f"{where}: name is {name!r}; give the class a name of its own, as in name = 'my_estimator'."
        )
    known = _REGISTRY.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise RecipeError(
            f"{where}: the name {name!r} belongs to {known.__module__}.{known.__qualname__}; choose another."
        )
    _REGISTRY[name] = cls
    return cls


def check_estimator(field: str, value: object) -> None:
    """Refuse what is no instance of a registered estimator."""
    if isinstance(value, RangeEstimator) and _REGISTRY.get(value.name) is type(value):
        try:
            hash(value)
        except TypeError:
            raise RecipeError(
                f"{field}: {value!r} is not hashable; give it tuples and numbers, no lists or dicts."
            ) from None
        return
    known = ", ".join(cls.__name__ for cls in _REGISTRY.values())
    if isinstance(value, RangeEstimator):
        todo = f"Put @register_estimator on {type(value).__name__}, or recipe files could not name it."
    elif isinstance(value, type) and issubclass(value, RangeEstimator):
        todo = f"That is the class: write {value.__name__}(...)."
    else:
        todo = "An estimator of your own derives from RangeEstimator."
    allowed = f"an instance of {known}, or of a class registered beside them"
    raise RecipeError(f"{field}: got {value!r}; allowed: {allowed}. {todo}")


def check_declarations(estimator: RangeEstimator, symmetric: bool) -> None:
    """Refuse an estimator that asks for statistics, keeps fields or reduces them in ways that there are not."""
    where = type(estimator).__name__
    names = estimator.statistics_for(symmetric)
    for name in names:
        if name not in STATISTICS:
            refuse(f"{where}.statistics_for", name, ", ".join(STATISTICS), "More can be computed in `measure`.")
    if not set(names) - {"count"}:
        refuse(f"{where}.statistics_for", names, "at least one that shows whether the tensor is finite, such as 'amax'")
    fields = estimator.state_fields(symmetric)
    if not isinstance(fields, Mapping) or not all(isinstance(value, (int, float)) for value in fields.values()):
        refuse(f"{where}.state_fields", fields, "a dict of each field's name and its first value, a number")
    if taken := set(fields) & set(BOOKKEEPING):
        refuse(f"{where}.state_fields", sorted(taken), f"names beside {', '.join(BOOKKEEPING)}, which every memory has")
    reductions = estimator.reductions(symmetric)
    if set(reductions) != set(fields) or not set(reductions.values()) <= set(REDUCTIONS):
        refuse(f"{where}.reductions", reductions, f"one of {', '.join(REDUCTIONS)} for each of {', '.join(fields) or 'no field'}")


class IntegerFormat(Protocol):
    """What a range is fitted to; `QuantSpec` is one."""

    @property
    def bits(self) -> int: ...
    @property
    def qmin(self) -> int: ...
    @property
    def qmax(self) -> int: ...
    @property
    def symmetric(self) -> bool: ...


# Smallest normal fp32: its reciprocal is finite, so an all-zero tensor gets codes 0 and not 0 * Inf.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def symmetric_scale(amax: Tensor, spec: IntegerFormat) -> Tensor:
    """Range -amax..amax -> scale fp32, the `scale_and_zero_point` of it."""
    return (amax.to(torch.float32) / spec.qmax).clamp_min(SMALLEST_SCALE)


def scale_and_zero_point(low: Tensor, high: Tensor, spec: IntegerFormat) -> tuple[Tensor, Tensor | None]:
    """Range -> (scale fp32, zero_point int32 or None), elementwise: hp ~= scale * (code - zero_point).

    symmetric     scale = max(|low|, |high|) / qmax, no zero point (None)
    asymmetric    low <= 0 <= high is forced, so that zero has a code of its own;
                  scale = (high - low) / (qmax - qmin);
                  zero_point = clamp(round_half_even(qmin - low / scale), qmin, qmax).
                  This is the usual unsigned form, S = (high - low) / (2**b - 1) and Z = round(-low / S) in
                  0..2**b - 1, moved down by 2**(b-1) to signed codes.

    low, high     in units of the tensor, any float dtype, equal shapes. A NaN or Inf in either makes the
                  scale non-finite (a non-finite tensor must not look finite after quantization); then the
                  zero point means nothing.

    The floor `SMALLEST_SCALE` is our choice.
    """
    low, high = low.to(torch.float32), high.to(torch.float32)
    if spec.symmetric:
        return symmetric_scale(torch.maximum(low.abs(), high.abs()), spec), None
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / (spec.qmax - spec.qmin)).clamp_min(SMALLEST_SCALE)
    zero_point = (spec.qmin - low / scale).round().clamp(spec.qmin, spec.qmax)
    return scale, zero_point.nan_to_num(nan=0.0).to(torch.int32)  # NaN to int would be undefined
