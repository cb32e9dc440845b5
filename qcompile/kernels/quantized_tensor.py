"""Codes and what they mean, as an operand of an integer GEMM and as its result.

The operators take two operands as (a, b, a_scale, b_scale, a_zero, b_zero); what computes them takes two `QuantizedTensor`s.
`as_operator` and `flat` lead from one form to the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["MatrixProduct", "QuantizedTensor", "Requantization", "as_operator", "as_plan", "flat", "zero_point_count"]


class QuantizedTensor(NamedTuple):
    """`scale * (codes - zero)`: codes int8, scale fp32 and zero point int32 (None: 0), which broadcast to the codes."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def ranges(self, lay_out: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """The scale and the zero point, each laid out; one that all codes share is a number and needs no layout."""

        def laid_out(values: Tensor) -> Tensor:
            return values.reshape(()) if values.numel() == 1 else lay_out(values)

        return laid_out(self.scale), None if self.zero is None else laid_out(self.zero)


class Requantization(NamedTuple):
    """How a GEMM's result becomes codes: the last arguments of `qtrain::scaled_mm_requantize`, whose module says what each does.

    gate               int8 [M, N], or None
    scale, zero_point  of the result, one for all: fp32, int32 or None; 0-d or [1, 1]
    low, high          fp32 like `scale`; low None: the range is -high ... high
    """

    relu: bool
    gate: Tensor | None
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    low: Tensor | None
    high: Tensor
    mark: bool


class MatrixProduct(Protocol):
    """`qtrain::scaled_mm` on some device."""

    def __call__(
        self, a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype, /
    ) -> Tensor: ...


def as_operator(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute(a, b, *rest)` of two `QuantizedTensor`s, as an operator calls it."""

    def call(
        a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, a_zero: Tensor | None, b_zero: Tensor | None, /, *rest: Any
    ) -> Any:
        return compute(QuantizedTensor(a, a_scale, a_zero), QuantizedTensor(b, b_scale, b_zero), *rest)

    return call


def as_plan(prepare: Callable[..., Callable[..., Any]]) -> Callable[..., Callable[..., Any]]:
    """`as_operator` of what works out a call (`qcompile.kernels.prepared`), and of what it returns."""
    prepare = as_operator(prepare)
    return lambda *operands: as_operator(prepare(*operands))


def flat(a: QuantizedTensor, b: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Two operands as an operator takes them."""
    return a.codes, b.codes, a.scale, b.scale, a.zero, b.zero


def zero_point_count(a_zero: object, b_zero: object) -> int:
    """How many of two operands have a zero point."""
    return (a_zero is not None) + (b_zero is not None)
