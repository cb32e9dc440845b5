"""INT8 GEMM and transpose on the CPU. M rows, N columns, K summed.

Three candidates compute a product of codes:

    onednn    torch.ops.onednn.qlinear_pointwise: scale, bias and output dtype fused; x86 only
    int_mm    torch._int_mm: an int32 product; as fast with VNNI, slower with AMX (an older oneDNN entry)
    portable  fp32 matrix products of at most 1024 codes each, added in int32: right everywhere, fast nowhere

The first two are private to torch and may change with it, hence the self-test.

A candidate is used if a small product of extreme codes comes out exactly, once per process; the order of
preference depends on what the CPU has. `QTRAIN_CPU_GEMM=onednn|int_mm|portable` or `forced(...)` overrides
it. The thread count is torch's, and nothing global is changed. Whatever the candidate, the integer sum is
exact and every rounding is the reference's, in its order; only a fused epilogue of oneDNN might round
otherwise on some CPU, by units in the last place of fp32.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from qcompile.errors import KernelError
from qcompile.kernels import note_launch
from qcompile.kernels.convolution import operators
from qcompile.kernels.fallback import first_that_runs
from qcompile.kernels.registry import find_kernel

__all__ = [
    "CANDIDATES",
    "MAX_K",
    "capability",
    "convolutions",
    "forced",
    "kernel_name",
    "product",
    "scaled_bmm",
    "scaled_mm",
    "self_test",
    "transpose_codes",
]

INT32_MAX = 2**31 - 1
MAX_K = INT32_MAX // 128**2
"""131,071: the longest sum of products of codes (-128 * -128 at worst) that an int32 accumulator holds."""

PORTABLE_K = 1024
"""The longest such sum that fp32 holds: 1024 * 128 * 128 = 2**24, so every partial sum is exact, in any
order, also in TF32 or bf16 passes with fp32 accumulation (8 bits hold every code)."""

EPILOGUE_ELEMENTS = 2**18
"""Elements of an epilogue block: an fp32 block and its scales (2 MB) about fill a level-2 cache. 2**17 to
2**20 measured equal on 2048 x 8192, and 3.5 times faster than one pass per operation over the whole
matrix."""


# --- Integer products ---------------------------------------------------------------------------------------


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


def _onednn(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
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
        return torch._mkldnn_transpose(b_t.to_mkldnn(), 0, 1)
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
    if codes.t().is_contiguous() and not codes.is_contiguous():
        return codes.t().reshape(-1).view(codes.shape[1], codes.shape[0]).t()
    return codes.reshape(-1).view(codes.shape)


@functools.lru_cache(maxsize=64)
def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float32, device="cpu")


@functools.lru_cache(maxsize=64)
def _zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int64, device="cpu")


# --- Which candidate ----------------------------------------------------------------------------------------

# Without int8 dot products (VNNI), x86 adds products in saturating int16 pairs: neither safe nor fast.
_PREFERENCE = {
    "amx": ("onednn", "int_mm", "portable"),
    "vnni": ("onednn", "int_mm", "portable"),
    "none": ("portable", "int_mm"),
}

_forced: str | None = None
_failed: set[str] = set()  # passed the self-test, and then failed in use


@functools.cache
def capability() -> str:
    """What the CPU has for int8 products: "amx", "vnni" or "none"."""
    for name, probe in (("amx", "_is_amx_tile_supported"), ("vnni", "_is_vnni_supported")):
        supported = getattr(torch.cpu, probe, None)
        if supported is not None and supported():
            return name
    return "none"


@functools.cache
def self_test(name: str) -> str | None:
    """None if candidate `name` multiplies extreme codes exactly on this machine, else what went wrong.

    Runs once, outside the modes of a caller that is tracing: there the product would be fake.
    """
    with _disable_current_modes():
        return _self_test(CANDIDATES[name])


def _self_test(product: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    m, k, n = 17, 515, 33  # more than a tile each, and no multiple of one
    extremes = torch.tensor([-128, 127, -127, 0, 1, -1, 127, -128], dtype=torch.int8, device="cpu")
    a = extremes.repeat(m * k // 8 + 1)[: m * k].view(m, k)
    b = extremes.flip(0).repeat(k * n // 8 + 1)[: k * n].view(k, n)
    low, high = torch.full_like(a, -128), torch.full_like(b, 127)  # one sign: saturation shows
    try:
        for left, right in ((a, b), (low, high), (low, -high), (a, high)):
            want = torch.mm(left.to(torch.float64), right.to(torch.float64))
            if not torch.equal(product(left, right).to(torch.float64), want):
                return "wrong product"
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return f"not available: {error}".splitlines()[0]
    return None


@functools.cache
def _usable() -> tuple[str, ...]:
    return tuple(name for name in _PREFERENCE[capability()] if self_test(name) is None)


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Use one candidate inside the block, in all threads. Errors: `KernelError` if it cannot run here."""
    global _forced
    _check_candidate(name, "forced()")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def kernel_name(m: int, n: int, k: int, *, zero_points: bool = False) -> str:
    """The candidate that a GEMM of this shape uses; "none" if it has nothing to multiply.

    With zero points, or more than `MAX_K` summed codes, the sum must stay integer until it is complete, which
    oneDNN's fp32 output is not: then the best of the others is used, also when "onednn" is forced.
    Errors: `KernelError`.
    """
    return _choices(m, n, k, zero_points)[0]


