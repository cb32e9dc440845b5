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
    place and T * C columns. Worked out for codes of one shape with certain strides; they and the zero point come with each call."""

    def __init__(self, codes: Tensor, gather: Gather, groups: int, tiling: Tiling | None) -> None:
        batch, *spatial, channels = codes.shape
        begin, step, dilation, taps, places = gather
        self._channels = channels // groups
        self.width = math.prod(taps) * self._channels
        self._memory = tiling.memory if tiling is not None else None
        at_most = tiling.at_most if tiling is not None and (gather.copies or groups > 1) else None
        self.tiles = tiles(batch, places, self.width, at_most)

        last = [b + (p - 1) * s + (t - 1) * d for b, p, s, t, d in zip(begin, places, step, taps, dilation, strict=True)]
        before = [max(0, -b) for b in begin]
        behind = [max(0, n - (size - 1)) for n, size in zip(last, spatial, strict=True)]
        self._padded = None
        strides = list(codes.stride())
        self._copies = strides[-1] != 1 and self._channels > 1
        if any(before) or any(behind):
            padded = (batch, *(size + b + a for size, b, a in zip(spatial, before, behind, strict=True)), self._channels)
            strides = _contiguous_strides(padded)
            self._padded = padded, before
        elif self._copies:
            strides = _contiguous_strides((batch, *spatial, self._channels))
        by_place = [n * s for n, s in zip(strides[1:-1], step, strict=True)]
        by_tap = [n * d for n, d in zip(strides[1:-1], dilation, strict=True)]
        self._strides = (strides[0], *by_place, *by_tap, strides[-1])
        start = sum(n * (b + pad) for n, b, pad in zip(strides[1:-1], begin, before, strict=True))
        self._views = []
        for tile in self.tiles:
            shape = (tile.images.stop - tile.images.start, *tile.of(places), *taps, self._channels)
            offset = start + tile.images.start * strides[0] + tile.rows.start * by_place[0]
            self._views.append((tile, shape, offset, math.prod(shape[: 1 + len(places)])))

    @property
    def whole(self) -> bool:
        return len(self.tiles) == 1

    def of(self, codes: Tensor, zero: Tensor | None, channels: slice) -> Iterator[tuple[Tile, Tensor]]:
        """(tile, its columns), one at a time: the next one may overwrite it."""
        if self._channels < codes.shape[-1]:
            codes = codes[..., channels]
            zero = zero if zero is None or zero.ndim == 0 or zero.shape[-1] == 1 else zero[..., channels]
        if not self._views or 0 in self._views[0][1]:
            yield from ((tile, codes.new_empty((rows, self.width))) for tile, _, _, rows in self._views)
            return
        if self._padded is not None:
            codes = self._pad(codes, zero)
        elif self._copies:
            codes = codes.contiguous()
        begin = codes.storage_offset()
        for tile, shape, offset, rows in self._views:
            seen = codes.as_strided(shape, self._strides, begin + offset)
            columns = seen if seen.is_contiguous() else self._new("columns", codes, shape).copy_(seen)
            yield tile, columns.view(rows, self.width)

    def _pad(self, codes: Tensor, zero: Tensor | None) -> Tensor:
        assert self._padded is not None
        shape, before = self._padded
        out = self._new("padded", codes, shape)
        if zero is None:
            out.zero_()
        else:
            out.copy_(zero.expand(shape))
        strides = out.stride()
        begin = out.storage_offset() + sum(n * b for n, b in zip(strides[1:-1], before, strict=True))
        out.as_strided(codes.shape, strides, begin).copy_(codes)
        return out

    def _new(self, name: str, codes: Tensor, shape: Sequence[int]) -> Tensor:
        return codes.new_empty(shape) if self._memory is None else self._memory(name, math.prod(shape)).view(shape)


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(1, size))
    return strides
