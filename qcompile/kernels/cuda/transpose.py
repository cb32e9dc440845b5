"""The transpose of codes on a GPU, and the rows that a GEMM wants contiguous."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qcompile.kernels.fallback import has_failed, ours_or_plain
from qcompile.kernels.triton.launch import unavailable_reasons

__all__ = ["prepare_transpose_codes", "rows_contiguous", "rows_contiguous_of_each", "transpose_codes"]

KERNEL = "triton transpose"


def transpose_codes(codes: Tensor) -> Tensor:
    """`qtrain::transpose_codes` of an int8 matrix."""

    def plain() -> Tensor:
        from qcompile.ops.transpose import transpose_codes_reference

        return transpose_codes_reference(codes)

    if unavailable_reasons(codes.device, "transpose"):
        return plain()
    from qcompile.kernels.triton import transpose

    work = f"the transpose of {codes.shape[0]} x {codes.shape[1]} codes"
    return ours_or_plain(KERNEL, codes.device, lambda: transpose.transpose(codes), plain, work)


def prepare_transpose_codes(codes: Tensor) -> Callable[[Tensor], Tensor] | None:
    """For the operand of `qtrain::transpose_codes` (`qcompile.kernels.prepared`)."""
    if unavailable_reasons(codes.device, "transpose") or has_failed(KERNEL, codes.device):
        return None
    from qcompile.kernels.triton import transpose

    return transpose.prepare(codes)


def rows_contiguous(codes: Tensor) -> Tensor:
    """A matrix with contiguous rows."""
    if codes.stride(1) == 1:
        return codes
    return transpose_codes(codes.t())


def rows_contiguous_of_each(codes: Tensor) -> Tensor:
    """[B, R, C] with contiguous rows; if they are copied, by one transpose of all matrices, side by side."""
    if codes.stride(2) == 1:
        return codes
    batch, rows, columns = codes.shape
    return transpose_codes(codes.transpose(1, 2).reshape(batch * columns, rows)).view(rows, batch, columns).transpose(0, 1)