def _choices(m: int, n: int, k: int, zero_points: bool) -> tuple[str, ...]:
    """`kernel_name`, and what can stand in for it."""
    if 0 in (m, n, k):
        return ("none",)
    choice = _forced or os.environ.get("QTRAIN_CPU_GEMM")
    if choice:
        _check_candidate(choice, "QTRAIN_CPU_GEMM")
    usable = tuple(name for name in _usable() if name not in _failed)
    names = (choice, *usable) if choice else usable
    if zero_points or k > MAX_K:
        names = tuple(name for name in names if name not in FLOAT_PRODUCTS)
    if not names:
        raise KernelError(
            "no int8 product is exact on this CPU. `python -m qcompile doctor` has each self-test's result."
        )
    return names[:1] if choice in names else names


def _check_candidate(name: str, source: str) -> None:
    if name not in CANDIDATES:
        raise KernelError(
            f"{source}: {name!r} is no int8 product of the CPU; choose from {list(CANDIDATES)}."
        )
    problem = self_test(name)
    if problem is not None:
        raise KernelError(f"{source}: {name!r} cannot be used here ({problem}); usable: {list(_usable())}.")


# --- scaled_mm ----------------------------------------------------------------------------------------------


def scaled_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`qtrain::scaled_mm` of checked operands; `qcompile.ops.scaled_mm` has their shapes and dtypes."""
    (m, k), n = a.shape, b.shape[1]
    users = find_kernel("cpu", m, n, k, zero_points=a_zero is not None or b_zero is not None)
    if users is not None:
        note_launch(users.name, m, n, k)
        return users.run(a, b, a_scale, b_scale, a_zero, b_zero, bias, out_dtype)
    out = product(a, b, a_scale, b_scale, a_zero, b_zero, bias, out_dtype)
    name = kernel_name(m, n, k, zero_points=a_zero is not None or b_zero is not None)
    if name != "none":
        note_launch(name, m, n, k)
    return out


def product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`scaled_mm` as a part of another operator, which notes the launch."""
    (m, k), n = a.shape, b.shape[1]
    names = _choices(m, n, k, a_zero is not None or b_zero is not None)
    operands = (a, b, a_scale, b_scale, a_zero, b_zero, bias, out_dtype)
    ran, out = first_that_runs(names, lambda name: _product(name, *operands), f"a GEMM of {m} x {n} x {k}")
    _failed.update(names[: names.index(ran)])
    return out


