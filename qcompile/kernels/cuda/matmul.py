"""INT8 GEMMs on a GPU: `scaled_mm`, and its forms for packed codes, for a result that leaves as codes, and for batches.

M rows, N columns, K summed. Operands are checked (`qcompile.ops` has their shapes and dtypes). `prepare_scaled_mm` says what of a
call stays for the next such one (`qcompile.kernels.prepared`).
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels import batched, note_launch
from qcompile.kernels.cuda.choice import gemm_for, reasons_against, remember
from qcompile.kernels.cuda.products import CANDIDATES, k_major
from qcompile.kernels.cuda.transpose import rows_contiguous_of_each
from qcompile.kernels.fallback import first_that_runs, ours_or_plain
from qcompile.kernels.quantized_tensor import QuantizedTensor, flat, zero_point_count
from qcompile.kernels.registry import find_kernel, registered_kernels, run_kernel
from qcompile.kernels.triton.tuning import max_k

__all__ = ["prepare_scaled_mm", "product", "scaled_bmm", "scaled_mm", "scaled_mm_packed", "scaled_mm_requantize"]


def scaled_mm(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`qtrain::scaled_mm`.

    Errors: `KernelError` where no int8 kernel can run.
    """
    (m, k), n = a.codes.shape, b.codes.shape[1]
    users = find_kernel("cuda", m, n, k, zero_points=zero_point_count(a.zero, b.zero) > 0)
    if users is not None:
        note_launch(users.name, m, n, k)
        return run_kernel(users, a, b, bias, out_dtype)
    name, out = _named_product(a, b, bias, out_dtype)
    if name != "none":
        note_launch(name, m, n, k)
    return out


def prepare_scaled_mm(a: Tensor, b: Tensor, *rest: Any) -> Callable[..., Tensor] | None:
    """For the operands of `qtrain::scaled_mm`. None for what is more than one launch of ours."""
    (m, k), n = a.shape, b.shape[1]
    name = gemm_for(a.device, m, n, k)
    if name not in ("triton", "triton_tma") or registered_kernels():
        return None
    from qcompile.kernels.triton import scaled_mm as triton_mm

    run = triton_mm.prepare(a, b.t(), *rest, kernel=name)
    if run is None:
        return None

    def again(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        out = run(a, b.t(), *rest[:-1])
        note_launch(name, m, n, k)
        return out

    return again


def product(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`scaled_mm` as a part of another operator, which notes the launch."""
    return _named_product(a, b, bias, out_dtype)[1]


def _named_product(
    a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype
) -> tuple[str, Tensor]:
    """The candidate that ran, and the product."""
    device, (m, k), n = a.codes.device, a.codes.shape, b.codes.shape[1]
    chosen = gemm_for(device, m, n, k)
    if chosen == "none":
        out = a.codes.new_zeros((m, n), dtype=torch.float32) * (a.scale * b.scale)
        return chosen, (out if bias is None else out + bias.to(torch.float32)).to(out_dtype)
    names = itertools.chain((chosen,), _stand_ins(chosen, device))  # nothing is asked unless the first fails
    ran, out = first_that_runs(names, lambda name: CANDIDATES[name](a, b, bias, out_dtype), f"a GEMM of {m} x {n} x {k}")
    if ran != chosen:
        remember(device, m, n, k, ran)
    return ran, out


def _stand_ins(chosen: str, device: torch.device) -> Iterator[str]:
    """What can run where a candidate has failed."""
    if "QTRAIN_CUDA_GEMM" not in os.environ:
        yield from (name for name in ("triton", "int_mm") if name != chosen and not reasons_against(name, device))


def scaled_mm_packed(
    a: QuantizedTensor,
    b: QuantizedTensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    k: int,
    a_bits: int,
    b_bits: int,
) -> Tensor:
    """`qtrain::scaled_mm_packed`: unpacked in registers by the Triton kernel, before the GEMM elsewhere."""
    from qcompile.ops.pack_codes import codes_per_byte
    from qcompile.ops.scaled_mm_packed import unpacked

    def as_int8() -> Tensor:
        left, right = unpacked(a.codes, b.codes, k, a_bits, b_bits)
        return scaled_mm(a._replace(codes=left), b._replace(codes=right), bias, out_dtype)

    device, m, n = a.codes.device, a.codes.shape[0], b.codes.shape[1]
    fields = {codes_per_byte(bits) for bits in (a_bits, b_bits)} - {1}
    name = gemm_for(device, m, n, k)
    if not name.startswith("triton") or len(fields) != 1 or k > max_k(zero_point_count(a.zero, b.zero)):
        return as_int8()
    from qcompile.kernels.triton import scaled_mm as triton_mm

    kernel = "triton int4" if fields == {2} else "triton int2"

    def packed() -> Tensor:
        out = triton_mm.scaled_mm(*k_major(a, b), bias, out_dtype, k=k, a_bits=a_bits, b_bits=b_bits)
        note_launch(kernel, m, n, k)
        return out

    return ours_or_plain(kernel, device, packed, as_int8, f"a GEMM of {m} x {n} x {k}")


def scaled_mm_requantize(a: QuantizedTensor, b: QuantizedTensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`qtrain::scaled_mm_requantize`: one Triton kernel where it can run, else the operator's parts."""
    from qcompile.ops.scaled_mm_requantize import scaled_mm_requantize_reference

    def by_parts() -> tuple[Tensor, Tensor, Tensor]:
        return scaled_mm_requantize_reference(*flat(a, b), *rest)

    device, (m, k), n = a.codes.device, a.codes.shape, b.codes.shape[1]
    name = gemm_for(device, m, n, k)
    if not name.startswith("triton") or k > max_k(zero_point_count(a.zero, b.zero)):
        return by_parts()
    from qcompile.kernels.triton import requantize

    kernel = "triton+requantize"

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        made = requantize.scaled_mm_requantize(*k_major(a, b), *rest)
        note_launch(kernel, m, n, k)
        return made

    return ours_or_plain(kernel, device, ours, by_parts, f"a GEMM of {m} x {n} x {k}")


def scaled_bmm(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`qtrain::scaled_bmm`: one launch of the Triton kernel where it can run, else matrix by matrix."""
    device, (batch, m, k), n = a.codes.device, a.codes.shape, b.codes.shape[2]

    name = functools.partial(gemm_for, device, m, n, k)

    def one_by_one() -> Tensor:
        return batched.scaled_bmm(product, name, a, b, bias, out_dtype)

    if batch == 0 or not name().startswith("triton") or k > max_k(zero_point_count(a.zero, b.zero)):
        return one_by_one()
    from qcompile.kernels.triton import scaled_bmm as triton_bmm

    def together() -> Tensor:
        left, b_t = rows_contiguous_of_each(a.codes), rows_contiguous_of_each(b.codes.transpose(1, 2))
        out = triton_bmm.scaled_bmm(left, b_t, a.scale, b.scale, a.zero, b.zero, bias, out_dtype)
        note_launch("triton", m, n, k, "bmm", batch)
        return out

    return ours_or_plain("triton bmm", device, together, one_by_one, f"{batch} GEMMs of {m} x {n} x {k}")
