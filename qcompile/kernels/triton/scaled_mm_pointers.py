"""The INT8 GEMM of `scaled_mm` with addresses for its loads: every operand and every GPU, packed codes too.

Both operands are K-major: a [M, K] and b_t [N, K], rows contiguous. That is the only layout an int8 tensor core reads without
shuffling bytes: on compute capability 9.0 the other one goes through registers and byte stores, below it through byte loads.
Product, scale and cast in one kernel spare the int32 product a trip through memory (4 bytes written, 4 read, 2 written; against 2).

Operands of few bits may be packed along K (`qcompile.ops.pack_codes`): field j of a byte is a code of the j-th part of K. The
kernel takes bytes once and multiplies field by field, each field moved to the upper bits of its byte and the others masked away:
a shift and a mask, no sign to restore. The sum is then 2**(8 - width) times too large for each packed operand, exactly, and is
shifted back; its terms are products of bytes as before, so the longest K is the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompile.kernels.triton.epilogue import finish_tile, tile_of

__all__ = ["scaled_mm_kernel", "sum_of_tile"]


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