def _product(
    name: str,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    m, n = a.shape[0], b.shape[1]
    if name == "none":
        acc = a.new_zeros((m, n), dtype=torch.float32)
        return _epilogue(acc, a_scale, b_scale, bias, out_dtype)
    if name == "onednn":
        if _fuses(a_scale, bias, out_dtype):
            scale = _per_column(a_scale.reshape(1) * b_scale.reshape(-1), n)
            fused_bias = None if bias is None else _per_column(bias.to(torch.float32).reshape(-1), n)
            return _onednn(a, b, scale, fused_bias, out_dtype)
        acc = _onednn_product(a, b)
    else:
        acc = _integer_sum(a, b, CANDIDATES[name])
        if a_zero is not None or b_zero is not None:
            acc = _without_zero_points(acc, a, b, a_zero, b_zero)
    return _epilogue(acc, a_scale, b_scale, bias, out_dtype)


def _fuses(a_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> bool:
    """Whether oneDNN's epilogue can do it all: scale and bias per column, fp32 or bf16 out."""
    bias_per_column = bias is None or bias.ndim < 2 or bias.shape[0] == 1
    return a_scale.numel() == 1 and bias_per_column and out_dtype in (torch.float32, torch.bfloat16)


def _per_column(values: Tensor, n: int) -> Tensor:
    return values.expand(n).contiguous()


def _integer_sum(a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """a @ b in int32, or in int64 where K is long enough to overflow it."""
    k = a.shape[1]
    if k <= MAX_K:
        return product(a, b)
    total = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.int64)
    for start in range(0, k, MAX_K):
        part = slice(start, start + MAX_K)
        total += product(a[:, part], b[part])
    return total


def _without_zero_points(
    acc: Tensor, a: Tensor, b: Tensor, a_zero: Tensor | None, b_zero: Tensor | None
) -> Tensor:
    """sum (a - a_zero)(b - b_zero) = sum a b - a_zero * (sum b - K * b_zero) - b_zero * sum a.

    In integers that cannot overflow: int32 holds the sum and all its parts for every zero point in the range
    of the codes up to K = 33,025. Reads the largest zero points, which costs no synchronisation on a CPU.
    """
    k = a.shape[1]
    az = a.new_zeros((1, 1), dtype=torch.int32) if a_zero is None else a_zero.reshape(-1, 1)
    bz = b.new_zeros((1, 1), dtype=torch.int32) if b_zero is None else b_zero.reshape(1, -1)
    bound = k * (128 + int(az.to(torch.int64).abs().max())) * (128 + int(bz.to(torch.int64).abs().max()))
    dtype = torch.int32 if bound <= INT32_MAX and acc.dtype is torch.int32 else torch.int64
    acc, az, bz = acc.to(dtype), az.to(dtype), bz.to(dtype)
    if a_zero is not None:
        acc.addcmul_(az, b.sum(0, keepdim=True, dtype=dtype) - k * bz, value=-1)
    if b_zero is not None:
        acc.addcmul_(a.sum(1, keepdim=True, dtype=dtype), bz, value=-1)
    return acc


def _epilogue(
    acc: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """cast(float32(acc) * (a_scale * b_scale) + bias) -> out_dtype [M, N]; `acc` may be overwritten.

    By blocks of rows that stay in cache between the operations. The scales are multiplied first, as in the
    reference.
    """
    m, n = acc.shape
    a_scale, b_scale = _as_matrix(a_scale), _as_matrix(b_scale)
    bias = None if bias is None else _as_matrix(bias)
    out = acc if acc.dtype is out_dtype else acc.new_empty((m, n), dtype=out_dtype)
    rows = max(1, EPILOGUE_ELEMENTS // max(1, n))
    for start in range(0, m, rows):
        part = slice(start, start + rows)
        block = acc[part].to(torch.float32)  # `acc` itself if it is fp32
        block.mul_(_rows(a_scale, part) * b_scale)
        if bias is not None:
            block.add_(_rows(bias, part).to(torch.float32))
        if out is not acc:
            out[part].copy_(block)
    return out


def _as_matrix(values: Tensor) -> Tensor:
    """0-d and [N] as [1, 1] and [1, N], so that the rows are always axis 0."""
    return values if values.ndim == 2 else values.reshape(1, -1)


def _rows(values: Tensor, part: slice) -> Tensor:
    return values if values.shape[0] == 1 else values[part]


def scaled_bmm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`qtrain::scaled_bmm` of checked operands; `qcompile.ops.scaled_bmm` has their shapes and dtypes.

    Matrix by matrix: no library has a batched int8 product that hands out its sums.
    """
    (batch, m, k), n = a.shape, b.shape[2]
    zero_points = a_zero is not None or b_zero is not None
    name = kernel_name(m, n, k, zero_points=zero_points)
    out = a.new_empty((batch, m, n), dtype=out_dtype)
    if batch == 0:
        return out
    if name != "none":
        note_launch(name, m, n, k, "bmm", batch)
    bias = None if bias is None else bias.reshape((1,) * (3 - bias.ndim) + tuple(bias.shape))
    for i in range(batch):
        scales = of_batch(a_scale, i), of_batch(b_scale, i)
        zeros = of_batch(a_zero, i), of_batch(b_zero, i)
        out[i] = product(a[i], b[i], *scales, *zeros, of_batch(bias, i), out_dtype)
    return out


def convolutions() -> dict[str, Callable[..., Tensor]]:
    """`qtrain::scaled_conv` and its gradients for checked operands, by name: products of gathered codes."""
    return operators(_gathered_product, kernel_name)


def _gathered_product(a: Tensor, b: Tensor, *rest: Tensor | torch.dtype | None) -> Tensor:
    """`product` for an `a` that may be a transposed view: gradients of weights."""
    if not a.is_contiguous() and a.t().is_contiguous():
        a = transpose_codes(a.t())
    return product(a, b, *rest)  # type: ignore[arg-type]


@overload
def of_batch(values: Tensor, i: int) -> Tensor: ...
@overload
def of_batch(values: None, i: int) -> None: ...
@overload
def of_batch(values: Tensor | None, i: int) -> Tensor | None: ...
def of_batch(values: Tensor | None, i: int) -> Tensor | None:
    """Scales, zero points or a bias of one matrix of a batch."""
    if values is None or values.ndim == 0:
        return values
    return values[i if values.shape[0] > 1 else 0]


# --- transpose ----------------------------------------------------------------------------------------------

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
    return torch._mkldnn_transpose(codes.to_mkldnn(), 0, 1).to_dense()


@functools.cache
def _mkldnn_transposes() -> bool:
    with _disable_current_modes():
        codes = torch.arange(35, dtype=torch.int8, device="cpu").view(5, 7)
        try:
            return torch.equal(_mkldnn_transpose(codes), codes.t())
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
