"""Convolutions as products of matrices of codes, on any device that has a `scaled_mm`: `plans(product)` makes the three.

Three computations, each a product with one im2col matrix ("columns", `qcompile.kernels.columns`):

    correlate    the output of a convolution; the input's gradient of a transposed one
    spread       the input's gradient of a convolution; the output of a transposed one
    weight_grad  the weight's gradient of either

`spread` gathers too, instead of adding up scattered int32 products (col2im): with stride s, the output positions that are congruent
modulo s are reached by the same taps, and each such *phase* is a convolution of stride 1. So no product with an inserted zero is
ever computed, and every sum is exact in the accumulator of the one product that makes it.

Groups are products side by side, and small ones are taken together: between two of them the weight is zero, or its gradient thrown
away. A product for 4 channels takes little less time than one for 64.

A *plan* is worked out once for operands of some shapes, strides and dtypes, and then run with such operands: what it works out
takes longer than the products of a small layer.

B batches, P places (output positions), C channels, T taps (positions of the kernel).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.geometry import Geometry
from qcompile.kernels import note_launch
from qcompile.kernels.columns import Columns, Gather, Tile, Tiling
from qcompile.kernels.prepared import planned
from qcompile.kernels.quantized_tensor import MatrixProduct, QuantizedTensor, zero_point_count

__all__ = ["correlate", "operators", "plans", "spread", "weight_grad"]

Convolution = Callable[[QuantizedTensor, QuantizedTensor, Tensor | None], Tensor]
"""(the input or grad_output, the weight, bias) -> the output, or the gradient of the input."""

WeightGradient = Callable[[QuantizedTensor, QuantizedTensor], Tensor]
"""`weight_grad`'s (small, big) -> the gradient of the weight."""

TOGETHER = 64
"""The most channels, on either side, of groups that are taken together."""


