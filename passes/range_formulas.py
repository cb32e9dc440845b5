"""What range state computes, as plain PyTorch on tensors: `attach_range_state` traces it into the graph.

Each function is one formula of an estimator (those of `qcompile.estimators.step`, by their names), of a scale or of a seed.
Tensors are passed flat, after their names, as nodes of a graph are. An error that an estimator raises becomes a `RecipeError` that
names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from qcompile.errors import RecipeError
from qcompile.estimators import step
from qcompile.estimators.base import RangeEstimator, symmetric_scale
from qcompile.estimators.statistics import clipped_share, statistics
from qcompile.ops.range_state import select_range
from qcompile.specs import QuantSpec

__all__ = [
    "clipped",
    "first_range",
    "measured",
    "next_seed",
    "scale_of_mirrored",
    "scale_or_nan",
    "seed",
    "statistic",
    "stored_range",
    "updated",
]


def statistic(x: Tensor, dims: tuple[int, ...], name: str) -> Tensor:
    """One of `qcompile.estimators.statistics`, over these axes."""
    return statistics(x, dims, [name])[name]


def measured(
    spec: QuantSpec, dims: tuple[int, ...], stats: tuple[str, ...], fields: tuple[str, ...], x: Tensor, *tensors: Tensor
) -> dict[str, Tensor]:
    """What the estimator measures itself, beside the statistics given. `tensors`: those of `stats`, then those of `fields`."""
    given = dict(zip(stats, tensors, strict=False))
    with _calling(spec.estimator, "measure", given, fields):
        return step.measured(spec, x, dims, given, dict(zip(fields, tensors[len(stats) :], strict=True)))


def first_range(spec: QuantSpec, names: tuple[str, ...], *stats: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) of this tensor alone, while there is no memory."""
    with _calling(spec.estimator, "first_range", names, ()):
        low, high = step.first_range(spec, dict(zip(names, stats, strict=True)))
        return _fitting("low", low, stats[0]), _fitting("high", high, stats[0])


def stored_range(spec: QuantSpec, names: tuple[str, ...], fields: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) from memory. `tensors`: those of `names`, then those of `fields`."""
    stats, state = dict(zip(names, tensors, strict=False)), dict(zip(fields, tensors[len(names) :], strict=True))
    with _calling(spec.estimator, "range", stats, fields):
        low, high = step.stored_range(spec, stats, state)
        return _fitting("low", low, tensors[-1]), _fitting("high", high, tensors[-1])


def scale_of_mirrored(spec: QuantSpec, high: Tensor) -> Tensor:
    """`scale_and_zero_point` of the range (-high, high), whichever of the two is which."""
    return symmetric_scale(high.abs(), spec)


def scale_or_nan(scale: Tensor, *stats: Tensor) -> Tensor:
    """The scale, NaN where the tensor was not finite: its codes are finite whatever it held."""
    for s in stats:
        scale = scale + (s - s).to(scale.dtype)  # zero; NaN for infinity and NaN. Inductor would fold a product with zero
    return scale


def clipped(x: Tensor, dims: tuple[int, ...], *bounds: Tensor) -> Tensor:
    """The share outside (low, high), or outside (-high, high) where one bound is given."""
    low, high = bounds if len(bounds) == 2 else (None, bounds[0])
    return clipped_share(x, dims, low, high)


def updated(estimator: RangeEstimator, names: tuple[str, ...], fields: tuple[str, ...], *tensors: Tensor) -> list[Tensor]:
    """Every field after the step. `tensors`: those of `names`, then those of `fields`."""
    stats = dict(zip(names, tensors, strict=False))
    with _calling(estimator, "update", stats, fields):
        new = step.updated(estimator, stats, dict(zip(fields, tensors[len(names) :], strict=True)), select_range)
        return [_fitting(name, value, tensors[-1]) for name, value in new.items()]


def _fitting(what: str, value: object, like: Tensor) -> Tensor:
    """What an estimator returned. Errors: `TypeError` for what is no tensor of the statistics' shape, or of one number."""
    if isinstance(value, Tensor) and (value.shape == like.shape or value.numel() == 1):
        return value
    given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise TypeError(f"{what} is {given}; allowed: a tensor of one number, or of the shape of the statistics, {list(like.shape)}")


@contextlib.contextmanager
def _calling(estimator: RangeEstimator, method: str, stats: Iterable[str], fields: Iterable[str]) -> Iterator[None]:
    """An estimator's own errors name it. Dynamo takes some of them for a reason to run the model without a compiler."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        where = f"{type(estimator).__name__}.{method}"
        if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)):
            raise RecipeError(
                f"{where} asks for the value of a tensor (an `if`, float() or .item()). It is traced into the graph, once for all "
                "steps: write torch.where(condition, a, b) and plain tensor arithmetic."
            ) from error
        what = f"there is no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise RecipeError(
            f"{where} (or what it calls): {what}. Given are the statistics {', '.join(stats) or 'none'} (`statistics_for` asks for "
            f"others) and the fields {', '.join(fields) or 'none'}; ranges are two tensors (low, high), updates have every field."
        ) from error


def seed(low: Tensor, high: Tensor, steps: Tensor) -> Tensor:
    """int64: the step counter above 32 bits of base, of which fp32 holds 16 bits each exactly."""
    low, high, steps = (t.view([]).to(torch.int64) for t in (low, high, steps))
    return low + high * 2**16 + steps * 2**32


def next_seed(low: Tensor, high: Tensor, steps: Tensor) -> list[Tensor]:
    """The counter stays below what fp32 counts exactly, then starts again."""
    return [low, high, torch.where(steps >= 2**23, torch.zeros_like(steps), steps + 1)]
