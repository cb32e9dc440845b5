"""INT8 convolution as an implicit matrix product: no column matrix in memory.

    gather     x[n, i] -> out[n, o]      i = o * stride - padding + k * dilation              (a convolution)
    scatter    the same sum seen from the other side:
               i = (o + padding - k * dilation) / stride, where that is a whole number        (a transposed convolution)

    acc[n, o, f] = sum_{k, c} (x[n, i(o, k), c] - x_zero) * w[f, k, c]                           exact, int32
    out          = cast(float32(acc) * (x_scale * w_scale[f]) + float32(bias[f]))

    weight       acc[f, k, c] = sum_{n, o} g[f, n, o] * (x[n, i(o, k), c] - x_zero)               exact, int32

`o`, `i`, `k` run over up to three axes of space; what lies outside x counts as `x_zero`, the code of zero. The gradients of a
convolution are these sums again: `grad_input` is a scatter of grad_output with the weight's two channel axes exchanged, and
`grad_weight` is `weight`. So are a transposed convolution and its gradients, the other way round.

Channels are the innermost axis everywhere (channels_last), so that the summed axis of both operands of gather and scatter is
contiguous, as int8 tensor cores want it, and a tap of the filter moves a row's start and nothing else. `weight` sums over
positions: grad_output comes transposed, and x is turned on its way into the tensor cores. Few output channels and many positions
make a small grid, so positions are split over programs, which add int32 atomically: exact in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.kernels.triton import tuning
from qcompile.kernels.triton.kernel_call import kernel_call
from qcompile.kernels.triton.launch import cdiv, family
from qcompile.kernels.triton.numerics import TENSOR, Layout

__all__ = [
    "Window",
    "conv_kernel",
    "conv_weight_kernel",
    "prepare_conv",
    "prepare_conv_weight",
]

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)


class Window(NamedTuple):
    """A convolution's arithmetic in space: three numbers each, for depth, height, width (1, 1, 1, and padding 0 where unused)."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]

    @staticmethod
    def of(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Window:
        """From one to three numbers each; axes are added in front."""

        def three(values: Sequence[int], default: int) -> tuple[int, int, int]:
            return (*[default] * (3 - len(values)), *values)  # type: ignore[return-value]

        return Window(three(kernel, 1), three(stride, 1), three(padding, 0), three(dilation, 1))

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)


# --- Kernels ------------------------------------------------------------------------------------------------


@triton.jit
def _along(out, tap, size, stride, padding, dilation, SCATTER: tl.constexpr):
    """Where along one axis of x the tap of each output position reads, and whether that is inside."""
    if SCATTER:
        scaled = out + padding - tap * dilation
        at = scaled // stride
        return at, (scaled >= 0) & (scaled % stride == 0) & (at < size)
    else:
        at = out * stride - padding + tap * dilation
        return at, (at >= 0) & (at < size)


