"""Codes of b bits in b bits each: the form in which converted models are saved."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pack_bits", "packed_bytes", "unpack_bits"]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """int8 codes in [-2**(bits-1), 2**(bits-1)) of any shape -> uint8 [packed_bytes(...)].

    One stream of bits, each code's lowest bit first, in the order of the elements; two 4-bit codes share a byte.
    """
    values = codes.flatten().to(torch.int16) + 2 ** (bits - 1)
    stream = (values.unsqueeze(1) >> torch.arange(bits, device=codes.device)) & 1
    stream = torch.nn.functional.pad(stream.flatten(), (0, -stream.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The codes that `pack_bits` packed: int8 of `shape`."""
    count = math.prod(shape)
    stream = (packed.to(torch.int16).unsqueeze(1) >> torch.arange(8, device=packed.device)) & 1
    values = (stream.flatten()[: count * bits].view(count, bits) << torch.arange(bits, device=packed.device)).sum(1)
    return (values - 2 ** (bits - 1)).to(torch.int8).view(*shape)