def correlate(
    product: MatrixProduct,
    x: QuantizedTensor,
    w: QuantizedTensor,
    geometry: Geometry,
    places: Sequence[int],
    out_dtype: torch.dtype,
    tiling: Tiling | None = None,
) -> Convolution:
    """x [B, groups * C, *spatial] against w [O, C, *kernel] -> [B, O, *places], channels last.

    The ranges of x are 0-d or [B, 1, ...], those of w 0-d or [O, 1, ...].
    """
    batch, channels = x.codes.shape[:2]
    outputs, groups = w.codes.shape[0], geometry.groups
    gather = Gather([-p for p in geometry.padding], geometry.stride, geometry.dilation, w.codes.shape[2:], places)
    columns = _columns(x, gather, groups, tiling)
    parts = _groups(groups, channels, outputs)
    undivided = groups == 1 and columns.whole

    def run(x: QuantizedTensor, w: QuantizedTensor, bias: Tensor | None) -> Tensor:
        codes, zero = _channels_innermost(x)
        out = None if undivided else codes.new_empty((batch, *places, outputs), dtype=out_dtype)
        for from_channels, to_channels in parts:
            matrix = QuantizedTensor(_taps_by_columns(w.codes[to_channels]), *_per_column(w, to_channels))
            bias_part = None if bias is None else bias[to_channels]
            for tile, rows in columns.of(codes, zero, from_channels):
                result = product(QuantizedTensor(rows, *_per_row(x, tile, len(rows))), matrix, bias_part, out_dtype)
                result = result.view(-1, *tile.of(places), outputs // groups)
                if out is None:
                    return result.movedim(-1, 1)
                out[tile.images, tile.rows, ..., to_channels] = result
        assert out is not None, "an undivided one has been returned"
        return out.movedim(-1, 1)

    return run


def spread(
    product: MatrixProduct,
    g: QuantizedTensor,
    w: QuantizedTensor,
    geometry: Geometry,
    places: Sequence[int],
    out_dtype: torch.dtype,
    tiling: Tiling | None = None,
) -> Convolution:
    """g [B, O, *spatial] through w [O, C, *kernel] -> [B, groups * C, *places], channels last: `correlate` turned around.

    The ranges of g are 0-d or [B, 1, ...], those of w 0-d or [1, C, 1, ...].
    """
    batch, outputs = g.codes.shape[:2]
    inner, kernel, groups = w.codes.shape[1], w.codes.shape[2:], geometry.groups
    axes = [
        [_Phase(r, *axis) for r in range(min(axis[0], axis[4]))] for axis in zip(*geometry.steps, kernel, places, strict=True)
    ]
    device = w.codes.device
    phases = [
        (phase, _columns(g, _gather_of(phase), groups, tiling), _taps_of(phase, kernel, device))
        for phase in itertools.product(*axes)
    ]
    undivided = groups == 1 and all(s == 1 for s in geometry.stride) and len(phases) == 1 and phases[0][1].whole
    parts = _groups(groups, outputs, groups * inner)

    def run(g: QuantizedTensor, w: QuantizedTensor, bias: Tensor | None) -> Tensor:
        codes, zero = _channels_innermost(g)
        out = None if undivided else codes.new_empty((batch, *places, groups * inner), dtype=out_dtype)
        w_ranges = _per_column(w, slice(None))
        for from_channels, to_channels in parts:
            by_tap = w.codes[from_channels].permute(*range(2, w.codes.ndim), 0, 1).reshape(-1, outputs // groups, inner)
            bias_part = None if bias is None else bias[to_channels]
            for phase, columns, taps in phases:
                chosen = by_tap if taps is None else by_tap.index_select(0, taps)
                matrix = QuantizedTensor(chosen.view(columns.width, inner), *w_ranges)
                for tile, rows in columns.of(codes, zero, from_channels):
                    result = product(QuantizedTensor(rows, *_per_row(g, tile, len(rows))), matrix, bias_part, out_dtype)
                    result = result.view(-1, *tile.of([p.places for p in phase]), inner)
                    if out is None:
                        return result.movedim(-1, 1)
                    first, *others = phase
                    where = (tile.images, first.where(tile.rows), *(p.where(slice(0, p.places)) for p in others), to_channels)
                    out[where] = result
        assert out is not None, "an undivided one has been returned"
        return out.movedim(-1, 1)

    return run


def _gather_of(phase: Sequence[_Phase]) -> Gather:
    taps, places = [len(p.taps) for p in phase], [p.places for p in phase]
    return Gather([p.begin for p in phase], [1] * len(phase), [p.dilation for p in phase], taps, places)


def _taps_of(phase: Sequence[_Phase], kernel: Sequence[int], device: torch.device) -> Tensor | None:
    """The numbers that a phase's taps have among those of the kernel; None: all of them, in their order."""
    strides = [math.prod(kernel[axis + 1 :]) for axis in range(len(kernel))]
    taps = itertools.product(*(p.taps for p in phase))
    numbers = [sum(t * s for t, s in zip(tap, strides, strict=True)) for tap in taps]
    return None if numbers == list(range(math.prod(kernel))) else torch.tensor(numbers, dtype=torch.int64, device=device)


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

    def where(self, q: slice) -> slice:
        """Its places from the q-th on, among all."""
        return slice(self.residue + self.stride * q.start, self.residue + self.stride * q.stop, self.stride)


def weight_grad(
    product: MatrixProduct,
    small: QuantizedTensor,
    big: QuantizedTensor,
    kernel: Sequence[int],
    geometry: Geometry,
    out_dtype: torch.dtype,
    tiling: Tiling | None = None,
) -> tuple[WeightGradient, bool]:
    """small [B, A, *P], big [B, groups * C, *spatial] -> [A, C, *kernel], channels last; and whether its sum is cut.

    `small` has a value for each place of the kernel over `big`: it is a convolution's grad_output and `big` its input; of a
    transposed convolution it is the input, and `big` is grad_output. Ranges: 0-d, or [1, A, 1, ...] and [1, groups * C, 1, ...].
    """
    outputs, places, groups = small.codes.shape[1], small.codes.shape[2:], geometry.groups
    inner, taps, width = big.codes.shape[1] // groups, math.prod(kernel), outputs // groups
    gather = Gather([-p for p in geometry.padding], geometry.stride, geometry.dilation, kernel, places)
    columns = _columns(big, gather, groups, tiling)
    cut = tiling if len(columns.tiles) > 1 else None
    parts = _groups(groups, outputs, big.codes.shape[1])

    def run(small: QuantizedTensor, big: QuantizedTensor) -> Tensor:
        left = small.codes.movedim(1, -1)
        codes, zero = _channels_innermost(big)
        found = []
        for to_channels, from_channels in parts:
            a_ranges, b_ranges = _per_channel(small, to_channels), _per_column(big, from_channels, taps)
            part = left[..., to_channels]
            pieces = (
                (
                    QuantizedTensor(part[tile.images, tile.rows].reshape(-1, width).t(), *a_ranges),
                    QuantizedTensor(rows, *b_ranges),
                )
                for tile, rows in columns.of(codes, zero, from_channels)
            )
            if cut is not None:
                result = cut.summed(pieces, out_dtype)
            else:
                no_rows = QuantizedTensor(left.new_empty((width, 0)), *a_ranges)
                no_columns = QuantizedTensor(left.new_empty((0, taps * inner)), *b_ranges)
                result = product(*next(pieces, (no_rows, no_columns)), None, out_dtype)
            found.append(result.view(width, *kernel, inner))
        return (found[0] if groups == 1 else torch.cat(found)).movedim(-1, 1)

    return run, cut is not None


def plans(
    product: MatrixProduct, kernel_name: Callable[..., str], tiling: Tiling | None = None
) -> dict[str, Callable[..., Callable[..., Tensor]]]:
    """What runs `qtrain::scaled_conv` and its gradients for checked operands like the given ones, by the operators' names.

    kernel_name  (device, m, n, k, integer=) -> the name to note a launch under when it has run; "none": nothing is launched.
                 integer: the sum must stay one until it is complete, because of zero points or because it was cut
    """

    def noted(
        run: Callable[..., Tensor], op: str, gemm: str, geometry: Geometry, sizes: Sequence[Sequence[int]], integer: bool
    ) -> Callable[..., Tensor]:
        m, n, k = geometry.product(gemm, *sizes)
        ran = ""

        def run_and_note(*operands: Any) -> Tensor:
            nonlocal ran
            out = run(*operands)
            ran = ran or kernel_name(out.device, m, n, k, integer=integer)  # known once it has run: another may have failed
            if ran != "none":
                note_launch(ran, m, n, k, op, geometry.groups)
            return out

        return run_and_note

    def scaled_conv(x: QuantizedTensor, w: QuantizedTensor, bias: Tensor | None, *rest: Any) -> Callable[..., Tensor]:
        *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        places = geometry.output_size(x.codes.shape[2:], w.codes.shape[2:])
        how = correlate if geometry.correlates("output") else spread
        convolve = _together(functools.partial(how, product), x, w, geometry, places, out_dtype, tiling)
        sizes = (x.codes.shape, w.codes.shape, (x.codes.shape[0], 0, *places))
        integer = zero_point_count(x.zero, w.zero) > 0
        return noted(lambda x, w, bias, *_: convolve(x, w, bias), "conv", "output", geometry, sizes, integer)

    def scaled_conv_grad_input(
        g: QuantizedTensor, w: QuantizedTensor, input_size: Sequence[int], *rest: Any
    ) -> Callable[..., Tensor]:
        *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        how = correlate if geometry.correlates("grad_input") else spread
        convolve = _together(functools.partial(how, product), g, w, geometry, input_size[2:], out_dtype, tiling)
        sizes = (input_size, w.codes.shape, g.codes.shape)
        integer = zero_point_count(g.zero, w.zero) > 0
        return noted(lambda g, w, *_: convolve(g, w, None), "conv_grad_input", "grad_input", geometry, sizes, integer)

    def scaled_conv_grad_weight(
        g: QuantizedTensor, x: QuantizedTensor, weight_size: Sequence[int], *rest: Any
    ) -> Callable[..., Tensor]:
        *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        several = _several(geometry.groups, weight_size)
        fewer = geometry._replace(groups=geometry.groups // several)
        pair = (x, g) if geometry.transposed else (g, x)
        multiply, is_cut = weight_grad(product, *pair, weight_size[2:], fewer, out_dtype, tiling)

        def run(g: QuantizedTensor, x: QuantizedTensor, *_: Any) -> Tensor:
            small, big = (x, g) if geometry.transposed else (g, x)
            return _own_groups(multiply(small, big), geometry.groups, several)

        sizes = (x.codes.shape, weight_size, g.codes.shape)
        integer = is_cut or zero_point_count(g.zero, x.zero) > 0
        return noted(run, "conv_grad_weight", "grad_weight", geometry, sizes, integer)

    return {f.__name__: f for f in (scaled_conv, scaled_conv_grad_input, scaled_conv_grad_weight)}


def operators(
    product: MatrixProduct, kernel_name: Callable[..., str], tiling: Tiling | None = None
) -> dict[str, Callable[..., Tensor]]:
    """The implementations of these operators, for checked operands, by name: each call is planned."""
    return {name: planned(plan) for name, plan in plans(product, kernel_name, tiling).items()}


def _several(groups: int, weight_size: Sequence[int]) -> int:
    """How many groups to take together, for a weight [O, C / groups, *kernel]."""
    channels = max(weight_size[0] // groups, weight_size[1], 1)
    return max((n for n in range(2, min(groups, TOGETHER // channels) + 1) if groups % n == 0), default=1)


def _together(
    how: Callable[..., Convolution], x: QuantizedTensor, w: QuantizedTensor, geometry: Geometry, *rest: Any
) -> Convolution:
    """A convolution with fewer groups that computes the same. A weight's codes of 0 stand for 0: not with zero points."""
    several = 1 if w.zero is not None else _several(geometry.groups, w.codes.shape)
    if several == 1:
        return how(x, w, geometry, *rest)
    fewer = geometry.groups // several
    convolve = how(x, _joined(w, fewer, several), geometry._replace(groups=fewer), *rest)
    return lambda x, w, bias: convolve(x, _joined(w, fewer, several), bias)


def _joined(w: QuantizedTensor, groups: int, several: int) -> QuantizedTensor:
    """The weight [O, C, *kernel] of `groups * several` groups as one of `groups`: [O, several * C, *kernel]."""
    outputs, inner, *kernel = w.codes.shape
    codes = w.codes.new_zeros((groups, several, outputs // (groups * several), several, inner, *kernel))
    own = codes.diagonal(dim1=1, dim2=3)  # [groups, O, C, *kernel, several]
    own.copy_(w.codes.reshape(groups, several, -1, inner, *kernel).movedim(1, -1))
    scale = w.scale if w.scale.ndim == 0 or w.scale.shape[1] == 1 else w.scale.repeat(1, several, *[1] * len(kernel))
    return QuantizedTensor(codes.view(outputs, several * inner, *kernel), scale)


def _own_groups(gradient: Tensor, groups: int, several: int) -> Tensor:
    """Of the weight's gradient when so many groups were taken together: [O, several * C, *kernel] -> [O, C, *kernel]."""
    if several == 1:
        return gradient
    outputs, kernel = gradient.shape[0], gradient.shape[2:]
    by_group = gradient.movedim(1, -1).reshape(groups // several, several, outputs // groups, *kernel, several, -1)
    own = by_group.diagonal(dim1=1, dim2=-2)  # [groups // several, O, *kernel, C, several]
    return own.movedim(-1, 1).reshape(outputs, *kernel, own.shape[-2]).contiguous().movedim(-1, 1)


def _groups(groups: int, first: int, second: int) -> list[tuple[slice, slice]]:
    """The channels of each group, on either side."""
    a, b = first // groups, second // groups
    return [(slice(i * a, (i + 1) * a), slice(i * b, (i + 1) * b)) for i in range(groups)]


def _taps_by_columns(w: Tensor) -> Tensor:
    """[O, C, *kernel] -> [T * C, O], a view of a weight that is channels last."""
    outputs, inner, taps = w.shape[0], w.shape[1], math.prod(w.shape[2:])
    if taps == 1:
        return w.reshape(outputs, inner).t()
    return w.permute(*range(2, w.ndim), 1, 0).reshape(taps * inner, outputs)


def _channels_innermost(x: QuantizedTensor) -> tuple[Tensor, Tensor | None]:
    """The codes [B, *spatial, C], and the zero point, which is what their padding holds."""
    return x.codes.movedim(1, -1), x.zero if x.zero is None or x.zero.ndim == 0 else x.zero.movedim(1, -1)


def _columns(x: QuantizedTensor, gather: Gather, groups: int, tiling: Tiling | None) -> Columns:
    """Of codes [B, C, *spatial]."""
    return Columns(x.codes.movedim(1, -1), gather, groups, tiling)


def _per_row(x: QuantizedTensor, tile: Tile, rows: int) -> tuple[Tensor, Tensor | None]:
    """Ranges [B, 1, ...] as [rows, 1], for as many rows of each of the tile's images."""

    def lay_out(values: Tensor) -> Tensor:
        chosen = values[tile.images].reshape(-1, 1)
        return chosen.expand(len(chosen), rows // max(len(chosen), 1)).reshape(rows, 1)

    return x.ranges(lay_out)


def _per_column(x: QuantizedTensor, channels: slice, taps: int = 1) -> tuple[Tensor, Tensor | None]:
    """The ranges of some channels as [1, T * C], once for each tap."""
    return x.ranges(lambda values: values.reshape(1, -1)[:, channels].repeat(1, taps))


def _per_channel(x: QuantizedTensor, channels: slice) -> tuple[Tensor, Tensor | None]:
    """The ranges of some channels as [C, 1]."""
    return x.ranges(lambda values: values.reshape(-1, 1)[channels])
