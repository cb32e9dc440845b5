"""Products of codes on the CPU: three candidates.

    onednn    torch.ops.onednn.qlinear_pointwise: scale, bias and output dtype fused; x86 only
    int_mm    torch._int_mm: an int32 product; as fast with VNNI, slower with AMX (an older oneDNN entry)
    portable  fp32 matrix products of at most 1024 codes each, added in int32: right everywhere, fast nowhere

The first two are private to torch and may change with it, hence the self-test in `choice`. Whatever the candidate, the integer sum
is exact; only a fused epilogue of oneDNN might round otherwise on some CPU, by units in the last place of fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.torch_private import mkldnn_transpose

__all__ = ["CANDIDATES", "FLOAT_PRODUCTS", "INT32_MAX", "MAX_K", "onednn", "onednn_product", "onednn_weight"]

INT32_MAX = 2**31 - 1
MAX_K = INT32_MAX // 128**2
"""131,071: the longest sum of products of codes (-128 * -128 at worst) that an int32 accumulator holds."""

PORTABLE_K = 1024
"""The longest such sum that fp32 holds: 1024 * 128 * 128 = 2**24, so every partial sum is exact, in any
order, also in TF32 or bf16 passes with fp32 accumulation (8 bits hold every code)."""


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] x int8 [K, N] -> int32, by `torch._int_mm`.

    Row-major and column-major operands only: with others torch 2.13 warns and takes a naive loop, and an
    expanded operand (stride 0) gives wrong sums. An operand with other strides is copied.
    """
    return torch._int_mm(_dense(a), _dense(b))


def _portable(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] x int8 [K, N] -> int32, by exact fp32 products of `PORTABLE_K` codes."""
    total = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.int32)
    with torch.autocast("cpu", enabled=False):  # else the product may be rounded to bf16 when it is done
        for start in range(0, a.shape[1], PORTABLE_K):
            part = slice(start, start + PORTABLE_K)
            total += torch.mm(a[:, part].to(torch.float32), b[part].to(torch.float32)).to(torch.int32)
    return total


def onednn(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """cast(float32(a @ b) * scale + bias), all in one kernel.

    a int8 [M, K], b int8 [K, N], scale fp32 [N], bias fp32 [N] or None -> fp32 or bf16 [M, N].
    Its weight is an opaque row-major copy of b. Operands with other strides are copied here, because oneDNN's
    own copies are slow: a b that is a transposed view (the weight of a linear) is transposed on the way into
    the opaque one. K = 0 crashes the process: the caller keeps it out.
    """
    return _onednn_run(a, onednn_weight(b), scale, bias, out_dtype)


def onednn_weight(b: Tensor) -> Tensor:
    """oneDNN's opaque copy of b int8 [K, N]."""
    b_t = b.t()
    if b_t.is_contiguous() and not b.is_contiguous():
        return mkldnn_transpose(b_t)
    return b.contiguous().to_mkldnn()


def _onednn_run(
    a: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise.default(
        a.contiguous(), 1.0, 0, weight, scale, _zeros(scale.shape[0]), bias, 1.0, 0, out_dtype, "none", [], ""
    )


def _onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """The exact product rounded once to fp32: all that oneDNN hands out of its int32 accumulator."""
    return onednn_product(a, b, onednn_weight(b))


def onednn_product(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """The same with the copy of b made before."""
    return _onednn_run(a, weight, _ones(b.shape[1]), None, torch.float32)


CANDIDATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "onednn": _onednn_product,
    "int_mm": _int_mm,
    "portable": _portable,
}
"""name -> product of codes, int32 unless in `FLOAT_PRODUCTS`. None takes an empty K."""

FLOAT_PRODUCTS = ("onednn",)
"""Candidates whose product is rounded to fp32: right as a final sum, not as a part of one."""


def _dense(codes: Tensor) -> Tensor:
    """The matrix row-major or column-major, with the strides that go with it: those of an axis of size 1 may be any number,
    and libraries read them."""
    if codes.is_contiguous() and 1 not in codes.shape:
        return codes
    if codes.t().is_contiguous() and not codes.is_contiguous():
        return codes.t().reshape(-1).view(codes.shape[1], codes.shape[0]).t()
    return codes.reshape(-1).view(codes.shape)


@functools.lru_cache(maxsize=64)
def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float32, device="cpu")


@functools.lru_cache(maxsize=64)
def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64, device="cpu")
