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
from qcompile.ops._library import LIBRARY, define

__all__ = ["transpose_codes", "transpose_codes_reference"]


def transpose_codes_reference(codes: Tensor) -> Tensor:
    """`qtrain::transpose_codes` in aten, unchecked. `clone`, not `contiguous`: the result never shares the
    operand's memory."""
    return codes.t().clone(memory_format=torch.contiguous_format)


def _transpose_codes(codes: Tensor) -> Tensor:
    check_matrix("transpose_codes", "codes", codes)
    return transpose_codes_reference(codes)


def _transpose_codes_cpu(codes: Tensor) -> Tensor:
    check_matrix("transpose_codes", "codes", codes)
    return cpu.transpose_codes(codes)


transpose_codes = define("transpose_codes(Tensor codes) -> Tensor", _transpose_codes, fake=_transpose_codes)
"""codes int8 [M, N], any strides -> int8 [N, M], contiguous, in memory of its own. Errors: `KernelError`."""
LIBRARY.impl("transpose_codes", _transpose_codes_cpu, "CPU")
