"""Transposes of codes on the CPU, by oneDNN where that is faster than aten's copy."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qcompile.torch_private import mkldnn_transpose, real_tensors

__all__ = ["transpose_codes"]

TRANSPOSE_COLUMNS = 512
"""Columns per oneDNN transpose. 2048 x 8192 codes: 20 ms whole, 4.7 ms in strips of 512, against 8.7 ms for
aten's copy; for squares up to 2048 whole or in strips are equal (0.8 ms against 1.8)."""

TRANSPOSE_SMALL = 2**14
"""Elements below which aten's copy is as fast and has less overhead."""


def transpose_codes(codes: Tensor) -> Tensor:
    """`qtrain::transpose_codes` for an int8 matrix."""
    m, n = codes.shape
    small = codes.numel() < TRANSPOSE_SMALL or min(m, n) < 16
    if small or not codes.is_contiguous() or not _mkldnn_transposes():
        return codes.t().clone(memory_format=torch.contiguous_format)
    if n <= 2 * TRANSPOSE_COLUMNS:
        return _mkldnn_transpose(codes)
    out = codes.new_empty((n, m))
    for start in range(0, n, TRANSPOSE_COLUMNS):
        part = slice(start, start + TRANSPOSE_COLUMNS)
        out[part].copy_(_mkldnn_transpose(codes[:, part].contiguous()))
    return out


def _mkldnn_transpose(codes: Tensor) -> Tensor:
    return mkldnn_transpose(codes).to_dense()


@functools.cache
def _mkldnn_transposes() -> bool:
    with real_tensors():
        codes = torch.arange(35, dtype=torch.int8, device="cpu").view(5, 7)
        try:
            return torch.equal(_mkldnn_transpose(codes), codes.t())
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
