"""A transposed copy of a matrix of codes.

    out[n, m] = codes[m, n]

An operator, not `aten.t` and `aten.clone`: Inductor would fuse the transposed store into the quantize before
it, which is several times slower on a CPU than quantizing and transposing apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import cpu
from qcompile.ops._checks import check_matrix
from qcompile.ops._library import LIBRARY, checked, define

__all__ = ["transpose_codes", "transpose_codes_reference"]


def transpose_codes_reference(codes: Tensor) -> Tensor:
    """`qtrain::transpose_codes` in aten, unchecked. `clone`, not `contiguous`: the result never shares the
    operand's memory."""
    return codes.t().clone(memory_format=torch.contiguous_format)


def _check(codes: Tensor) -> None:
    check_matrix("transpose_codes", "codes", codes)


_checked_reference = checked(_check, transpose_codes_reference)
transpose_codes = define("transpose_codes(Tensor codes) -> Tensor", _checked_reference, fake=_checked_reference)
"""codes int8 [M, N], any strides -> int8 [N, M], contiguous, in memory of its own. Errors: `KernelError`."""
LIBRARY.impl("transpose_codes", checked(_check, cpu.transpose_codes), "CPU")
