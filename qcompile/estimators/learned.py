"""Ranges that the optimizer learns: the scale is a parameter of the model, and so needs no statistics.

These are `RangeEstimator`s by what they say (which range an operand is quantized with) and stand in a `QuantSpec` like any other.
Unlike the others they say how a gradient passes the quantizer: `qcompile.prepare` registers the parameters and puts the
differentiable `qtrain::fake_quantize` before the operand; the compiler finds its codes and uses them. The formulas are in
`qcompile.ops.fake_quantize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile._checks import refuse
from qcompile.estimators.base import RangeEstimator, State, Stats, register_estimator

__all__ = ["EWGS", "LGLSQ", "LSQ", "LSQPlus", "Learned"]


class Learned(RangeEstimator):
    """Base of the learned quantizers.

    A subclass says how gradients pass (`delta_at`, `sharpness_at`, `simulates`), whether activations have a learned offset, and
    where a scale starts.
    """

    offset: ClassVar[bool] = False
    """Whether activations get an offset of their own."""

    def range(self, stats: Stats, state: State) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__}: the range is a parameter of the model; call qcompile.prepare first")

    def delta_at(self, bits: int) -> float:
        """`delta` of `qtrain::fake_quantize`, in steps of the scale."""
        return 0.0

    def sharpness_at(self, progress: float) -> float | None:
        """Sharpness of the soft round's slope at a share 0..1 of the training; None: straight through."""
        return None

    @property
    def simulates(self) -> bool:
        """Whether the scale's gradient is a central difference."""
        return False

    def first_weight_scale(self, weight: Tensor, dims: list[int], high: int) -> Tensor:
        """The scale to start from, shaped like a statistic over `dims` (kept): 2 mean|w| / sqrt(high), as LSQ."""
        return 2 * weight.abs().mean(dims, keepdim=True) / high**0.5


@register_estimator
@dataclass(frozen=True)
class LSQ(Learned):
    """Learned step size quantization (Esser et al., arXiv 1902.08153).

    Starts from 2 mean|x| / sqrt(high), the gradient of the scale is divided by sqrt(n * high).
    """

    name: ClassVar[str] = "lsq"


@register_estimator
@dataclass(frozen=True)
class LSQPlus(Learned):
    """LSQ with a learned offset for activations (Bhalgat et al., arXiv 2004.09576).

    Weights start from max(|mu - 3 sigma|, |mu + 3 sigma|) / 2**(bits - 1) (reconstructed), activations from the scale and offset
    of least squared error on the first batches (the paper's idea; the search over shrunken ranges is our choice). That the offset
    is a whole number of steps is our choice.
    """

    name: ClassVar[str] = "lsq_plus"
    offset: ClassVar[bool] = True

    def first_weight_scale(self, weight: Tensor, dims: list[int], high: int) -> Tensor:
        mean, sigma = weight.mean(dims, keepdim=True), weight.std(dims, keepdim=True, correction=0)
        return torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / (high + 1)


@register_estimator
@dataclass(frozen=True)
class EWGS(Learned):
    """LSQ's scales, with element-wise gradient scaling (Lee, Kim, Ham, CVPR 2021): g * (1 + delta * sign(g) * error).

    The error is on a scale on which the whole range is 1. The paper sets delta for each layer from the Hessian; here it is a
    constant (our choice), and so is its default.
    """

    delta: float = 0.2

    name: ClassVar[str] = "ewgs"

    def __post_init__(self) -> None:
        _check_delta("EWGS.delta", self.delta)

    def delta_at(self, bits: int) -> float:
        return self.delta / (2**bits - 1)


@register_estimator
@dataclass(frozen=True)
class LGLSQ(Learned):
    """LG-LSQ-style: LSQ with the slope of an arctangent soft round and a scaling by the discretization error.

    After the abstract of arXiv 2202.09009 (scaling simulated gradient, arctangent soft round, minimize discretization error); no
    formula of that paper was available, and all formulas and constants here are our construction.

    sharpness_start, sharpness_end  of the soft round's slope, linear over the training; towards 0 it is straight through
    delta                           an element's gradient is multiplied by 1 + delta * sign(g) * (x - x_hat) / scale
    simulated                       the scale's gradient by a central difference instead of the formula
    """

    sharpness_start: float = 1.0
    sharpness_end: float = 8.0
    delta: float = 0.2
    simulated: bool = False

    name: ClassVar[str] = "lg_lsq"

    def __post_init__(self) -> None:
        for field in ("sharpness_start", "sharpness_end"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e4:
                refuse(f"LGLSQ.{field}", value, "a number from 0 (straight through) to 10000")
        _check_delta("LGLSQ.delta", self.delta)
        if not isinstance(self.simulated, bool):
            refuse("LGLSQ.simulated", self.simulated, "True or False")

    def delta_at(self, bits: int) -> float:
        return float(self.delta)

    def sharpness_at(self, progress: float) -> float | None:
        return self.sharpness_start + (self.sharpness_end - self.sharpness_start) * progress

    @property
    def simulates(self) -> bool:
        return self.simulated


def _check_delta(field: str, value: object) -> None:
    # Above 2 an element's gradient could change its sign: the error is at most half a step.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2:
        refuse(field, value, "a number from 0 (off) to below 2")
