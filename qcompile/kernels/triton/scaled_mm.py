"""INT8 matrix product with zero points, scales, bias and one rounding. M rows, N columns, K summed.

    acc[m, n] = sum_k (a[m, k] - a_zero[m]) * (b[k, n] - b_zero[n])                          exact, int32
              = sum_k a b - b_zero[n] * a_sum[m] - a_zero[m] * (b_sum[n] - K * b_zero[n])
    a_sum[m]  = sum_k a[m, k],    b_sum[n] = sum_k b[k, n]
    out[m, n] = cast(float32(acc[m, n]) * (a_scale[m] * b_scale[n]) + float32(bias[m, n]))

Both operands are K-major: a [M, K] and b_t [N, K], rows contiguous. That is the only layout an int8 tensor
core reads without shuffling bytes: on compute capability 9.0 the other one goes through registers and byte
stores, below it through byte loads. int8, scale and cast in one kernel spare the int32 product a trip through
memory (4 bytes written, 4 read, 2 written; against 2).

Operands of few bits may be packed along K (`qcompile.ops.pack_codes`): field j of a byte is a code of the j-th part of
K. The kernel takes bytes once and multiplies field by field, each field moved to the upper bits of its byte and the
others masked away: a shift and a mask, no sign to restore. The sum is then 2**(8 - width) times too large for each packed
operand, exactly, and is shifted back; its terms are products of bytes as before, so the longest K is the same.

An int32 holds a sum of `tuning.max_k` products. A longer K is split: every part is exact, and the parts are
added in fp32, in order. Within a part single terms of the corrected sum may wrap, their total modulo 2**32
does not care.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qcompile.errors import KernelError
from qcompile.kernels.quantized_tensor import zero_point_count
from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.epilogue import finish_tile, tile_of
from qcompile.kernels.triton.kernel_call import kernel_call
from qcompile.kernels.triton.launch import EXACT, cdiv, device_guard, family, multiprocessors, takes_ptx
from qcompile.kernels.triton.numerics import Layout, layout_of
from qcompile.kernels.triton.scaled_mm_tma import ALIGNMENT, scaled_mm_tma_kernel, takes
from qcompile.ops.pack_codes import codes_per_byte, unpack_codes_reference

__all__ = ["Epilogue", "Packing", "prepare", "scaled_mm", "scaled_mm_kernel", "sum_of_tile", "tiles_of"]

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.int32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

CHUNK = 128
"""K is split at multiples of this, so that only the last part has a tail."""


# --- Kernel -------------------------------------------------------------------------------------------------


@triton.jit
def field_of(packed, FIELD: tl.constexpr, FIELDS: tl.constexpr, ASM: tl.constexpr):
    """Field of int8 bytes, as the upper bits of a byte: code * 2**(8 - 8 / FIELDS).

    ASM: by NVIDIA instructions for four bytes at once, where Triton's own code takes the bytes apart. What the shift moves into the
    next byte, the mask removes.
    """
    WIDTH: tl.constexpr = 8 // FIELDS
    SHIFT: tl.constexpr = 8 - (FIELD + 1) * WIDTH
    if ASM:
        MASK: tl.constexpr = (256 - (1 << (8 - WIDTH))) * 0x01010101
        asm: tl.constexpr = f"{{ .reg .b32 moved; shl.b32 moved, $1, {SHIFT}; and.b32 $0, moved, {MASK}; }}"
        return tl.inline_asm_elementwise(asm, "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    else:
        upper: tl.constexpr = -(1 << (8 - WIDTH))
        return ((packed << SHIFT) & upper).to(tl.int8)


@triton.jit
def sum_of_tile(
    a_ptr,  # int8 [M, K], rows stride_a apart
    b_ptr,  # int8 [N, K], rows stride_b apart
    rm,
    rn,
    M,
    N,
    K,
    PART,
    stride_a,
    stride_b,
    A_PACKED: tl.constexpr,
    B_PACKED: tl.constexpr,
    FIELDS: tl.constexpr,
    ASM: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sum_k a[m, k] b[k, n] for the tile of rows rm and columns rn, int32."""
    rk = tl.arange(0, BLOCK_K)
    # Rows past the end wrap around: their products are not stored, and the loads need no mask.
    a_ptrs = a_ptr + (rm % M).to(tl.int64)[:, None] * stride_a + rk[None, :]
    # b as its rows lie, turned by `.T`: as a tile [K, N] Triton 3.8 and 3.9 read it by hundreds of byte permutations below 9.0.
    b_ptrs = b_ptr + (rn % N).to(tl.int64)[:, None] * stride_b + rk[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, tl.cdiv(PART, BLOCK_K)):
        for field in tl.static_range(FIELDS):
            if EVEN_K:
                if field == 0 or not A_PACKED:
                    a = tl.load(a_ptrs + field * PART)
                if field == 0 or not B_PACKED:
                    b = tl.load(b_ptrs + field * PART)
            else:
                inside = (rk < PART - k * BLOCK_K) & (rk < K - field * PART - k * BLOCK_K)
                if not A_PACKED:
                    a = tl.load(a_ptrs + field * PART, mask=inside[None, :], other=0)
                elif field == 0:
                    a = tl.load(a_ptrs, mask=inside[None, :], other=0)
                if not B_PACKED:
                    b = tl.load(b_ptrs + field * PART, mask=inside[None, :], other=0)
                elif field == 0:
                    b = tl.load(b_ptrs, mask=inside[None, :], other=0)
            a_codes = field_of(a, field, FIELDS, ASM) if A_PACKED else a
            b_codes = field_of(b, field, FIELDS, ASM) if B_PACKED else b
            acc = tl.dot(a_codes, b_codes.T, acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
    return acc >> ((8 - 8 // FIELDS) * (A_PACKED + B_PACKED))


@triton.jit
def scaled_mm_kernel(
    a_ptr,  # int8 [M, K], rows stride_a apart
    b_ptr,  # int8 [N, K], rows stride_b apart
    out_ptr,  # [M, N], rows stride_o apart: fp32, bf16, fp16; int32 for the bare sum
    partial_ptr,  # fp32 [M, N] like out: the sum of earlier parts of K, or None
    a_scale_ptr,  # fp32, or None: no scales and no bias
    b_scale_ptr,
    a_zero_ptr,  # int32, or None
    b_zero_ptr,
    a_sum_ptr,  # int32 [M], with b_zero
    b_sum_ptr,  # int32 [N], with a_zero
    bias_ptr,  # any float, or None
    M,
    N,
    K,
    PART,  # bytes of a packed operand along K; K itself if none is
    stride_a,
    stride_b,
    stride_o,
    stride_bias_m,
    stride_bias_n,
    A_SCALE: tl.constexpr,  # Layout
    B_SCALE: tl.constexpr,
    A_ZERO: tl.constexpr,
    B_ZERO: tl.constexpr,
    BIAS: tl.constexpr,
    A_PACKED: tl.constexpr,
    B_PACKED: tl.constexpr,
    FIELDS: tl.constexpr,  # codes a byte of packed operands: 2 or 4; 1 if none is
    ASM: tl.constexpr,  # the target takes NVIDIA instructions
    EVEN_K: tl.constexpr,  # BLOCK_K divides PART, and PART * FIELDS is K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One program a tile of the output; GROUP_M rows of tiles run together, so that they find each other's
    columns in the L2 cache."""
    m, n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rm = m * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = sum_of_tile(
        a_ptr, b_ptr, rm, rn, M, N, K, PART, stride_a, stride_b, A_PACKED, B_PACKED, FIELDS, ASM, EVEN_K, BLOCK_M, BLOCK_N,
        BLOCK_K,
    )  # fmt: skip
    finish_tile(
        acc, rm, rn, M, N, K, out_ptr, stride_o, partial_ptr, a_scale_ptr, b_scale_ptr, a_zero_ptr, b_zero_ptr, a_sum_ptr,
        b_sum_ptr, bias_ptr, stride_bias_m, stride_bias_n, A_SCALE, B_SCALE, A_ZERO, B_ZERO, BIAS,
    )  # fmt: skip


# --- Launcher -----------------------------------------------------------------------------------------------


def scaled_mm(
    a: Tensor,
    b_t: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    k: int | None = None,
    a_bits: int = 8,
    b_bits: int = 8,
    kernel: str = "triton",
    config: tuning.MatmulConfig | None = None,
) -> Tensor:
    """a int8 [M, K] and b_t int8 [N, K], both with contiguous rows -> out_dtype [M, N], contiguous.

        a_scale, a_zero  fp32, int32 or None: 0-d, [1, 1] or [M, 1]; a zero point is a code, -128 to 127
        b_scale, b_zero  likewise, or [1, N]
        bias             any float dtype, broadcastable to [M, N], or None
        out_dtype        fp32, bf16 or fp16; int32: the bare sum, no scales, no bias, K up to `tuning.max_k`
        k, a_bits,       packed operands: the number of codes along K, and 4, 3 or 2 bits for one that is packed; both packed:
        b_bits           with equally many codes a byte; K up to `tuning.max_k`
        kernel           "triton" takes every operand; "triton_tma" and "triton_gluon" (compute capability 9.0) no packed ones, and
                         others where `scaled_mm_tma.takes` them
        config           launch configuration; `tuning.choose` picks one if not given

    Errors: `KernelError`.
    """
    _check(a, b_t, a_scale, b_scale, a_zero, b_zero, bias, out_dtype)
    m, n = a.shape[0], b_t.shape[0]
    k, fields = _fields(a, b_t, k, a_bits, b_bits)
    out = a.new_empty((m, n), dtype=out_dtype)
    if m == 0 or n == 0:
        return out
    if config is None:
        config = tuning.choose(family(a.device), m, n, k, kernel)
        if fields > 1:
            config = tuning.for_packed(config, fields)

    last = Epilogue(out, None, a_scale, b_scale, a_zero, b_zero, bias=bias)
    longest = tuning.max_k(zero_point_count(a_zero, b_zero))
    if k <= longest:
        _launch(kernel, a, b_t, last, config, Packing(a_bits < 5, b_bits < 5, fields, k))
        return out
    if fields > 1:
        raise KernelError(f"scaled_mm: K is {k}; packed operands go up to {longest}. Unpack them first.")
    if out_dtype is torch.int32:
        raise KernelError(f"scaled_mm: K is {k}; an int32 sum holds at most {longest} products. Ask for a float out_dtype.")
    length = longest // CHUNK * CHUNK
    partial = None
    for start in range(0, k, length):
        parts = a[:, start : start + length], b_t[:, start : start + length]
        if start + length < k:
            sums = a.new_empty((m, n), dtype=torch.float32) if partial is None else partial  # each tile reads and writes its own
            epilogue = Epilogue(sums, partial, a_zero=a_zero, b_zero=b_zero)
            partial = sums
        else:
            epilogue = last._replace(partial=partial)
        _launch(kernel, *parts, epilogue, config, Packing(False, False, 1, parts[0].shape[1]))
    return out


Run = Callable[[Tensor, Tensor, "Epilogue"], None]
"""A launch for a and b_t of known shapes and strides; what it computes is in the epilogue."""


def prepare(
    a: Tensor,
    b_t: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    kernel: str,
) -> Callable[..., Tensor] | None:
    """`scaled_mm` of checked operands, as a function of others, up to the bias, that differ from these in their values alone.

    None where that is more than one launch: nothing to sum, a K that is split, values to be copied first.
    """
    (m, k), n = a.shape, b_t.shape[0]
    if 0 in (m, n, k) or k > tuning.max_k(zero_point_count(a_zero, b_zero)) or a.stride(1) != 1 or b_t.stride(1) != 1:
        return None
    if kernel != "triton" and not (takes(a) and takes(b_t)):
        return None
    packing = Packing(False, False, 1, k)
    given = Epilogue(a.new_empty((m, n), dtype=out_dtype), None, a_scale, b_scale, a_zero, b_zero, bias=bias)
    tensors, constants = given.complete(a, b_t, packing)
    if any(getattr(tensors, name) is not getattr(given, name) for name in _LAYOUTS):
        return None
    run = _RUNS[kernel](a, b_t, tensors, constants, tuning.choose(family(a.device), m, n, k, kernel), packing)

    def again(a: Tensor, b_t: Tensor, *applied: Tensor | None) -> Tensor:
        a_scale, b_scale, a_zero, b_zero, bias = applied
        out = a.new_empty((m, n), dtype=out_dtype)
        epilogue = Epilogue(out, None, a_scale, b_scale, a_zero, b_zero, bias=bias)
        run(a, b_t, epilogue if a_zero is b_zero is None else epilogue.with_sums(a, b_t, packing))
        return out

    return again


def _fields(a: Tensor, b_t: Tensor, k: int | None, a_bits: int, b_bits: int) -> tuple[int, int]:
    """K, and how many codes a byte of a packed operand holds (1: none is packed). Errors: `KernelError`."""
    counts = {"a": codes_per_byte(a_bits), "b_t": codes_per_byte(b_bits)}
    packed = {count for count in counts.values() if count > 1}
    if len(packed) > 1:
        raise KernelError(f"scaled_mm: a has {counts['a']} codes a byte and b_t {counts['b_t']}; unpack one of them.")
    if k is None:
        k = a.shape[1]
    for name, codes in (("a", a), ("b_t", b_t)):
        if codes.shape[1] != -(-k // counts[name]):
            what = "both must have K columns" if not packed else f"{k} codes, {counts[name]} a byte, must lie along K of {name}"
            raise KernelError(f"scaled_mm: a is {list(a.shape)} and b_t {list(b_t.shape)}; {what}.")
    return k, max(packed, default=1)


def _check(
    a: Tensor,
    b_t: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    a_zero: Tensor | None,
    b_zero: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    for name, codes in (("a", a), ("b_t", b_t)):
        if codes.dtype is not torch.int8 or codes.ndim != 2:
            raise KernelError(f"scaled_mm: {name} is {codes.dtype} of shape {list(codes.shape)}; allowed: an int8 matrix.")
        if codes.stride(1) != 1 and codes.shape[1] > 1:
            raise KernelError(
                f"scaled_mm: {name} has strides {codes.stride()}; its rows (the summed axis) must be "
                f"contiguous. Pass a transposed copy (`transpose`)."
            )
    if out_dtype not in OUTPUTS:
        raise KernelError(f"scaled_mm: out_dtype is {out_dtype}; allowed: {', '.join(map(str, OUTPUTS))}.")
    if out_dtype is torch.int32:
        if a_scale is not None or b_scale is not None or bias is not None:
            raise KernelError("scaled_mm: out_dtype is int32, the bare sum; scales and bias must be None.")
    elif a_scale is None or b_scale is None:
        raise KernelError(f"scaled_mm: out_dtype is {out_dtype} and a scale is None; only int32 has no scales.")
    for name, values, dtypes in (
        ("a_scale", a_scale, (torch.float32,)),
        ("b_scale", b_scale, (torch.float32,)),
        ("a_zero", a_zero, (torch.int32,)),
        ("b_zero", b_zero, (torch.int32,)),
        ("bias", bias, FLOATS),
        ("b_t", b_t, (torch.int8,)),
    ):
        if values is not None and (values.dtype not in dtypes or values.device != a.device):
            raise KernelError(
                f"scaled_mm: {name} is {values.dtype} on {values.device}; allowed: {', '.join(map(str, dtypes))} on {a.device}."
            )


class Packing(NamedTuple):
    """Which operands are packed, how many codes a byte of them holds, and how many there are along K."""

    a: bool
    b: bool
    fields: int
    k: int


class Epilogue(NamedTuple):
    """The tensors that `epilogue.finish_tile` reads and writes, in the kernels' order."""

    out: Tensor
    partial: Tensor | None = None
    a_scale: Tensor | None = None
    b_scale: Tensor | None = None
    a_zero: Tensor | None = None
    b_zero: Tensor | None = None
    a_sum: Tensor | None = None
    b_sum: Tensor | None = None
    bias: Tensor | None = None

    def complete(self, a: Tensor, b_t: Tensor, packing: Packing) -> tuple[Epilogue, dict[str, int]]:
        """With the sums over K that zero points ask for and shared values side by side, and the arguments that say how they lie."""
        m, n = self.out.shape
        shared: dict[str, Tensor] = {}
        constants = {"stride_o": n, "stride_bias_m": 0, "stride_bias_n": 0}
        for name, allowed in _LAYOUTS.items():
            values, layout = getattr(self, name), Layout.TENSOR
            if values is not None:
                layout = layout_of("scaled_mm", name, values, m, n, *allowed)
                if layout is Layout.FULL:
                    constants["stride_bias_m"], constants["stride_bias_n"] = values.stride()
                else:
                    shared[name] = values.contiguous()
            constants[name.upper()] = int(layout)
        return self._replace(**shared).with_sums(a, b_t, packing), constants

    def with_sums(self, a: Tensor, b_t: Tensor, packing: Packing) -> Epilogue:
        """With the sums over K that zero points ask for."""
        a_sum = None if self.b_zero is None else _row_sums(a, packing.fields if packing.a else 1)
        b_sum = None if self.a_zero is None else _row_sums(b_t, packing.fields if packing.b else 1)
        return self._replace(a_sum=a_sum, b_sum=b_sum)


_LAYOUTS = {
    "a_scale": (Layout.TENSOR, Layout.ROW),
    "b_scale": (Layout.TENSOR, Layout.COLUMN),
    "a_zero": (Layout.TENSOR, Layout.ROW),
    "b_zero": (Layout.TENSOR, Layout.COLUMN),
    "bias": tuple(Layout),
}
"""Fields of an `Epilogue` that may be shared, and how."""


def _launch(
    kernel: str, a: Tensor, b_t: Tensor, epilogue: Epilogue, config: tuning.MatmulConfig, packing: Packing
) -> None:
    tensors, constants = epilogue.complete(a, b_t, packing)
    _RUNS[kernel](a, b_t, tensors, constants, config, packing)(a, b_t, tensors)


def _by_pointers(
    a: Tensor, b_t: Tensor, epilogue: Epilogue, constants: dict[str, int], config: tuning.MatmulConfig, packing: Packing
) -> Run:
    m, n = epilogue.out.shape
    part = -(-packing.k // packing.fields)
    rest = {
        "M": m,
        "N": n,
        "K": packing.k,
        "PART": part,
        "stride_a": a.stride(0),
        "stride_b": b_t.stride(0),
        "A_PACKED": packing.a,
        "B_PACKED": packing.b,
        "FIELDS": packing.fields,
        "ASM": takes_ptx(a.device),
        "EVEN_K": part % config.block_k == 0 and part * packing.fields == packing.k,
        **tiles_of(config),
        **constants,
    }
    grid = (cdiv(m, config.block_m) * cdiv(n, config.block_n),)
    call = kernel_call(scaled_mm_kernel, grid, rest, num_warps=config.warps, num_stages=config.stages)
    return lambda a, b_t, epilogue: call(a, b_t, *epilogue)


def _by_descriptors(
    a: Tensor, b_t: Tensor, epilogue: Epilogue, constants: dict[str, int], config: tuning.MatmulConfig, packing: Packing
) -> Run:
    _check_described(a, b_t, packing)
    m, n = epilogue.out.shape
    symmetric = epilogue.a_zero is None and epilogue.b_zero is None
    per_sm = config.per_sm if symmetric else 1  # zero points take more registers
    registers = {"maxnreg": tuning.REGISTERS // (32 * config.warps * per_sm)} if per_sm > 1 else {}
    rest = {"M": m, "N": n, "K": packing.k, "FLATTEN": config.flatten, **tiles_of(config), **constants}
    grid = (min(cdiv(m, config.block_m) * cdiv(n, config.block_n), per_sm * multiprocessors(a.device)),)
    call = kernel_call(scaled_mm_tma_kernel, grid, rest, num_warps=config.warps, num_stages=config.stages, **registers)

    def run(a: Tensor, b_t: Tensor, epilogue: Epilogue) -> None:
        a_desc = TensorDescriptor.from_tensor(a, [config.block_m, config.block_k])
        call(a_desc, TensorDescriptor.from_tensor(b_t, [config.block_n, config.block_k]), *epilogue)

    return run


def _by_gluon(
    a: Tensor, b_t: Tensor, epilogue: Epilogue, constants: dict[str, int], config: tuning.MatmulConfig, packing: Packing
) -> Run:
    from triton.experimental.gluon.language import NVMMASharedLayout  # a part of Triton that changes more than the rest
    from triton.experimental.gluon.nvidia import hopper

    from qcompile.kernels.triton.scaled_mm_gluon import scaled_mm_gluon_kernel

    _check_described(a, b_t, packing)
    m, n = epilogue.out.shape
    grid = (min(cdiv(m, config.block_m) * cdiv(n, config.block_n), multiprocessors(a.device)),)
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)

    def run(a: Tensor, b_t: Tensor, epilogue: Epilogue) -> None:
        with device_guard(a):
            scaled_mm_gluon_kernel[grid](
                hopper.TensorDescriptor.from_tensor(a, [config.block_m, config.block_k], layout),
                hopper.TensorDescriptor.from_tensor(b_t, [config.block_n, config.block_k], layout),
                *epilogue,
                M=m,
                N=n,
                K=packing.k,
                STAGES=config.stages,
                **tiles_of(config),
                **constants,
                num_warps=config.warps,
                **EXACT,
            )

    return run


_RUNS: dict[str, Callable[..., Run]] = {
    "triton": _by_pointers,
    "triton_tma": _by_descriptors,
    "triton_gluon": _by_gluon,
}
"""Kernel -> what prepares its launch."""


def _check_described(a: Tensor, b_t: Tensor, packing: Packing) -> None:
    if packing.fields > 1 or not (takes(a) and takes(b_t)):
        raise KernelError(
            f"scaled_mm: a descriptor is for codes that are not packed, K above 0, on a boundary of {ALIGNMENT} bytes, with rows a "
            f"multiple of {ALIGNMENT} bytes apart; a has strides {a.stride()}, b_t {b_t.stride()}. Use kernel 'triton'."
        )


def tiles_of(config: tuning.MatmulConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }


def _row_sums(codes: Tensor, fields: int) -> Tensor:
    if fields > 1:  # what pads the last byte is 0
        codes = unpack_codes_reference(codes, 8 // fields, 1, codes.shape[1] * fields)
    return codes.sum(1, dtype=torch.int32)