@triton.jit
def _row_of(
    position, tap, D, H, W, OD, OH, OW, KH, KW,
    stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
    SCATTER: tl.constexpr,
):  # fmt: skip
    """The row of x, as a matrix [batch * D * H * W, channels], that output positions read at a tap; and whether it exists."""
    ow = position % OW
    rest = position // OW
    oh = rest % OH
    rest = rest // OH
    od = rest % OD
    batch = rest // OD
    iw, in_w = _along(ow, tap % KW, W, stride_w, pad_w, dil_w, SCATTER)
    ih, in_h = _along(oh, tap // KW % KH, H, stride_h, pad_h, dil_h, SCATTER)
    at, in_d = _along(od, tap // KW // KH, D, stride_d, pad_d, dil_d, SCATTER)
    return ((batch.to(tl.int64) * D + at) * H + ih) * W + iw, in_w & in_h & in_d


@triton.jit
def conv_kernel(
    x_ptr,  # int8 [batch, D, H, W, groups * C]
    w_ptr,  # int8 [groups * F, taps, C]
    out_ptr,  # [batch, OD, OH, OW, groups * F]: fp32, bf16, fp16
    x_scale_ptr,  # fp32: one, or one a sample
    w_scale_ptr,  # fp32: one, or one an output channel
    x_zero_ptr,  # int32, one; or None
    w_sum_ptr,  # int32 [groups * F], the sum of each filter's codes, with x_zero
    bias_ptr,  # any float [groups * F], or None
    positions,  # batch * OD * OH * OW
    C,
    F,
    D, H, W, OD, OH, OW, taps, KH, KW,
    stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
    stride_x,  # groups * C
    stride_o,  # groups * F
    X_SCALE: tl.constexpr,  # TENSOR or ROW
    W_SCALE: tl.constexpr,  # TENSOR or COLUMN
    SCATTER: tl.constexpr,
    EVEN_C: tl.constexpr,  # BLOCK_K divides C
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M positions x BLOCK_N output channels of a group."""
    pid = tl.program_id(0)
    group = tl.program_id(1)
    tiles_m = tl.cdiv(positions, BLOCK_M)
    tiles_n = tl.cdiv(F, BLOCK_N)
    in_band = GROUP_M * tiles_n
    first_m = (pid // in_band) * GROUP_M
    band_m = min(tiles_m - first_m, GROUP_M)
    rm = (first_m + (pid % in_band) % band_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = ((pid % in_band) // band_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    if x_zero_ptr is not None:
        x_zero = tl.load(x_zero_ptr)
        zero_code = x_zero.to(tl.int8)
    # Rows past the end wrap around: their sums are not stored.
    position = rm % positions
    w_rows = w_ptr + (group * F + rn % F).to(tl.int64)[:, None] * (taps * C) + rk[None, :]  # turned by `.T`, as in `sum_of_tile`

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    blocks = tl.cdiv(C, BLOCK_K)
    for step in range(0, taps * blocks):  # one loop, so that loads are pipelined across taps
        tap = step // blocks
        c = (step % blocks) * BLOCK_K
        row, inside = _row_of(
            position, tap, D, H, W, OD, OH, OW, KH, KW,
            stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w, SCATTER,
        )  # fmt: skip
        x_ptrs = x_ptr + row[:, None] * stride_x + (group * C + c + rk)[None, :]
        w_ptrs = w_rows + tap * C + c
        if EVEN_C:
            mask = inside[:, None]
            w = tl.load(w_ptrs)
        else:
            mask = inside[:, None] & (c + rk < C)[None, :]
            w = tl.load(w_ptrs, mask=(c + rk < C)[None, :], other=0)
        x = tl.load(x_ptrs, mask=mask, other=0)
        if x_zero_ptr is not None:
            x = tl.where(inside[:, None], x, zero_code)
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)

    column = group * F + rn
    in_f = rn < F
    if x_zero_ptr is not None:
        acc -= x_zero * tl.load(w_sum_ptr + column, mask=in_f, other=0)[None, :]
    if X_SCALE == TENSOR:
        scale = tl.load(x_scale_ptr)
    else:
        scale = tl.load(x_scale_ptr + position // (OD * OH * OW))[:, None]
    if W_SCALE == TENSOR:
        scale = scale * tl.load(w_scale_ptr)
    else:
        scale = scale * tl.load(w_scale_ptr + column, mask=in_f, other=0.0)[None, :]
    out = acc.to(tl.float32) * scale
    if bias_ptr is not None:
        out = out + tl.load(bias_ptr + column, mask=in_f, other=0.0).to(tl.float32)[None, :]
    offsets = rm.to(tl.int64)[:, None] * stride_o + column[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=(rm < positions)[:, None] & in_f[None, :])


@triton.jit
def conv_weight_kernel(
    g_ptr,  # int8 [groups * F, positions], rows stride_g apart
    x_ptr,  # int8 [batch, D, H, W, groups * C]
    out_ptr,  # int32 [groups * F, taps, C], zeros where SPLIT
    x_zero_ptr,  # int32, one; or None
    positions,
    length,  # positions of one program, a multiple of BLOCK_K
    C,
    F,
    D, H, W, OD, OH, OW, taps, KH, KW,
    stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
    stride_g,
    stride_x,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,  # output channels
    BLOCK_N: tl.constexpr,  # input channels of one tap
    BLOCK_K: tl.constexpr,  # positions
):  # fmt: skip
    """One program: BLOCK_M output channels x BLOCK_N input channels of a tap and group, over a range of positions."""
    pid = tl.program_id(0)
    group = tl.program_id(1)
    part = tl.program_id(2)
    tiles_m = tl.cdiv(F, BLOCK_M)
    tiles_c = tl.cdiv(C, BLOCK_N)
    tap = pid // tiles_m // tiles_c
    rf = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    rc = (pid // tiles_m % tiles_c) * BLOCK_N + tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    g_rows = g_ptr + (group * F + rf % F).to(tl.int64)[:, None] * stride_g
    x_columns = (group * C + rc)[None, :]
    if x_zero_ptr is not None:
        zero_code = tl.load(x_zero_ptr).to(tl.int8)
    begin = part * length
    end = min(positions, begin + length)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(begin, end, BLOCK_K):
        position = start + rk
        valid = position < end
        row, inside = _row_of(
            position, tap, D, H, W, OD, OH, OW, KH, KW,
            stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w, False,
        )  # fmt: skip
        g = tl.load(g_rows + position[None, :], mask=valid[None, :], other=0)
        x = tl.load(x_ptr + row[:, None] * stride_x + x_columns, mask=(valid & inside)[:, None] & (rc < C)[None, :], other=0)
        if x_zero_ptr is not None:
            x = tl.where(inside[:, None], x, zero_code)
        acc = tl.dot(g, x, acc, out_dtype=tl.int32)
    offsets = ((group * F + rf).to(tl.int64) * taps + tap)[:, None] * C + rc[None, :]
    mask = (rf < F)[:, None] & (rc < C)[None, :]
    if SPLIT:
        tl.atomic_add(out_ptr + offsets, acc, mask=mask, sem="relaxed")
    else:
        tl.store(out_ptr + offsets, acc, mask=mask)


# --- Launchers ----------------------------------------------------------------------------------------------


def prepare_conv(
    x: Tensor,
    w: Tensor,
    out_size: Sequence[int],
    window: Window,
    x_scale: Tensor,
    w_scale: Tensor,
    x_zero: Tensor | None,
    out_dtype: torch.dtype,
    *,
    scatter: bool = False,
    groups: int = 1,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """x int8 [batch, D, H, W, groups * C], w int8 [groups * F, KD, KH, KW, C], both contiguous -> [batch, *out_size, groups * F].

        out_size   three sizes of the output in space
        scatter    False: a convolution; True: a transposed one (the sum that is a convolution's gradient for its input)
        x_scale    fp32: 0-d or one a sample (batch values); w_scale: 0-d or one an output channel
        x_zero     int32 of one value, or None: the code of zero
        out_dtype  fp32, bf16, fp16

    Returned is a function of (x, w, x_scale, w_scale, x_zero, bias) for tensors that differ from these in their values alone; the
    bias is any float [groups * F], or None.
    Errors: `KernelError`, also where the sum could overflow int32.
    """
    batch, *size, channels = _check("conv", x, w, window, groups)
    features, c = w.shape[0], w.shape[-1]
    if out_dtype not in OUTPUTS:
        raise KernelError(f"conv: out_dtype is {out_dtype}; allowed: {', '.join(map(str, OUTPUTS))}.")
    summed = window.taps * c
    if summed > (longest := tuning.max_k(x_zero is not None)):
        raise KernelError(f"conv: {summed} products are summed; int32 holds {longest}. Use the matrix product of columns.")
    positions = batch * math.prod(out_size)
    x_layout = _shared("x_scale", x_scale, batch, Layout.ROW)
    w_layout = _shared("w_scale", w_scale, features, Layout.COLUMN)
    config = tuning.conv_config(family(x.device), positions, features // groups, c, zero_point=x_zero is not None)
    grid = (cdiv(positions, config.block_m) * cdiv(features // groups, config.block_n), groups)
    rest = {
        "positions": positions,
        "C": c,
        "F": features // groups,
        **_in_space(size, out_size, window),
        "stride_x": channels,
        "stride_o": features,
        "X_SCALE": int(x_layout),
        "W_SCALE": int(w_layout),
        "SCATTER": scatter,
        "EVEN_C": c % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
    }
    call = kernel_call(conv_kernel, grid, rest, num_warps=config.warps, num_stages=config.stages)
    shape = (batch, *out_size, features)

    def run(
        x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, x_zero: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        out = x.new_empty(shape, dtype=out_dtype)
        if positions and features:
            call(
                x,
                w,
                out,
                x_scale.contiguous(),
                w_scale.contiguous(),
                x_zero,
                None if x_zero is None else w.flatten(1).sum(1, dtype=torch.int32),
                None if bias is None else bias.contiguous(),
            )
        return out

    return run


def prepare_conv_weight(
    g_t: Tensor,
    x: Tensor,
    out_size: Sequence[int],
    window: Window,
    x_zero: Tensor | None,
    *,
    groups: int = 1,
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The exact sums behind a filter's gradient: int32 [groups * F, KD, KH, KW, C].

        g_t       int8 [groups * F, batch * OD * OH * OW], rows contiguous: codes of grad_output, channels first
        x         int8 [batch, D, H, W, groups * C], contiguous
        out_size  OD, OH, OW
        x_zero    int32 of one value, or None

    Returned is a function of (g_t, x, x_zero) for tensors that differ from these in their values alone.
    Errors: `KernelError`, also where the sum could overflow int32 (more positions than `tuning.max_k`).
    """
    features = g_t.shape[0]
    c = x.shape[-1] // groups
    batch, *size, channels = _check("conv_weight", x, x.new_empty((features, *window.kernel, c)), window, groups)
    positions = batch * math.prod(out_size)
    if g_t.dtype is not torch.int8 or g_t.shape != (features, positions) or (g_t.stride(1) != 1 and positions > 1):
        raise KernelError(
            f"conv_weight: g_t is {g_t.dtype} {list(g_t.shape)}; allowed: int8 [{features}, {positions}], rows contiguous."
        )
    if positions > (longest := tuning.max_k(x_zero is not None)):
        raise KernelError(f"conv_weight: {positions} positions are summed; int32 holds {longest}. Sum batches apart.")
    shape = (features, *window.kernel, c)
    if 0 in shape or positions == 0:
        return lambda g_t, x, x_zero: x.new_zeros(shape, dtype=torch.int32)
    config = tuning.spare_registers(tuning.conv_config(family(x.device), features // groups, c, positions))
    tiles = cdiv(features // groups, config.block_m) * cdiv(c, config.block_n) * window.taps
    parts = tuning.split_k(x.device, tiles * groups, positions, config.block_k)
    length = cdiv(cdiv(positions, parts), config.block_k) * config.block_k
    parts = cdiv(positions, length)
    rest = {
        "positions": positions,
        "length": length,
        "C": c,
        "F": features // groups,
        **_in_space(size, out_size, window),
        "stride_g": g_t.stride(0),
        "stride_x": channels,
        "SPLIT": parts > 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }
    grid = (tiles, groups, parts)
    call = kernel_call(conv_weight_kernel, grid, rest, num_warps=config.warps, num_stages=config.stages)

    def run(g_t: Tensor, x: Tensor, x_zero: Tensor | None) -> Tensor:
        out = (x.new_zeros if parts > 1 else x.new_empty)(shape, dtype=torch.int32)
        call(g_t, x, out, x_zero)
        if x_zero is not None:
            out -= (x_zero * g_t.sum(1, dtype=torch.int32)).view(-1, 1, 1, 1, 1)
        return out

    return run


def _in_space(size: Sequence[int], out_size: Sequence[int], window: Window) -> dict[str, int]:
    """The kernels' arguments for sizes and a window."""
    numbers = (*size, *out_size, window.taps, *window.kernel[1:], *window.stride, *window.padding, *window.dilation)
    return dict(zip(_IN_SPACE, numbers, strict=True))


_IN_SPACE = (
    "D", "H", "W", "OD", "OH", "OW", "taps", "KH", "KW",
    "stride_d", "stride_h", "stride_w", "pad_d", "pad_h", "pad_w", "dil_d", "dil_h", "dil_w",
)  # fmt: skip


def _check(op: str, x: Tensor, w: Tensor, window: Window, groups: int) -> list[int]:
    for name, codes in (("x", x), ("w", w)):
        if codes.dtype is not torch.int8 or codes.ndim != 5 or not codes.is_contiguous():
            raise KernelError(
                f"{op}: {name} is {codes.dtype} {list(codes.shape)}; allowed: int8, 5 axes, channels last, contiguous."
            )
    if tuple(w.shape[1:4]) != window.kernel or x.shape[4] != groups * w.shape[4] or w.shape[0] % groups:
        raise KernelError(
            f"{op}: x {list(x.shape)} and w {list(w.shape)} do not fit a kernel {window.kernel} in {groups} group(s)."
        )
    return list(x.shape)


def _shared(name: str, values: Tensor, count: int, layout: Layout) -> Layout:
    if values.numel() == 1:
        return Layout.TENSOR
    if values.numel() != count:
        raise KernelError(f"conv: {name} has {values.numel()} values; allowed: 1 or {count}.")
    return layout
