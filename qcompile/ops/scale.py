"""The scale of symmetric codes from the largest magnitude, as one operation where Inductor has a lowering of it.

    scale = max(|amax| / qmax, tiny)        qmax = 2**(bits - 1) - 1, tiny the smallest normal fp32

The formula is that of `qcompile.estimators.base.symmetric_scale`, element by element: the largest scale of a tensor's elements is
the scale of its largest element, so that a reduction may come before or after (`passes.scale_rows_first`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.estimators.base import SMALLEST_SCALE
from qcompile.ops._checks import check_dtype
from qcompile.ops._library import define
from qcompile.ops.quantize import code_range

__all__ = ["scale"]


def _scale(amax: Tensor, bits: int) -> Tensor:
    check_dtype("scale", "amax", amax, torch.float32)
    _, qmax = code_range(bits, symmetric=True)
    return (amax.abs() / qmax).clamp_min(SMALLEST_SCALE)


scale = define("scale(Tensor amax, int bits) -> Tensor", _scale, fake=_scale)
"""amax fp32 -> fp32 of the same shape, above 0; NaN and infinity stay. bits: 2 to 8. Errors: `KernelError`."""
