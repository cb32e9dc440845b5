"""Convolutions as products of matrices of codes, on any device that has a `scaled_mm`: `operators(product)` makes the three.

Three shapes of work, each a product with one gathered matrix ("columns": for every place, the codes that a kernel sees from there):

    correlate    the output of a convolution; the input's gradient of a transposed one
    spread       the input's gradient of a convolution; the output of a transposed one
    weight_grad  the weight's gradient of either

Codes are gathered as int8 with the channels innermost, so a row is a few long runs of bytes; a 1x1 kernel of stride 1 gathers
nothing. What lies outside is the code of zero. `spread` gathers too, instead of adding up scattered int32 products: with stride s,
the places that are congruent modulo s see the same taps, and each such *phase* is a convolution of stride 1. So no product with an
inserted zero is ever computed, and every sum is exact in the accumulator of the one product that makes it.

On a CPU the columns of a whole batch are memory that the system hands out anew, page by page, in every step, which takes longer
than multiplying them. There the work is cut into `parts` of some images (of some rows of one image, where one is large), whose
columns lie in memory that is kept (`qcompile.kernels.cpu.scratch`).

B batches, P places, C channels, T taps; `zero` broadcasts to [B, *spatial, C].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from qcompile.geometry import Geometry
from qcompile.kernels import note_launch

__all__ = ["Cut", "Product", "correlate", "gather", "operators", "parts", "spread", "weight_grad"]


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


class Summed(Protocol):
    """The same with the two matrices in pieces of the axis that is summed: int8 [M, K_i] and [K_i, N], of which only the present
    pair need exist."""

    def __call__(
        self,
        pieces: Iterable[tuple[Tensor, Tensor]],
        a_scale: Tensor,
        b_scale: Tensor,
        a_zero: Tensor | None,
        b_zero: Tensor | None,
        out_dtype: torch.dtype,
        /,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Cut:
    """How to work on a part of the columns at a time.

    at_most  bytes of columns of a part
    memory   (name, elements) -> int8 [elements] to overwrite, the same at each call
    summed   for gradients of weights, whose sum runs over the places
    """

    at_most: int
    memory: Callable[[str, int], Tensor]
    summed: Summed


@dataclass(frozen=True)
class Part:
    """Some images, and some rows of their places."""

    images: slice
    rows: slice

    def of(self, places: Sequence[int]) -> list[int]:
        """The places of one image."""
        return [self.rows.stop - self.rows.start, *places[1:]]


def parts(batch: int, places: Sequence[int], bytes_a_place: int, at_most: int | None) -> list[Part]:
    """As few as `at_most` bytes allow: groups of images, or groups of rows of one image."""
    row = max(1, math.prod(places[1:]) * bytes_a_place)
    rows = max(1, places[0] if at_most is None else min(places[0], at_most // row))
    images = max(1, batch if at_most is None else at_most // max(1, row * places[0]))
    return [
        Part(slice(image, min(batch, image + images)), slice(first, min(places[0], first + rows)))
        for image in range(0, batch, images)
        for first in range(0, places[0], rows)
    ]


class _Columns:
    """What a product gathers, part by part: codes [B, *spatial, groups * C] as `gather` has them, of the channels of a group."""

    def __init__(
        self,
        codes: Tensor,
        begin: Sequence[int],
        step: Sequence[int],
        dilation: Sequence[int],
        taps: Sequence[int],
        places: Sequence[int],
        zero: Tensor | None,
        groups: int,
        cut: Cut | None,
    ) -> None:
        self.codes, self.zero = codes, zero
        self.where = (begin, step, dilation, taps, places)
        self.memory = cut.memory if cut is not None else lambda name, elements: codes.new_empty(elements)
        copies = math.prod(taps) > 1 or any(s != 1 for s in step) or groups > 1
        at_most = cut.at_most if cut is not None and copies else None
        self.width = math.prod(taps) * (codes.shape[-1] // groups)
        self.parts = parts(codes.shape[0], places, self.width, at_most)

    @property
    def whole(self) -> bool:
        return len(self.parts) == 1

    def of(self, channels: slice) -> Iterator[tuple[Part, Tensor]]:
        """(part, its columns), one at a time: the next one may overwrite it."""
        zero = self.zero
        if zero is not None and zero.ndim > 0 and zero.shape[-1] > 1:
            zero = zero[..., channels]
        windows = _windows(self.codes[..., channels], *self.where, zero, self.memory)
        for part in self.parts:
            seen = windows[part.images, part.rows]
            columns = seen if seen.is_contiguous() else self.memory("columns", seen.numel()).view(seen.shape).copy_(seen)
            yield part, columns.view(math.prod(seen.shape[: len(self.where[4]) + 1]), self.width)


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
    windows = _windows(codes, begin, step, dilation, taps, places, zero, lambda name, elements: codes.new_empty(elements))
    return windows.reshape(codes.shape[0] * math.prod(places), math.prod(taps) * codes.shape[-1])


def _windows(
    codes: Tensor,
    begin: Sequence[int],
    step: Sequence[int],
    dilation: Sequence[int],
    taps: Sequence[int],
    places: Sequence[int],
    zero: Tensor | None,
    memory: Callable[[str, int], Tensor],
) -> Tensor:
    """The same as a view [B, *places, *taps, C] of the codes, or of a padded copy of them in `memory`."""
    batch, *spatial, channels = codes.shape
    shape = (batch, *places, *taps, channels)
    if 0 in shape:
        return codes.new_empty(shape)
    pads, starts = [], []
    for axis, size in enumerate(spatial):
        last = begin[axis] + (places[axis] - 1) * step[axis] + (taps[axis] - 1) * dilation[axis]
        before, behind = max(0, -begin[axis]), max(0, last - (size - 1))
        pads.append((before, behind))
        starts.append(begin[axis] + before)
    if any(b or a for b, a in pads):
        codes = _padded(codes, pads, zero, memory)
    elif codes.stride(-1) != 1 and channels > 1:
        codes = codes.contiguous()
    strides = codes.stride()
    offset = sum(s * k for s, k in zip(starts, strides[1:-1], strict=True))
    by_place = [k * s for k, s in zip(strides[1:-1], step, strict=True)]
    by_tap = [k * d for k, d in zip(strides[1:-1], dilation, strict=True)]
    return codes.as_strided(shape, (strides[0], *by_place, *by_tap, strides[-1]), codes.storage_offset() + offset)


def _padded(
    codes: Tensor, pads: Sequence[tuple[int, int]], zero: Tensor | None, memory: Callable[[str, int], Tensor]
) -> Tensor:
    batch, *spatial, channels = codes.shape
    shape = (batch, *(s + b + a for s, (b, a) in zip(spatial, pads, strict=True)), channels)
    out = memory("padded", math.prod(shape)).view(shape)
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
    cut: Cut | None = None,
) -> Tensor:
    """x [B, groups * C, *spatial] against w [O, C, *kernel] -> [B, O, *places], channels last.

    x_scale, x_zero  0-d or [B, 1, ...]
    w_scale, w_zero  0-d or [O, 1, ...]
    """
    outputs, taps = w.shape[0], w.shape[2:]
    begin = [-p for p in padding]
    columns = _Columns(x.movedim(1, -1), begin, stride, dilation, taps, places, _innermost(x_zero), groups, cut)
    out = None if groups == 1 and columns.whole else x.new_empty((x.shape[0], *places, outputs), dtype=out_dtype)
    for from_channels, to_channels in _groups(groups, x.shape[1], outputs):
        matrix = _taps_by_columns(w[to_channels])
        b_scale, b_zero = _per_column(w_scale, to_channels), _per_column(w_zero, to_channels)
        bias_part = None if bias is None else bias[to_channels]
        for part, codes in columns.of(from_channels):
            a_scale, a_zero = _per_row(x_scale, part.images, len(codes)), _per_row(x_zero, part.images, len(codes))
            result = product(codes, matrix, a_scale, b_scale, a_zero, b_zero, bias_part, out_dtype)
            result = result.view(-1, *part.of(places), matrix.shape[1])
            if out is None:
                return result.movedim(-1, 1)
            out[part.images, part.rows, ..., to_channels] = result
    assert out is not None, "an undivided one has been returned"
    return out.movedim(-1, 1)


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
    cut: Cut | None = None,
) -> Tensor:
    """g [B, O, *spatial] through w [O, C, *kernel] -> [B, groups * C, *places], channels last: `correlate` turned around.

    g_scale, g_zero  0-d or [B, 1, ...]
    w_scale, w_zero  0-d or [1, C, 1, ...]
    """
    batch, outputs = g.shape[:2]
    inner = w.shape[1]
    axes = [
        [_Phase(r, *axis) for r in range(min(axis[0], axis[4]))]
        for axis in zip(stride, padding, dilation, w.shape[2:], places, strict=True)
    ]
    phases = [(phase, _columns_of_phase(phase, g, _innermost(g_zero), groups, cut)) for phase in itertools.product(*axes)]
    undivided = groups == 1 and all(s == 1 for s in stride) and len(phases) == 1 and phases[0][1].whole
    out = None if undivided else g.new_empty((batch, *places, groups * inner), dtype=out_dtype)
    b_scale, b_zero = _per_column(w_scale, slice(None)), _per_column(w_zero, slice(None))
    for from_channels, to_channels in _groups(groups, outputs, groups * inner):
        by_tap = w[from_channels].permute(*range(2, w.ndim), 0, 1)  # [*kernel, O, C]
        bias_part = None if bias is None else bias[to_channels]
        for phase, columns in phases:
            taken = by_tap
            for axis, p in enumerate(phase):
                if list(p.taps) != list(range(taken.shape[axis])):
                    taken = taken.index_select(axis, torch.tensor(p.taps, dtype=torch.int64, device=w.device))
            matrix = taken.reshape(math.prod(len(p.taps) for p in phase) * (outputs // groups), inner)
            for part, codes in columns.of(from_channels):
                a_scale, a_zero = _per_row(g_scale, part.images, len(codes)), _per_row(g_zero, part.images, len(codes))
                result = product(codes, matrix, a_scale, b_scale, a_zero, b_zero, bias_part, out_dtype)
                result = result.view(-1, *part.of([p.places for p in phase]), inner)
                if out is None:
                    return result.movedim(-1, 1)
                first, *others = phase
                where = (part.images, first.where(part.rows), *(p.where(slice(0, p.places)) for p in others), to_channels)
                out[where] = result
    return g.new_empty((batch, *places, groups * inner), dtype=out_dtype).movedim(-1, 1) if out is None else out.movedim(-1, 1)


def _columns_of_phase(phase: Sequence[_Phase], g: Tensor, zero: Tensor | None, groups: int, cut: Cut | None) -> _Columns:
    begin, dilation = [p.begin for p in phase], [p.dilation for p in phase]
    taps, places = [len(p.taps) for p in phase], [p.places for p in phase]
    return _Columns(g.movedim(1, -1), begin, [1] * len(phase), dilation, taps, places, zero, groups, cut)


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
    cut: Cut | None = None,
) -> tuple[Tensor, bool]:
    """small [B, A, *P], big [B, groups * C, *spatial] -> [A, C, *kernel], channels last; and whether its sum was cut.

    `small` has a value for each place of the kernel over `big`: it is a convolution's grad_output and `big` its input; of a
    transposed convolution it is the input, and `big` is grad_output. Scales and zero points: 0-d, or [1, A, 1, ...] and
    [1, groups * C, 1, ...].
    """
    outputs, places, inner = small.shape[1], small.shape[2:], big.shape[1] // groups
    begin, taps = [-p for p in padding], math.prod(kernel)
    left = small.movedim(1, -1)
    columns = _Columns(big.movedim(1, -1), begin, stride, dilation, kernel, places, _innermost(big_zero), groups, cut)
    is_cut = cut is not None and len(columns.parts) > 1
    found = []
    for to_channels, from_channels in _groups(groups, outputs, big.shape[1]):
        a_scale, a_zero = _per_channel(small_scale, to_channels), _per_channel(small_zero, to_channels)
        b_scale, b_zero = _per_column(big_scale, from_channels, taps), _per_column(big_zero, from_channels, taps)
        pieces = (
            (left[part.images, part.rows, ..., to_channels].reshape(-1, outputs // groups).t(), codes)
            for part, codes in columns.of(from_channels)
        )
        if is_cut:
            assert cut is not None
            result = cut.summed(pieces, a_scale, b_scale, a_zero, b_zero, out_dtype)
        else:
            rows, codes = next(pieces, (small.new_empty((outputs // groups, 0)), small.new_empty((0, taps * inner))))
            result = product(rows, codes, a_scale, b_scale, a_zero, b_zero, None, out_dtype)
        found.append(result.view(outputs // groups, *kernel, inner))
    return (found[0] if groups == 1 else torch.cat(found)).movedim(-1, 1), is_cut


def operators(product: Product, kernel_name: Callable[..., str], cut: Cut | None = None) -> dict[str, Callable[..., Tensor]]:
    """The implementations of `qtrain::scaled_conv` and its gradients, for checked operands, by the operators' names.

    kernel_name  (device, m, n, k, integer=) -> the name to note a launch under when it has run; "none": nothing is launched.
                 integer: the sum must stay one until it is complete, because of zero points or because it was cut
    """

    def note(out: Tensor, op: str, gemm: str, geometry: Geometry, sizes: Sequence[Sequence[int]], integer: bool) -> None:
        m, n, k = geometry.product(gemm, *sizes)
        name = kernel_name(out.device, m, n, k, integer=integer)
        if name != "none":
            note_launch(name, m, n, k, op, geometry.groups)

    def scaled_conv(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        in_scale, w_scale, in_zero, w_zero, bias, *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        places = geometry.output_size(input.shape[2:], weight.shape[2:])
        run = correlate if geometry.correlates("output") else spread
        operands = (input, weight, in_scale, w_scale, in_zero, w_zero, bias)
        result = run(product, *operands, *geometry.steps, geometry.groups, places, out_dtype, cut)
        sizes = (input.shape, weight.shape, (input.shape[0], 0, *places))
        note(result, "conv", "output", geometry, sizes, _any_given(in_zero, w_zero))
        return result

    def scaled_conv_grad_input(grad_output: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        g_scale, w_scale, g_zero, w_zero, input_size, *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        run = correlate if geometry.correlates("grad_input") else spread
        operands = (grad_output, weight, g_scale, w_scale, g_zero, w_zero, None)
        result = run(product, *operands, *geometry.steps, geometry.groups, input_size[2:], out_dtype, cut)
        sizes = (input_size, weight.shape, grad_output.shape)
        note(result, "conv_grad_input", "grad_input", geometry, sizes, _any_given(g_zero, w_zero))
        return result

    def scaled_conv_grad_weight(grad_output: Tensor, input: Tensor, *rest: Any) -> Tensor:
        g_scale, in_scale, g_zero, in_zero, weight_size, *spelled, out_dtype = rest
        geometry = Geometry(*spelled)
        operands = (grad_output, input, g_scale, in_scale, g_zero, in_zero)
        if geometry.transposed:
            operands = (input, grad_output, in_scale, g_scale, in_zero, g_zero)
        result, is_cut = weight_grad(product, *operands, weight_size[2:], *geometry.steps, geometry.groups, out_dtype, cut)
        sizes = (input.shape, weight_size, grad_output.shape)
        note(result, "conv_grad_weight", "grad_weight", geometry, sizes, is_cut or _any_given(g_zero, in_zero))
        return result

    return {f.__name__: f for f in (scaled_conv, scaled_conv_grad_input, scaled_conv_grad_weight)}


def _any_given(*values: object) -> bool:
    return any(value is not None for value in values)


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
def _per_row(values: Tensor, images: slice, rows: int) -> Tensor: ...
@overload
def _per_row(values: None, images: slice, rows: int) -> None: ...
@overload
def _per_row(values: Tensor | None, images: slice, rows: int) -> Tensor | None: ...
def _per_row(values: Tensor | None, images: slice, rows: int) -> Tensor | None:
    """0-d or [B, 1, ...] as 0-d or [rows, 1], for as many rows of each of the images."""
    if values is None or values.numel() == 1:
        return None if values is None else values.reshape(())
    chosen = values[images].reshape(-1, 1)
    return chosen.expand(len(chosen), rows // max(len(chosen), 1)).reshape(rows, 1)


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
