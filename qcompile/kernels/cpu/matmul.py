"""INT8 GEMM on the CPU: a product of codes, with zero points, scales, bias and one rounding.

The integer sum is exact and every rounding is the reference's, in its order (`qcompile.ops.scaled_mm`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qcompile._sizes import LARGE
from qcompile.kernels import batched, note_launch
from qcompile.kernels.cpu.choice import choices, give_up, kernel_name, prefers_int_mm
from qcompile.kernels.cpu.products import CANDIDATES, INT32_MAX, MAX_K, onednn, onednn_product, onednn_weight
from qcompile.kernels.fallback import first_that_runs
from qcompile.kernels.quantized_tensor import QuantizedTensor, zero_point_count
from qcompile.kernels.registry import find_kernel, run_kernel

__all__ = [
    "codes_mm",
    "epilogue",
    "epilogue_fuses",
    "integer_sum",
    "product",
    "scaled_bmm",
    "scaled_mm",
    "without_zero_points",
    "writes_out_epilogue",
]

EPILOGUE_ELEMENTS = 2**18
"""Elements of an epilogue block: an fp32 block and its scales (2 MB) about fill a level-2 cache. 2**17 to
2**20 measured equal on 2048 x 8192, and 3.5 times faster than one pass per operation over the whole
matrix."""


def scaled_mm(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`qtrain::scaled_mm` of checked operands; `qcompile.ops.scaled_mm` has their shapes and dtypes."""
    (m, k), n = a.codes.shape, b.codes.shape[1]
    users = find_kernel("cpu", m, n, k, zero_points=zero_point_count(a.zero, b.zero) > 0)
    if users is not None:
        note_launch(users.name, m, n, k)
        return run_kernel(users, a, b, bias, out_dtype)
    name, out = _named_product(a, b, bias, out_dtype)
    if name != "none":
        note_launch(name, m, n, k)
    return out


