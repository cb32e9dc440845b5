"""INT8 GEMM, quantize with a transposed copy, and transpose on NVIDIA and AMD GPUs. M rows, N columns, K summed.

    triton       a kernel of ours: any shape; zero points, scales, bias, cast fused; capability 8.0 or newer
    triton_tma   the same, persistent and fed by TMA: capability 9.0, K a multiple of 16; `triton` runs where it cannot
    triton_gluon the same with a step of the tensor cores in flight; not measured unless asked for: it has not run on a GPU yet
    int_mm       torch._int_mm (cuBLASLt, hipBLASLt): int32 out, the rest in passes of its own; 7.5 or newer

All read a [M, K] and b as b_t [N, K], rows contiguous. Another layout is copied first: on compute
capability 9.0 cuBLASLt has no tensor-core kernel for a row-major b (about 8 times slower), and one copy of
1-byte codes is far cheaper.

The default is `triton` where it can run. Under `mode="max-autotune"` `int_mm` and every configuration of the
Triton tables are measured, and the fastest is taken for the bucket of sizes (`qcompile.kernels.autotune`).
`QTRAIN_CUDA_GEMM=triton|triton_tma|triton_gluon|int_mm` overrides the choice. The integer sum is exact in all of them up to
K = 131,071 (less with zero points, `max_k`); longer sums are added up in fp32, part by part.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from qcompile.errors import KernelError
from qcompile.kernels import batched, cuda_conv, note_launch
from qcompile.kernels.convolution import operators
from qcompile.kernels.fallback import first_that_runs, has_failed, ours_or_plain
from qcompile.kernels.prepared import forget_prepared, prepared
from qcompile.kernels.quantized_tensor import QuantizedTensor, as_operator, flat, zero_point_count
from qcompile.kernels.registry import find_kernel, registered_kernels
from qcompile.kernels.triton.launch import MINIMUM_CAPABILITY, unavailable_reasons
from qcompile.kernels.triton.tuning import bucket, max_k

__all__ = [
    "CANDIDATES",
    "fallback_reason",
    "fits",
    "gemm_for",
    "kernel_for",
    "quantize_transposed_cuda",
    "reasons_against",
    "register_cuda_kernels",
    "remember",
    "scaled_bmm_cuda",
    "scaled_mm_cuda",
    "scaled_mm_requantize_cuda",
    "transpose_codes_cuda",
    "tuned",
]

INT8_TENSOR_CORES = (7, 5)
"""The first compute capability with int8 tensor cores (Turing), and the first that `torch._int_mm`
supports."""

DESCRIBED = ("triton_tma", "triton_gluon")
TMA_MULTIPLE = 16
"""Rows are to begin on 16-byte boundaries (`qcompile.kernels.triton.scaled_mm_tma`)."""

INT_MM_ROWS = 17
INT_MM_MULTIPLE = 16
"""`torch._int_mm` wants M > 16, and K and N in multiples of 8, its own tests have multiples of 16; zeros are added up to there."""


# --- Choice -------------------------------------------------------------------------------------------------


def kernel_for(device: torch.device, capability: tuple[int, int] | None = None) -> str:
    """The candidate for `device`, whatever the sizes. `capability` stands in for the device's own.

    Errors: `KernelError` on a GPU without int8 tensor cores, or if `QTRAIN_CUDA_GEMM` asks for what cannot
    run.
    """
    if capability is None and device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
    if capability is not None and capability < INT8_TENSOR_CORES:
        raise KernelError(
            f"scaled_mm: {device} has compute capability {capability[0]}.{capability[1]}; int8 tensor cores "
            f"need {INT8_TENSOR_CORES[0]}.{INT8_TENSOR_CORES[1]}. Keep the matmuls in high precision (hp): "
            f"recipe 'none'."
        )
    wanted = os.environ.get("QTRAIN_CUDA_GEMM")
    if wanted is None:
        return "int_mm" if reasons_against("triton", device, capability) else "triton"
    if wanted not in CANDIDATES:
        raise KernelError(f"QTRAIN_CUDA_GEMM: {wanted!r} is no candidate; allowed: {list(CANDIDATES)}.")
    if reasons := reasons_against(wanted, device, capability):
        raise KernelError(f"QTRAIN_CUDA_GEMM: {wanted!r} cannot run on {device}: {'; '.join(reasons)}. Use 'int_mm'.")
    return wanted


def reasons_against(name: str, device: torch.device, capability: tuple[int, int] | None = None) -> tuple[str, ...]:
    """Why a candidate cannot run on a GPU with int8 tensor cores; empty if it can."""
    if name == "int_mm":
        return ()
    return unavailable_reasons(device, "scaled_mm" if name == "triton" else name, capability=capability)


def fits(name: str, k: int) -> bool:
    """Whether a candidate takes rows of K codes."""
    return name not in DESCRIBED or k % TMA_MULTIPLE == 0


@functools.cache
def _kernel_for(device: torch.device, wanted: str | None) -> str:
    return kernel_for(device)


_tuned: dict[tuple[torch.device, tuple[int, int, int]], str] = {}


def gemm_for(device: torch.device, m: int, n: int, k: int) -> str:
    """The candidate for a product of M x N x K: what `QTRAIN_CUDA_GEMM` asks for, what measured fastest, or the default.

    Errors: those of `kernel_for`.
    """
    wanted = os.environ.get("QTRAIN_CUDA_GEMM")
    name = (tuned(device, m, n, k) if wanted is None else None) or _kernel_for(device, wanted)
    return name if fits(name, k) else "triton"


def tuned(device: torch.device, m: int, n: int, k: int) -> str | None:
    """The candidate that measured fastest for this bucket of sizes, if it was measured."""
    return _tuned.get((device, bucket(m, n, k)))


def remember(device: torch.device, m: int, n: int, k: int, name: str) -> None:
    """Use a candidate for this bucket of sizes from now on."""
    _tuned[device, bucket(m, n, k)] = name
    forget_prepared()


def fallback_reason(device: torch.device) -> str | None:
    """Why the library does the work of a Triton kernel that this GPU could run, or None.

    On capability 7.5 the library is what there is, and `QTRAIN_CUDA_GEMM` is a choice.
    """
    if "QTRAIN_CUDA_GEMM" in os.environ or kernel_for(device) == "triton":
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY["scaled_mm"]:
        return None
    return (
        f"the Triton kernels cannot be used on {device}: {'; '.join(unavailable_reasons(device))}. Integer GEMMs run as "
        "torch._int_mm, which does less in one kernel"
    )


# --- Candidates ---------------------------------------------------------------------------------------------


def _k_major(a: QuantizedTensor, b: QuantizedTensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The operands as our launchers take them: a [M, K] and b_t [N, K] with contiguous rows, scales, zero points."""
    return _rows_contiguous(a.codes), _rows_contiguous(b.codes.t()), a.scale, b.scale, a.zero, b.zero


