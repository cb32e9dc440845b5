"""Our operations in the Triton that Inductor generates (`inductor_operations`).

Triton divides approximately and contracts `a * b + c` unless it is told otherwise, and its maximum of several instructions keeps
NaN: so the quotient, the sum and the clamp are written as those that round once and keep NaN in one instruction each. Without a
zero point the clamp comes before the rounding: its bounds are integers, so the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.shape_propagation import get_broadcasted_shape
from torch._inductor.virtualized import V

from qcompile.estimators.base import SMALLEST_SCALE
from qcompile.ops import code_range

__all__ = ["code", "draw", "scale", "shifted_code"]

_KEEPS_NAN = "propagate_nan=tl.PropagateNan.ALL"


def draw(element: Any, key: Any) -> str:
    return _plus_draw("0.0", element, key)


def code(bits: int) -> Callable[..., str]:
    def of(x: Any, scale: Any, *place: Any) -> str:
        return f"libdevice.nearbyint({_clamped(_scaled(x, scale, *place), bits, symmetric=True)})"

    return of


def shifted_code(bits: int) -> Callable[..., str]:
    def of(x: Any, scale: Any, zero_point: Any, *place: Any) -> str:
        return _clamped(f"libdevice.nearbyint({_scaled(x, scale, *place)}) + {zero_point}", bits, symmetric=False)

    return of


def _scaled(x: Any, scale: Any, *place: Any) -> str:
    value = f"{x} * tl.div_rn(1.0, {scale})"
    return _plus_draw(value, *place) if place else value


def _clamped(value: str, bits: int, *, symmetric: bool) -> str:
    low, high = code_range(bits, symmetric=symmetric)
    return f"tl.minimum(tl.maximum({value}, {low}.0, {_KEEPS_NAN}), {high}.0, {_KEEPS_NAN})"


def scale(bits: int) -> Callable[..., str]:
    """By the rounded reciprocal of qmax, as both aten and Inductor divide by a number on a GPU."""
    _, qmax = code_range(bits, symmetric=True)

    def of(amax: Any) -> str:
        return f"tl.maximum(tl.abs({amax}) * {1 / qmax!r}, {SMALLEST_SCALE!r}, {_KEEPS_NAN})"

    return of


def _plus_draw(value: str, element: Any, key: Any) -> str:
    """(r >> 8) * 2**-24 - 1/2 is the signed number (r - 2**31) >> 8 times 2**-24. That product is exact, so the fused
    multiplication and addition rounds as the addition alone."""
    shape = get_broadcasted_shape(element.shape, key.shape)
    h = f"{element}.to(tl.uint32) * 0x9E3779B1 + {key}.to(tl.uint32)"
    for shift, factor in ((16, "0x7FEB352D"), (15, "0x846CA68B"), (16, None)):
        h = V.kernel.cse.generate(V.kernel.compute, h, dtype=torch.uint32, shape=shape)
        h = f"({h} ^ ({h} >> {shift}))" + (f" * {factor}" if factor else "")
    return f"tl.fma((({h} ^ 0x80000000).to(tl.int32, bitcast=True) >> 8).to(tl.float32), {2.0**-24!r}, {value})"
