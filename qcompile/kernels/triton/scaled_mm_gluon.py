"""INT8 matrix product for compute capability 9.0 in Gluon: a tensor-core instruction stays in flight. M rows, N columns, K summed.

The meaning and the operands are those of `scaled_mm_tma`. Triton waits for the tensor cores after every int8 step; Gluon, its
lower-level sibling, leaves that to the author. Step k is issued here while step k - 1 still computes, and only then is k - 1 waited
for and its operands' place filled with those of step k + STAGES - 1:

    place       0        1        2        0        1      ...      (STAGES = 3)
    copied     k=0      k=1      k=2      k=3      k=4
    multiplied          k=0      k=1      k=2      k=3
    waited for                   k=0      k=1      k=2              then its place is free

A place has a barrier that counts the bytes which have arrived; it has been through n turns when place + n * STAGES steps are done,
and the lowest bit of n is the phase to wait for. Copies of the next tile could begin before this tile is written; they do not yet.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from qcompile.kernels.triton.numerics import Layout

ROW, COLUMN, FULL = (gl.constexpr(int(layout)) for layout in (Layout.ROW, Layout.COLUMN, Layout.FULL))

__all__ = ["scaled_mm_gluon_kernel"]

async_load = tma.async_copy_global_to_shared if not hasattr(tma, "async_load") else tma.async_load  # Triton before 3.8


@gluon.jit
def tile_of(number, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """`epilogue.tile_of`."""
    in_group = GROUP_M * tiles_n
    first_m = (number // in_group) * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    return first_m + (number % in_group) % group_m, (number % in_group) // group_m


@gluon.jit
def fetch(a_desc, b_desc, a_places, b_places, arrived, count, m, n, step, steps, STAGES: gl.constexpr):
    """Begin to copy the operands of a step, unless it is past the last; `count` steps were copied before. Returns the new count."""
    BLOCK_M: gl.constexpr = a_places.shape[1]
    BLOCK_N: gl.constexpr = b_places.shape[1]
    BLOCK_K: gl.constexpr = a_places.shape[2]
    wanted = step < steps
    place = count % STAGES
    mbarrier.expect(arrived.index(place), (BLOCK_M + BLOCK_N) * BLOCK_K, pred=wanted)
    async_load(a_desc, [m * BLOCK_M, step * BLOCK_K], arrived.index(place), a_places.index(place), pred=wanted)
    async_load(b_desc, [n * BLOCK_N, step * BLOCK_K], arrived.index(place), b_places.index(place), pred=wanted)
    return count + wanted.to(gl.int32)


@gluon.jit
def of_rows(ptr, LAYOUT: gl.constexpr, rm, M):
    """Values of layout TENSOR or ROW for rows rm, as a column of the tile; 0 outside."""
    return gl.expand_dims(gl.load(ptr + rm * (1 if LAYOUT == ROW else 0), mask=rm < M, other=0), 1)


@gluon.jit
def of_columns(ptr, LAYOUT: gl.constexpr, rn, N):
    """Values of layout TENSOR or COLUMN for columns rn, as a row of the tile; 0 outside."""
    return gl.expand_dims(gl.load(ptr + rn * (1 if LAYOUT == COLUMN else 0), mask=rn < N, other=0), 0)


@gluon.jit
def scaled_mm_gluon_kernel(
    a_desc,  # int8 [M, K] in blocks of BLOCK_M x BLOCK_K
    b_desc,  # int8 [N, K] in blocks of BLOCK_N x BLOCK_K
    out_ptr,  # from here on as in `scaled_mm_kernel`
    partial_ptr,
    a_scale_ptr,
    b_scale_ptr,
    a_zero_ptr,
    b_zero_ptr,
    a_sum_ptr,
    b_sum_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_o,
    stride_bias_m,
    stride_bias_n,
    A_SCALE: gl.constexpr,
    B_SCALE: gl.constexpr,
    A_ZERO: gl.constexpr,
    B_ZERO: gl.constexpr,
    BIAS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """One program takes every P-th tile of the output."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, 128 if BLOCK_N > 128 else BLOCK_N, 32]
    )
    a_places = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    b_places = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for barrier in gl.static_range(STAGES):
        mbarrier.init(arrived.index(barrier), count=1)
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    copied, taken = 0, 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        for early in gl.static_range(STAGES - 1):
            copied = fetch(a_desc, b_desc, a_places, b_places, arrived, copied, m, n, early, steps, STAGES)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.int32, SUM)
        for step in range(steps):
            place = taken % STAGES
            mbarrier.wait(arrived.index(place), (taken // STAGES) & 1)
            acc = warpgroup_mma(a_places.index(place), b_places.index(place).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            copied = fetch(a_desc, b_desc, a_places, b_places, arrived, copied, m, n, step + STAGES - 1, steps, STAGES)
            taken += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))

        rm = m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, SUM))
        rn = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUM))
        if b_zero_ptr is not None:
            acc -= of_columns(b_zero_ptr, B_ZERO, rn, N) * of_rows(a_sum_ptr, ROW, rm, M)
        if a_zero_ptr is not None:
            b_sum = of_columns(b_sum_ptr, COLUMN, rn, N)
            if b_zero_ptr is not None:
                b_sum -= K * of_columns(b_zero_ptr, B_ZERO, rn, N)
            acc -= of_rows(a_zero_ptr, A_ZERO, rm, M) * b_sum
        inside = gl.expand_dims(rm < M, 1) & gl.expand_dims(rn < N, 0)
        row, column = gl.expand_dims(rm, 1).to(gl.int64), gl.expand_dims(rn, 0).to(gl.int64)
        if out_ptr.dtype.element_ty == gl.int32:
            gl.store(out_ptr + row * stride_o + column, acc, mask=inside)
        else:
            out = acc.to(gl.float32)
            if partial_ptr is not None:
                out = gl.load(partial_ptr + row * stride_o + column, mask=inside, other=0.0) + out
            if a_scale_ptr is not None:
                out = out * (of_rows(a_scale_ptr, A_SCALE, rm, M) * of_columns(b_scale_ptr, B_SCALE, rn, N))
            if bias_ptr is not None:
                if BIAS == FULL:
                    bias = gl.load(bias_ptr + row * stride_bias_m + column * stride_bias_n, mask=inside, other=0.0)
                elif BIAS == ROW:
                    bias = of_rows(bias_ptr, BIAS, rm, M)
                else:
                    bias = of_columns(bias_ptr, BIAS, rn, N)
                out = out + bias.to(gl.float32)
            if out_ptr.dtype.element_ty == gl.float32:
                gl.store(out_ptr + row * stride_o + column, out, mask=inside)
            else:  # four threads hold 16 bytes of a row side by side: through shared memory, so that one thread does
                WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
                narrow = gl.convert_layout(out.to(out_ptr.dtype.element_ty), WIDE)
                row = m * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, WIDE))
                column = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, WIDE))
                inside = gl.expand_dims(row < M, 1) & gl.expand_dims(column < N, 0)
                offsets = gl.expand_dims(row, 1).to(gl.int64) * stride_o + gl.expand_dims(column, 0).to(gl.int64)
                gl.store(out_ptr + offsets, narrow, mask=inside)
