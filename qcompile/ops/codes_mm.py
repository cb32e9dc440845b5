"""The product of two matrices of codes alone, and what makes `qtrain::scaled_mm` of it. M rows, N columns, K summed.

    codes_mm[m, n] = sum_k a[m, k] * b[k, n]                                             exact, int32
    scaled_mm      = cast(float32(codes_mm) * (a_scale * b_scale) + float32(bias))
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile._sizes import same_size
from qcompile.errors import KernelError
from qcompile.kernels import cpu
from qcompile.ops._checks import check_matrix
from qcompile.ops._library import LIBRARY, checked, define

__all__ = ["codes_mm", "codes_mm_reference", "scaled"]


def codes_mm_reference(a: Tensor, b: Tensor) -> Tensor:
    """`qtrain::codes_mm` in aten, unchecked: fp64 holds every sum."""
    return torch.mm(a.to(torch.float64), b.to(torch.float64)).to(torch.int32)


def scaled(product: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`qtrain::scaled_mm` from its integer sum, in aten."""
    out = product.to(torch.float32) * (a_scale * b_scale)
    return (out if bias is None else out + bias.to(torch.float32)).to(out_dtype)


def _check(a: Tensor, b: Tensor) -> None:
    check_matrix("codes_mm", "a", a)
    check_matrix("codes_mm", "b", b)
    if not same_size(a.shape[1], b.shape[0]):
        raise KernelError(f"codes_mm: a is {list(a.shape)} and b is {list(b.shape)}; a's columns must be as many as b's rows.")
    if isinstance(a.shape[1], int) and a.shape[1] > cpu.MAX_K:
        raise KernelError(f"codes_mm: K is {a.shape[1]}; an int32 holds sums of up to {cpu.MAX_K} products.")


def _fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)


codes_mm = define("codes_mm(Tensor a, Tensor b) -> Tensor", checked(_check, codes_mm_reference), fake=checked(_check, _fake))
"""a int8 [M, K], b int8 [K, N], any strides, K up to 131,071 -> int32 [M, N], contiguous. Errors: `KernelError`."""
LIBRARY.impl("codes_mm", checked(_check, cpu.codes_mm), "CPU")
