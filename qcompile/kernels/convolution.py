"""Convolutions as products of matrices of codes, on any device that has a `scaled_mm`: `operators(product)` makes the three.

Three shapes of work, each a product with one gathered matrix ("columns": for every place, the codes that a kernel sees from there):

    correlate    the output of a convolution; the input's gradient of a transposed one
    spread       the input's gradient of a convolution; the output of a transposed one
    weight_grad  the weight's gradient of either

Codes are gathered as int8 with the channels innermost, so a row is a few long runs of bytes; a 1x1 kernel of stride 1 gathers
nothing. What lies outside is the code of zero. `spread` gathers too, instead of adding up scattered int32 products: with stride s,
the places that are congruent modulo s see the same taps, and each such *phase* is a convolution of stride 1. So no product with an
inserted zero is ever computed, and every sum is exact in the accumulator of the one product that makes it.

B batches, P places, C channels, T taps; `zero` broadcasts to [B, *spatial, C].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from qcompile.geometry import Geometry
from qcompile.kernels import note_launch

__all__ = ["Product", "correlate", "gather", "operators", "spread", "weight_grad"]


class Product(Protocol):
    """`qtrain::scaled_mm` on some device."""

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        a_scale: Tensor,
        b_scale: Tensor,
        a_zero: Tensor | None,
        b_zero: Tensor | None,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        /,
    ) -> Tensor: ...


def gather(
    codes: Tensor,
    begin: Sequence[int],
    step: Sequence[int],
    dilation: Sequence[int],
    taps: Sequence[int],
    places: Sequence[int],
    zero: Tensor | None,
) -> Tensor:
    """codes [B, *spatial, C] -> [B * P, T * C]: place p sees `codes[begin + p * step + t * dilation]` through tap t."""
    batch, *spatial, channels = codes.shape
    if 0 in (batch, *places, *taps, channels):
        return codes.new_empty((batch * math.prod(places), math.prod(taps) * channels))
    pads, starts = [], []
    for axis, size in enumerate(spatial):
        last = begin[axis] + (places[axis] - 1) * step[axis] + (taps[axis] - 1) * dilation[axis]
        before, behind = max(0, -begin[axis]), max(0, last - (size - 1))
        pads.append((before, behind))
        starts.append(begin[axis] + before)
    if any(b or a for b, a in pads):
        codes = _padded(codes, pads, zero)
    elif codes.stride(-1) != 1 and channels > 1:
        codes = codes.contiguous()
    strides = codes.stride()
    offset = sum(s * k for s, k in zip(starts, strides[1:-1], strict=True))
    by_place = [k * s for k, s in zip(strides[1:-1], step, strict=True)]
    by_tap = [k * d for k, d in zip(strides[1:-1], dilation, strict=True)]
    shape = (batch, *places, *taps, channels)
    windows = codes.as_strided(shape, (strides[0], *by_place, *by_tap, strides[-1]), codes.storage_offset() + offset)
    return windows.reshape(batch * math.prod(places), math.prod(taps) * channels)


def _padded(codes: Tensor, pads: Sequence[tuple[int, int]], zero: Tensor | None) -> Tensor:
    batch, *spatial, channels = codes.shape
    out = codes.new_empty((batch, *(s + b + a for s, (b, a) in zip(spatial, pads, strict=True)), channels))
    if zero is None:
        out.zero_()
    else:
        out.copy_(zero.expand(out.shape))
    inner = out
    for axis, (size, (before, _)) in enumerate(zip(spatial, pads, strict=True)):
        inner = inner.narrow(axis + 1, before, size)
    inner.copy_(codes)
    return out


def correlate(
    product: Product,
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    x_zero: Tensor | None,
    w_zero: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    places: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """x [B, groups * C, *spatial] against w [O, C, *kernel] -> [B, O, *places], channels last.

    x_scale, x_zero  0-d or [B, 1, ...]
    w_scale, w_zero  0-d or [O, 1, ...]
    """
    batch, outputs, taps = x.shape[0], w.shape[0], w.shape[2:]
    begin = [-p for p in padding]
    rows = batch * math.prod(places)
    out = x.new_empty((rows, outputs), dtype=out_dtype) if groups > 1 else x
    codes, zero = x.movedim(1, -1), _innermost(x_zero)
    a_scale, a_zero = _per_row(x_scale, batch, rows), _per_row(x_zero, batch, rows)
    for from_channels, to_channels in _groups(groups, x.shape[1], outputs):
        columns = gather(codes[..., from_channels], begin, stride, dilation, taps, places, zero)
        matrix = _taps_by_columns(w[to_channels])
        b_scale, b_zero = _per_column(w_scale, to_channels), _per_column(w_zero, to_channels)
        part = None if bias is None else bias[to_channels]
        result = product(columns, matrix, a_scale, b_scale, a_zero, b_zero, part, out_dtype)
        if groups == 1:
            out = result
        else:
            out[:, to_channels] = result
    return out.view(batch, *places, outputs).movedim(-1, 1)


def spread(
    product: Product,
    g: Tensor,
    w: Tensor,
    g_scale: Tensor,
    w_scale: Tensor,
    g_zero: Tensor | None,
    w_zero: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    places: Sequence[int],
    out_dtype: torch.dtype,
) -> Tensor:
    """g [B, O, *spatial] through w [O, C, *kernel] -> [B, groups * C, *places], channels last: `correlate` turned around.

    g_scale, g_zero  0-d or [B, 1, ...]
    w_scale, w_zero  0-d or [1, C, 1, ...]
    """
    batch, outputs = g.shape[:2]
    inner = w.shape[1]
    phases = [
        [_Phase(r, *axis) for r in range(min(axis[0], axis[4]))]
        for axis in zip(stride, padding, dilation, w.shape[2:], places, strict=True)
    ]
    alone = groups == 1 and all(len(p) == 1 for p in phases) and all(s == 1 for s in stride)
    out = g if alone else g.new_empty((batch, *places, groups * inner), dtype=out_dtype)
    codes, zero = g.movedim(1, -1), _innermost(g_zero)
    b_scale, b_zero = _per_column(w_scale, slice(None)), _per_column(w_zero, slice(None))
    for from_channels, to_channels in _groups(groups, outputs, groups * inner):
        by_tap = w[from_channels].permute(*range(2, w.ndim), 0, 1)  # [*kernel, O, C]
        for phase in itertools.product(*phases):
            sizes, counts = [p.places for p in phase], [len(p.taps) for p in phase]
            columns = gather(
                codes[..., from_channels],
                [p.begin for p in phase],
                [1] * len(phase),
                [p.dilation for p in phase],
                counts,
                sizes,
                zero,
            )
            taken = by_tap
            for axis, p in enumerate(phase):
                if list(p.taps) != list(range(taken.shape[axis])):
                    taken = taken.index_select(axis, torch.tensor(p.taps, dtype=torch.int64, device=w.device))
            matrix = taken.reshape(math.prod(counts) * (outputs // groups), inner)
            rows = batch * math.prod(sizes)
            a_scale, a_zero = _per_row(g_scale, batch, rows), _per_row(g_zero, batch, rows)
            part = None if bias is None else bias[to_channels]
            result = product(columns, matrix, a_scale, b_scale, a_zero, b_zero, part, out_dtype)
            result = result.view(batch, *sizes, inner)
            if alone:
                return result.movedim(-1, 1)
            place = tuple(slice(p.residue, None, p.stride) for p in phase)
            where = (slice(None), *place, to_channels)
            out[where] = result
    return out.movedim(-1, 1)


class _Phase:
    """One axis of the places `residue + stride * q`: which taps reach them, and from where in the gradient.

    Tap t of output o lands on `o * stride - padding + t * dilation`. So place `residue + stride * q` is reached by the taps with
    `residue + padding - t * dilation` divisible by the stride, from output `q + (residue + padding - t * dilation) / stride`.
    `taps` are in the order in which that output grows, `dilation` apart.
    """

    def __init__(self, residue: int, stride: int, padding: int, dilation: int, kernel: int, places: int) -> None:
        self.residue, self.stride = residue, stride
        reach = {t: residue + padding - t * dilation for t in reversed(range(kernel))}
        self.taps = [t for t, r in reach.items() if r % stride == 0]
        self.places = (places - residue + stride - 1) // stride
        self.begin = reach[self.taps[0]] // stride if self.taps else 0
        self.dilation = dilation // math.gcd(dilation, stride)


def weight_grad(
    product: Product,
    small: Tensor,
    big: Tensor,
    small_scale: Tensor,
    big_scale: Tensor,
    small_zero: Tensor | None,
    big_zero: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """small [B, A, *P], big [B, groups * C, *spatial] -> [A, C, *kernel], contiguous.

    `small` has a value for each place of the kernel over `big`: it is a convolution's grad_output and `big` its input; of a
    transposed convolution it is the input, and `big` is grad_output. Scales and zero points: 0-d, or [1, A, 1, ...] and
    [1, groups * C, 1, ...].
    """
    outputs, places, inner = small.shape[1], small.shape[2:], big.shape[1] // groups
    begin, taps = [-p for p in padding], math.prod(kernel)
    left, codes, zero = small.movedim(1, -1), big.movedim(1, -1), _innermost(big_zero)
    parts = []
    for to_channels, from_channels in _groups(groups, outputs, big.shape[1]):
        of_group = zero if zero is None or zero.numel() == 1 else zero[..., from_channels]
        columns = gather(codes[..., from_channels], begin, stride, dilation, kernel, places, of_group)
        rows = left[..., to_channels].reshape(-1, outputs // groups)
        a_scale, a_zero = _per_channel(small_scale, to_channels), _per_channel(small_zero, to_channels)
        b_scale, b_zero = _per_column(big_scale, from_channels, taps), _per_column(big_zero, from_channels, taps)
        result = product(rows.t(), columns, a_scale, b_scale, a_zero, b_zero, None, out_dtype)
        parts.append(result.view(outputs // groups, *kernel, inner).movedim(-1, 1))
    return (parts[0] if groups == 1 else torch.cat(parts)).contiguous()


def operators(product: Product, kernel_name: Callable[..., str]) -> dict[str, Callable[..., Tensor]]:
    """The implementations of `qtrain::scaled_conv` and its gradients, for checked operands, by the operators' names.

    kernel_name  (device, m, n, k, zero_points=) -> the name to note a launch under when it has run; "none": nothing is launched
    """

    def note(out: Tensor, op: str, gemm: str, geometry: Geometry, sizes: Sequence[Sequence[int]], *zeros: Tensor | None) -> None:
        m, n, k = geometry.product(gemm, *sizes)
        name = kernel_name(out.device, m, n, k, zero_points=any(z is not None for z in zeros))
        if name != "none":
            note_launch(name, m, n, k, op, geometry.groups)

    def scaled_conv(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        in_scale, w_scale, in_zero, w_zero, bias, *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        places = geometry.output_size(input.shape[2:], weight.shape[2:])
        run = correlate if geometry.correlates("output") else spread
        operands = (input, weight, in_scale, w_scale, in_zero, w_zero, bias)
        result = run(product, *operands, *geometry.steps, geometry.groups, places, out_dtype)
        note(result, "conv", "output", geometry, (input.shape, weight.shape, (input.shape[0], 0, *places)), in_zero, w_zero)
        return result

    def scaled_conv_grad_input(grad_output: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        g_scale, w_scale, g_zero, w_zero, input_size, *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        run = correlate if geometry.correlates("grad_input") else spread
        operands = (grad_output, weight, g_scale, w_scale, g_zero, w_zero, None)
        result = run(product, *operands, *geometry.steps, geometry.groups, input_size[2:], out_dtype)
        note(result, "conv_grad_input", "grad_input", geometry, (input_size, weight.shape, grad_output.shape), g_zero, w_zero)
        return result

    def scaled_conv_grad_weight(grad_output: Tensor, input: Tensor, *rest: Any) -> Tensor:
        g_scale, in_scale, g_zero, in_zero, weight_size, *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        operands = (grad_output, input, g_scale, in_scale, g_zero, in_zero)
        if geometry.transposed:
            operands = (input, grad_output, in_scale, g_scale, in_zero, g_zero)
        result = weight_grad(product, *operands, weight_size[2:], *geometry.steps, geometry.groups, out_dtype)
        note(result, "conv_grad_weight", "grad_weight", geometry, (input.shape, weight_size, grad_output.shape), g_zero, in_zero)
        return result

    return {f.__name__: f for f in (scaled_conv, scaled_conv_grad_input, scaled_conv_grad_weight)}


def _groups(groups: int, first: int, second: int) -> list[tuple[slice, slice]]:
    """The channels of each group, on either side."""
    a, b = first // groups, second // groups
    return [(slice(i * a, (i + 1) * a), slice(i * b, (i + 1) * b)) for i in range(groups)]


def _taps_by_columns(w: Tensor) -> Tensor:
    """[O, C, *kernel] -> [T * C, O], row-major. In two steps: a transpose of a matrix, then whole rows into their order."""
    outputs, inner, taps = w.shape[0], w.shape[1], math.prod(w.shape[2:])
    if taps == 1:
        return w.reshape(outputs, inner).t()
    return w.permute(*range(2, w.ndim), 1, 0).reshape(taps * inner, outputs)


def _innermost(zero: Tensor | None) -> Tensor | None:
    return zero if zero is None or zero.ndim == 0 else zero.movedim(1, -1)


@overload
def _per_row(values: Tensor, batch: int, rows: int) -> Tensor: ...
@overload
def _per_row(values: None, batch: int, rows: int) -> None: ...
@overload
def _per_row(values: Tensor | None, batch: int, rows: int) -> Tensor | None: ...
def _per_row(values: Tensor | None, batch: int, rows: int) -> Tensor | None:
    """0-d or [B, 1, ...] as 0-d or [B * P, 1]."""
    if values is None or values.numel() == 1:
        return None if values is None else values.reshape(())
    return values.reshape(batch, 1).expand(batch, rows // max(batch, 1)).reshape(rows, 1)


@overload
def _per_column(values: Tensor, channels: slice, taps: int = 1) -> Tensor: ...
@overload
def _per_column(values: None, channels: slice, taps: int = 1) -> None: ...
@overload
def _per_column(values: Tensor | None, channels: slice, taps: int = 1) -> Tensor | None: ...
def _per_column(values: Tensor | None, channels: slice, taps: int = 1) -> Tensor | None:
    """0-d, or the values of some channels as [1, T * C], once for each tap."""
    if values is None or values.numel() == 1:
        return None if values is None else values.reshape(())
    return values.reshape(1, -1)[:, channels].repeat(1, taps)


@overload
def _per_channel(values: Tensor, channels: slice) -> Tensor: ...
@overload
def _per_channel(values: None, channels: slice) -> None: ...
@overload
def _per_channel(values: Tensor | None, channels: slice) -> Tensor | None: ...
def _per_channel(values: Tensor | None, channels: slice) -> Tensor | None:
    """0-d, or the values of some channels as [C, 1]."""
    if values is None or values.numel() == 1:
        return None if values is None else values.reshape(())
    return values.reshape(-1, 1)[channels]
