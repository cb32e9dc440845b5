"""The im2col matrix of a convolution, its *columns*: for every output position, as a row, the codes that the kernel covers there.

Codes are gathered as int8 with the channels innermost, so a row is a few long runs of bytes; a 1x1 kernel of stride 1 gathers
nothing. The padding is the code of zero.

On a CPU the columns of a whole batch would be fresh memory in every step, whose page faults take longer than the product. There
the work is done by `tiles`: some images, or some rows of one large image, whose columns lie in memory that is kept between calls
(`qcompile.kernels.cpu.scratch`).

B batches, P places (output positions), C channels, T taps (positions of the kernel); `zero` broadcasts to [B, *spatial, C].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qcompile.kernels.quantized_tensor import QuantizedTensor

__all__ = ["Columns", "Gather", "Summed", "Tile", "Tiling", "tiles"]


class Summed(Protocol):
    """`qtrain::scaled_mm` with the two matrices in pieces of the axis that is summed, [M, K_i] and [K_i, N], of which only the
    present pair need exist. All pieces have the same ranges."""

    def __call__(self, pieces: Iterable[tuple[QuantizedTensor, QuantizedTensor]], out_dtype: torch.dtype, /) -> Tensor: ...


@dataclass(frozen=True)
class Tiling:
    """How to work on some of the columns at a time.

    at_most  bytes of columns of a tile
    memory   (name, elements) -> int8 [elements] to overwrite, the same at each call
    summed   for gradients of weights, whose sum runs over the places
    """

    at_most: int
    memory: Callable[[str, int], Tensor]
    summed: Summed


@dataclass(frozen=True)
class Tile:
    """A range of images, and a range of rows of their output positions."""

    images: slice
    rows: slice

    def of(self, places: Sequence[int]) -> list[int]:
        """The places of one image."""
        return [self.rows.stop - self.rows.start, *places[1:]]


def tiles(batch: int, places: Sequence[int], bytes_a_place: int, at_most: int | None) -> list[Tile]:
    """The fewest tiles of at most `at_most` bytes each: groups of images, or groups of rows of one image."""
    row = max(1, math.prod(places[1:]) * bytes_a_place)
    rows = max(1, places[0] if at_most is None else min(places[0], at_most // row))
    images = max(1, batch if at_most is None else at_most // max(1, row * places[0]))
    return [
        Tile(slice(image, min(batch, image + images)), slice(first, min(places[0], first + rows)))
        for image in range(0, batch, images)
        for first in range(0, places[0], rows)
    ]


class Gather(NamedTuple):
    """What the columns are made of, by axis: place p reads `codes[begin + p * step + t * dilation]` at tap t."""

    begin: Sequence[int]
    step: Sequence[int]
    dilation: Sequence[int]
    taps: Sequence[int]
    places: Sequence[int]

    @property
    def copies(self) -> bool:
        """Whether the columns are more than a view of the codes."""
        return math.prod(self.taps) > 1 or any(s != 1 for s in self.step)


class Columns:
    """The columns of codes [B, *spatial, groups * C], tile by tile and for the channels of one group: matrices with a row for each
    place and T * C columns."""

    def __init__(self, codes: Tensor, zero: Tensor | None, gather: Gather, groups: int, tiling: Tiling | None) -> None:
        self.codes, self.zero, self.gather = codes, zero, gather
        self.memory = tiling.memory if tiling is not None else lambda name, elements: codes.new_empty(elements)
        at_most = tiling.at_most if tiling is not None and (gather.copies or groups > 1) else None
        self.width = math.prod(gather.taps) * (codes.shape[-1] // groups)
        self.tiles = tiles(codes.shape[0], gather.places, self.width, at_most)

    @property
    def whole(self) -> bool:
        return len(self.tiles) == 1

    def of(self, channels: slice) -> Iterator[tuple[Tile, Tensor]]:
        """(tile, its columns), one at a time: the next one may overwrite it."""
        zero = self.zero
        if zero is not None and zero.ndim > 0 and zero.shape[-1] > 1:
            zero = zero[..., channels]
        windows = _windows(self.codes[..., channels], zero, self.gather, self.memory)
        for tile in self.tiles:
            seen = windows[tile.images, tile.rows]
            columns = seen if seen.is_contiguous() else self.memory("columns", seen.numel()).view(seen.shape).copy_(seen)
            yield tile, columns.view(math.prod(seen.shape[: len(self.gather.places) + 1]), self.width)


def _windows(codes: Tensor, zero: Tensor | None, gather: Gather, memory: Callable[[str, int], Tensor]) -> Tensor:
    """The columns of all tiles as a view [B, *places, *taps, C] of the codes, or of a padded copy of them in `memory`."""
    begin, step, dilation, taps, places = gather
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