def product(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`scaled_mm` as a part of another operator, which notes the launch."""
    return _named_product(a, b, bias, out_dtype)[1]


def _named_product(
    a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype
) -> tuple[str, Tensor]:
    """The candidate that ran, and the product."""
    (m, k), n = a.codes.shape, b.codes.shape[1]
    names = choices(m, n, k, zero_point_count(a.zero, b.zero) > 0)
    ran, out = first_that_runs(names, lambda name: _product(name, a, b, bias, out_dtype), f"a GEMM of {m} x {n} x {k}")
    give_up(names[: names.index(ran)])
    return ran, out


def _product(name: str, a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    m, n = a.codes.shape[0], b.codes.shape[1]
    if name == "none":
        acc = a.codes.new_zeros((m, n), dtype=torch.float32)
    elif name != "onednn":
        acc = without_zero_points(integer_sum(a.codes, b.codes, CANDIDATES[name]), a, b)
    elif epilogue_fuses(a.scale, bias, out_dtype):
        scale = _per_column(a.scale.reshape(1) * b.scale.reshape(-1), n)
        fused_bias = None if bias is None else _per_column(bias.to(torch.float32).reshape(-1), n)
        return onednn(a.codes, b.codes, scale, fused_bias, out_dtype)
    else:
        acc = onednn_product(a.codes, b.codes, onednn_weight(b.codes))
    return epilogue(acc, a.scale, b.scale, bias, out_dtype)


def writes_out_epilogue(
    a: _Sized,
    b: _Sized,
    a_scale: _Sized,
    b_scale: _Sized,
    a_zero: object,
    b_zero: object,
    bias: _Sized | None,
    out_dtype: torch.dtype,
) -> bool:
    """Whether `passes.write_out_epilogues` makes this `scaled_mm` a `codes_mm` and arithmetic. Tensors may be fake."""
    if a_zero is not None or b_zero is not None or epilogue_fuses(a_scale, bias, out_dtype):
        return False
    (m, k), n = a.shape, b.shape[1]
    if not isinstance(k, int) or not 0 < k <= MAX_K or 0 in [size for size in (m, n) if isinstance(size, int)]:
        return False
    rows, columns = (size if isinstance(size, int) else LARGE for size in (m, n))
    return prefers_int_mm() and find_kernel("cpu", rows, columns, k, zero_points=False) is None


def codes_mm(a: Tensor, b: Tensor) -> Tensor:
    """`qtrain::codes_mm` of checked operands."""
    (m, k), n = a.shape, b.shape[1]
    if 0 in (m, n, k):
        return a.new_zeros((m, n), dtype=torch.int32)
    names = choices(m, n, k, zero_points=True)  # those whose product is an integer
    ran, out = first_that_runs(names, lambda name: CANDIDATES[name](a, b), f"a GEMM of {m} x {n} x {k}")
    give_up(names[: names.index(ran)])
    note_launch(ran, m, n, k)
    return out


def epilogue_fuses(a_scale: _Sized, bias: _Sized | None, out_dtype: torch.dtype) -> bool:
    """Whether oneDNN's epilogue can do it all: scale and bias per column, fp32 or bf16 out. A size that is not known counts as more
    than 1."""
    bias_per_column = bias is None or len(bias.shape) < 2 or _is_one(bias.shape[0])
    return all(map(_is_one, a_scale.shape)) and bias_per_column and out_dtype in (torch.float32, torch.bfloat16)


class _Sized(Protocol):
    """A tensor, or what is known of one."""

    @property
    def shape(self) -> Sequence[Any]: ...


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _per_column(values: Tensor, n: int) -> Tensor:
    return values.expand(n).contiguous()


def integer_sum(a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """a @ b in int32, or in int64 where K is long enough to overflow it."""
    k = a.shape[1]
    if k <= MAX_K:
        return product(a, b)
    total = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.int64)
    for start in range(0, k, MAX_K):
        part = slice(start, start + MAX_K)
        total += product(a[:, part], b[part])
    return total


def without_zero_points(acc: Tensor, a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
    """sum (a - a_zero)(b - b_zero) = sum a b - a_zero * (sum b - K * b_zero) - b_zero * sum a; `acc` is sum a b.

    In integers that cannot overflow: int32 holds the sum and all its parts for every zero point in the range
    of the codes up to K = 33,025. Reads the largest zero points, which costs no synchronisation on a CPU.
    """
    if zero_point_count(a.zero, b.zero) == 0:
        return acc
    k = a.codes.shape[1]
    az = acc.new_zeros((1, 1), dtype=torch.int32) if a.zero is None else a.zero.reshape(-1, 1)
    bz = acc.new_zeros((1, 1), dtype=torch.int32) if b.zero is None else b.zero.reshape(1, -1)
    bound = k * (128 + int(az.to(torch.int64).abs().max())) * (128 + int(bz.to(torch.int64).abs().max()))
    dtype = torch.int32 if bound <= INT32_MAX and acc.dtype is torch.int32 else torch.int64
    acc, az, bz = acc.to(dtype), az.to(dtype), bz.to(dtype)
    if a.zero is not None:
        acc.addcmul_(az, b.codes.sum(0, keepdim=True, dtype=dtype) - k * bz, value=-1)
    if b.zero is not None:
        acc.addcmul_(a.codes.sum(1, keepdim=True, dtype=dtype), bz, value=-1)
    return acc


def epilogue(
    acc: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """cast(float32(acc) * (a_scale * b_scale) + bias) -> out_dtype [M, N]; `acc` may be overwritten.

    By blocks of rows that stay in cache between the operations. The scales are multiplied first, as in the
    reference.
    """
    m, n = acc.shape
    rows = max(1, EPILOGUE_ELEMENTS // max(1, n))
    if m <= rows:
        return _scaled(acc, a_scale * b_scale, bias).to(out_dtype)
    a_scale, b_scale = _as_matrix(a_scale), _as_matrix(b_scale)
    bias = None if bias is None else _as_matrix(bias)
    out = acc if acc.dtype is out_dtype else acc.new_empty((m, n), dtype=out_dtype)
    for start in range(0, m, rows):
        part = slice(start, start + rows)
        block = _scaled(acc[part], _rows(a_scale, part) * b_scale, None if bias is None else _rows(bias, part))
        if out is not acc:
            out[part].copy_(block)
    return out


def _scaled(acc: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """float32(acc) * scale + bias, in place if `acc` is fp32."""
    out = acc.mul_(scale) if acc.dtype is torch.float32 else acc * scale
    return out if bias is None else out.add_(bias.to(torch.float32))


def _as_matrix(values: Tensor) -> Tensor:
    """0-d and [N] as [1, 1] and [1, N], so that the rows are always axis 0."""
    return values if values.ndim == 2 else values.reshape(1, -1)


def _rows(values: Tensor, part: slice) -> Tensor:
    return values if values.shape[0] == 1 else values[part]


def scaled_bmm(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`qtrain::scaled_bmm` of checked operands; `qcompile.ops.scaled_bmm` has their shapes and dtypes."""
    (m, k), n = a.codes.shape[1:], b.codes.shape[2]
    name = functools.partial(kernel_name, m, n, k, zero_points=zero_point_count(a.zero, b.zero) > 0)
    return batched.scaled_bmm(product, name, a, b, bias, out_dtype)