def _triton(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    from qcompile.kernels.triton.scaled_mm import scaled_mm  # Triton may be missing where this file is imported

    return scaled_mm(*_k_major(a, b), bias, out_dtype)


def _described(
    kernel: str, a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    from qcompile.kernels.triton.scaled_mm import scaled_mm
    from qcompile.kernels.triton.scaled_mm_tma import takes

    *codes, a_scale, b_scale, a_zero, b_zero = _k_major(a, b)
    # A copy, and not `contiguous`: that leaves a matrix of one row as it is, whatever its stride.
    left, b_t = (c if takes(c) else c.clone(memory_format=torch.contiguous_format) for c in codes)
    return scaled_mm(left, b_t, a_scale, b_scale, a_zero, b_zero, bias, out_dtype, kernel=kernel)


def _int_mm(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    left, b_t, a_scale, b_scale, *zeros = _k_major(a, b)
    longest = max_k(zero_point_count(*zeros))
    longest -= longest % INT_MM_MULTIPLE
    parts = [slice(start, start + longest) for start in range(0, left.shape[1], longest)]  # nearly always one
    out = _int_sum(left[:, parts[0]], b_t[:, parts[0]], *zeros).to(torch.float32)
    for part in parts[1:]:
        out += _int_sum(left[:, part], b_t[:, part], *zeros).to(torch.float32)
    out *= a_scale * b_scale
    if bias is not None:
        out += bias.to(torch.float32)
    return out.to(out_dtype)


def _int_sum(a: Tensor, b_t: Tensor, a_zero: Tensor | None, b_zero: Tensor | None) -> Tensor:
    """sum_k (a - a_zero)(b - b_zero), int32 [M, N]. Terms may wrap; their total modulo 2**32 is right because
    the sum fits."""
    (m, k), n = a.shape, b_t.shape[0]
    padding = (-k % INT_MM_MULTIPLE, -n % INT_MM_MULTIPLE, max(0, INT_MM_ROWS - m))
    padded_a = pad(a, (0, padding[0], 0, padding[2])) if padding[0] or padding[2] else _aligned(a)
    padded_b = pad(b_t, (0, padding[0], 0, padding[1])) if padding[0] or padding[1] else _aligned(b_t)
    acc = torch._int_mm(padded_a, padded_b.t())[:m, :n]
    if a_zero is not None:
        column_sums = b_t.sum(1, dtype=torch.int32)
        acc = acc - a_zero * (column_sums if b_zero is None else column_sums - k * b_zero)
    if b_zero is not None:
        acc = acc - b_zero * a.sum(1, dtype=torch.int32, keepdim=True)
    return acc


def _aligned(codes: Tensor) -> Tensor:
    """Contiguous from a 16-byte boundary on, as cuBLASLt's int8 kernels want it; a view into a larger tensor may be neither."""
    codes = codes.contiguous()
    return codes if codes.data_ptr() % 16 == 0 else codes.clone()


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "triton": _triton,
    **{name: functools.partial(_described, name) for name in DESCRIBED},
    "int_mm": _int_mm,
}


# --- Operators ----------------------------------------------------------------------------------------------
# Where a call is one launch of ours, a function beginning with `_prepare_` says what of it stays for the next such call
# (`qcompile.kernels.prepared`).


def scaled_mm_cuda(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`qtrain::scaled_mm` of checked operands; `qcompile.ops.scaled_mm` has their shapes and dtypes.

    Errors: `KernelError` where no int8 kernel can run.
    """
    (m, k), n = a.codes.shape, b.codes.shape[1]
    users = find_kernel("cuda", m, n, k, zero_points=zero_point_count(a.zero, b.zero) > 0)
    if users is not None:
        note_launch(users.name, m, n, k)
        return users.run(*flat(a, b), bias, out_dtype)
    name, out = _named_product(a, b, bias, out_dtype)
    if name != "none":
        note_launch(name, m, n, k)
    return out


def _prepare_mm(a: Tensor, b: Tensor, *rest: Any) -> Callable[..., Tensor] | None:
    """For the operands of `qtrain::scaled_mm`."""
    a_scale, b_scale, a_zero, b_zero, bias, out_dtype = rest
    (m, k), n = a.shape, b.shape[1]
    name = "none" if 0 in (m, n, k) else gemm_for(a.device, m, n, k)
    if name not in ("triton", "triton_tma") or zero_point_count(a_zero, b_zero) or registered_kernels():
        return None
    from qcompile.kernels.triton import scaled_mm

    run = scaled_mm.prepare(a, b.t(), a_scale, b_scale, bias, out_dtype, name)
    if run is None:
        return None

    def again(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        a_scale, b_scale, _, _, bias, _ = rest
        out = run(a, b.t(), a_scale, b_scale, bias)
        note_launch(name, m, n, k)
        return out

    return again


def product(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`scaled_mm_cuda` as a part of another operator, which notes the launch."""
    return _named_product(a, b, bias, out_dtype)[1]


def _named_product(
    a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype
) -> tuple[str, Tensor]:
    """The candidate that ran, and the product."""
    device, (m, k), n = a.codes.device, a.codes.shape, b.codes.shape[1]
    if m == 0 or n == 0 or k == 0:
        out = a.codes.new_zeros((m, n), dtype=torch.float32) * (a.scale * b.scale)
        return "none", (out if bias is None else out + bias.to(torch.float32)).to(out_dtype)
    chosen = gemm_for(device, m, n, k)
    names = itertools.chain((chosen,), _stand_ins(chosen, device))  # nothing is asked unless the first fails
    ran, out = first_that_runs(names, lambda name: CANDIDATES[name](a, b, bias, out_dtype), f"a GEMM of {m} x {n} x {k}")
    if ran != chosen:
        remember(device, m, n, k, ran)
    return ran, out


def _stand_ins(chosen: str, device: torch.device) -> Iterator[str]:
    """What can run where a candidate has failed."""
    if "QTRAIN_CUDA_GEMM" not in os.environ:
        yield from (name for name in ("triton", "int_mm") if name != chosen and not reasons_against(name, device))


def scaled_mm_packed_cuda(
    a: QuantizedTensor,
    b: QuantizedTensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    k: int,
    a_bits: int,
    b_bits: int,
) -> Tensor:
    """`qtrain::scaled_mm_packed` of checked operands: unpacked in registers by the Triton kernel, before the GEMM elsewhere."""
    from qcompile.ops.pack_codes import codes_per_byte
    from qcompile.ops.scaled_mm_packed import unpacked

    def as_int8() -> Tensor:
        left, right = unpacked(a.codes, b.codes, k, a_bits, b_bits)
        return scaled_mm_cuda(a._replace(codes=left), b._replace(codes=right), bias, out_dtype)

    device, m, n = a.codes.device, a.codes.shape[0], b.codes.shape[1]
    fields = {codes_per_byte(bits) for bits in (a_bits, b_bits)} - {1}
    name = "none" if 0 in (m, n, k) else gemm_for(device, m, n, k)
    if not name.startswith("triton") or len(fields) != 1 or k > max_k(zero_point_count(a.zero, b.zero)):
        return as_int8()
    from qcompile.kernels.triton import scaled_mm

    kernel = "triton int4" if fields == {2} else "triton int2"

    def packed() -> Tensor:
        out = scaled_mm.scaled_mm(*_k_major(a, b), bias, out_dtype, k=k, a_bits=a_bits, b_bits=b_bits)
        note_launch(kernel, m, n, k)
        return out

    return ours_or_plain(kernel, device, packed, as_int8, f"a GEMM of {m} x {n} x {k}")


def scaled_mm_requantize_cuda(a: QuantizedTensor, b: QuantizedTensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`qtrain::scaled_mm_requantize` of checked operands: one Triton kernel where it can run, else the operator's parts."""
    from qcompile.ops.scaled_mm_requantize import scaled_mm_requantize_reference

    def by_parts() -> tuple[Tensor, Tensor, Tensor]:
        return scaled_mm_requantize_reference(*flat(a, b), *rest)

    device, (m, k), n = a.codes.device, a.codes.shape, b.codes.shape[1]
    name = "none" if 0 in (m, n, k) else gemm_for(device, m, n, k)
    if not name.startswith("triton") or k > max_k(zero_point_count(a.zero, b.zero)):
        return by_parts()
    from qcompile.kernels.triton import requantize

    kernel = "triton+requantize"

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        made = requantize.scaled_mm_requantize(*_k_major(a, b), *rest)
        note_launch(kernel, m, n, k)
        return made

    return ours_or_plain(kernel, device, ours, by_parts, f"a GEMM of {m} x {n} x {k}")


def scaled_bmm_cuda(a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`qtrain::scaled_bmm` of checked operands: one launch of the Triton kernel where it can run, else matrix by matrix."""
    device, (batch, m, k), n = a.codes.device, a.codes.shape, b.codes.shape[2]

    def name() -> str:
        return "none" if 0 in (m, n, k) else gemm_for(device, m, n, k)

    def one_by_one() -> Tensor:
        return batched.scaled_bmm(product, name, a, b, bias, out_dtype)

    if batch == 0 or not name().startswith("triton") or k > max_k(zero_point_count(a.zero, b.zero)):
        return one_by_one()
    from qcompile.kernels.triton import scaled_bmm

    def together() -> Tensor:
        left, b_t = _rows_contiguous_of_each(a.codes), _rows_contiguous_of_each(b.codes.transpose(1, 2))
        out = scaled_bmm.scaled_bmm(left, b_t, a.scale, b.scale, a.zero, b.zero, bias, out_dtype)
        note_launch("triton", m, n, k, "bmm", batch)
        return out

    return ours_or_plain("triton bmm", device, together, one_by_one, f"{batch} GEMMs of {m} x {n} x {k}")


def transpose_codes_cuda(codes: Tensor) -> Tensor:
    """`qtrain::transpose_codes` of an int8 matrix."""
    def plain() -> Tensor:
        from qcompile.ops.transpose import transpose_codes_reference

        return transpose_codes_reference(codes)

    if unavailable_reasons(codes.device, "transpose"):
        return plain()
    from qcompile.kernels.triton import transpose

    work = f"the transpose of {codes.shape[0]} x {codes.shape[1]} codes"
    return ours_or_plain(_TRANSPOSE, codes.device, lambda: transpose.transpose(codes), plain, work)


def _prepare_transpose(codes: Tensor) -> Callable[[Tensor], Tensor] | None:
    """For the operand of `qtrain::transpose_codes`."""
    if unavailable_reasons(codes.device, "transpose") or has_failed(_TRANSPOSE, codes.device):
        return None
    from qcompile.kernels.triton import transpose

    return transpose.prepare(codes)


def quantize_transposed_cuda(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    seed: Tensor | None,
    salt: int,
    codes: bool,
    amax: bool,
    bound: Tensor | None,
) -> list[Tensor]:
    """`qtrain::quantize_transposed` of checked operands; `qcompile.ops.quantize_transposed` has their shapes and dtypes."""
    def plain() -> list[Tensor]:
        from qcompile.ops.quantize_transposed import quantize_transposed_reference

        return quantize_transposed_reference(x, scale, zero_point, bits, seed, salt, codes, amax, bound)

    if x.dtype is torch.float64 or unavailable_reasons(x.device, "quantize"):
        return plain()
    from qcompile.kernels.triton import quantize

    def ours() -> list[Tensor]:
        made = quantize.quantize(
            x, scale, zero_point, bits=bits, seed=seed, salt=salt, codes=codes, codes_t=True, amax=amax, bound=bound
        )
        return [output for output in (made.codes, made.codes_t, made.amax, made.outside) if output is not None]

    return ours_or_plain(_QUANTIZE, x.device, ours, plain, f"quantizing {x.shape[0]} x {x.shape[1]} values")


def _prepare_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> Callable[..., list[Tensor]] | None:
    """For the operands of `qtrain::quantize_transposed`."""
    if x.dtype is torch.float64 or unavailable_reasons(x.device, "quantize") or has_failed(_QUANTIZE, x.device):
        return None
    from qcompile.kernels.triton import quantize

    bits, seed, salt, codes, amax, bound = rest
    run = quantize.prepare(x, scale, zero_point, bits, seed, salt, codes, True, amax, bound)

    def again(x: Tensor, scale: Tensor, zero_point: Tensor | None, *rest: Any) -> list[Tensor]:
        _, seed, _, _, _, bound = rest
        return [output for output in run(x, scale, zero_point, seed, bound) if output is not None]

    return again


_QUANTIZE, _TRANSPOSE = "triton quantize", "triton transpose"


def _rows_contiguous(codes: Tensor) -> Tensor:
    if codes.stride(1) == 1:
        return codes
    return transpose_codes_cuda(codes.t())


def _rows_contiguous_of_each(codes: Tensor) -> Tensor:
    """[B, R, C] with contiguous rows; if they are copied, by one transpose of all matrices, side by side."""
    if codes.stride(2) == 1:
        return codes
    batch, rows, columns = codes.shape
    return transpose_codes_cuda(codes.transpose(1, 2).reshape(batch * columns, rows)).view(rows, batch, columns).transpose(0, 1)


def _where(
    allowed: Callable[[torch.device], bool], prepare: Callable[..., Callable[..., Any] | None]
) -> Callable[..., Callable[..., Any] | None]:
    """`prepare`, or None, for operands on a device that is not allowed."""
    return lambda first, *rest: prepare(first, *rest) if allowed(first.device) else None


def register_cuda_kernels() -> None:
    """Make these the CUDA kernels of the integer GEMMs, of `qtrain::quantize_transposed` and of
    `qtrain::transpose_codes`, behind the operators' own checks.

    Called once the operators exist. Needs neither a GPU nor Triton: the choice is made when a kernel is
    called.
    """
    from qcompile.ops._checks import check_matrix
    from qcompile.ops._library import LIBRARY, checked
    from qcompile.ops.quantize_transposed import check_quantize_transposed
    from qcompile.ops.scaled_bmm import check_scaled_bmm
    from qcompile.ops.scaled_conv import CHECKS
    from qcompile.ops.scaled_mm import check_scaled_mm

    def transpose_codes(codes: Tensor) -> Tensor:
        check_matrix("transpose_codes", "codes", codes)
        return transpose_codes_cuda(codes)

    def name_of(device: torch.device, m: int, n: int, k: int, *, integer: bool = False) -> str:
        return "none" if 0 in (m, n, k) else gemm_for(device, m, n, k)

    if torch._C._dispatch_has_kernel_for_dispatch_key("qtrain::scaled_mm", "CUDA"):
        return  # the imports above may have called this function
    LIBRARY.impl("scaled_mm", prepared(checked(check_scaled_mm, as_operator(scaled_mm_cuda)), _prepare_mm), "CUDA")
    LIBRARY.impl("scaled_bmm", checked(check_scaled_bmm, as_operator(scaled_bmm_cuda)), "CUDA")

    def uses_triton(device: torch.device) -> bool:
        return _kernel_for(device, os.environ.get("QTRAIN_CUDA_GEMM")) != "int_mm"

    for name, implementation in cuda_conv.operators(operators(product, name_of), uses_triton).items():
        general = checked(CHECKS[name], as_operator(implementation))
        LIBRARY.impl(name, prepared(general, _where(uses_triton, cuda_conv.prepare(name))), "CUDA")
    quantize_transposed = checked(check_quantize_transposed, quantize_transposed_cuda)
    LIBRARY.impl("quantize_transposed", prepared(quantize_transposed, _prepare_quantize), "CUDA")
    LIBRARY.impl("transpose_codes", prepared(transpose_codes, _prepare_transpose), "CUDA")
