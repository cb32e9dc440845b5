"""Random draws as a pure function: equal arguments give equal draws, on every device and in every replay of a
graph.

    mix32(h):  h ^= h >> 16;  h *= 0x7feb352d;  h ^= h >> 15;  h *= 0x846ca68b;  h ^= h >> 16   (mod 2**32)
    key      = mix32(low(seed) ^ mix32(high(seed) ^ mix32(salt)))                (low, high: 32 bits each)
    r        = mix32(element * 0x9E3779B1 + key)
    u        = (r >> 8) * 2**-24 - 1/2                                           (in [-1/2, 1/2))

`element` is the linear index in the tensor's logical row-major order, so strides do not matter. The finaliser
is a "low bias" integer hash with constants found by search (Wellons, "Prospecting for hash functions", 2018);
0x9E3779B1 is the odd number next to 2**32 over the golden ratio; chaining them into a key is our choice. Good
enough to round with; not for cryptography.

torch has no full set of unsigned 32-bit operations, so the arithmetic is on int64 values in [0, 2**32). A
multiplier above 2**31 is written as its negative representative modulo 2**32: then no product leaves int64,
whose overflow C++ leaves undefined.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_key", "uniform_draws"]

_MASK = 0xFFFF_FFFF
_MULTIPLY_1 = 0x7FEB_352D
_MULTIPLY_2 = 0x846C_A68B - 2**32
_SPREAD = 0x9E37_79B1 - 2**32


def _mix32(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = (h * _MULTIPLY_1) & _MASK
    h = h ^ (h >> 15)
    h = (h * _MULTIPLY_2) & _MASK
    return h ^ (h >> 16)


def _mix32_int(h: int) -> int:
    h &= _MASK
    h ^= h >> 16
    h = (h * _MULTIPLY_1) & _MASK
    h ^= h >> 15
    h = (h * _MULTIPLY_2) & _MASK
    return h ^ (h >> 16)


def draw_key(seed: Tensor, salt: int) -> Tensor:
    """The stream of `seed` (int64, 0-d) and `salt` (an int; 32 bits count) -> int64, 0-d, in [0, 2**32)."""
    return _mix32((seed & _MASK) ^ _mix32(((seed >> 32) & _MASK) ^ _mix32_int(salt)))


def uniform_draws(seed: Tensor, salt: int, like: Tensor) -> Tensor:
    """fp32 draws, uniform in [-1/2, 1/2), of `like`'s shape on its device; 24 random bits each.

    Plain aten without synchronisation or data-dependent control flow: it traces with symbolic sizes, and
    Inductor fuses it.
    """
    element = torch.arange(like.numel(), dtype=torch.int64, device=like.device).reshape(like.shape)
    r = _mix32(((element & _MASK) * _SPREAD + draw_key(seed, salt)) & _MASK)
    return (r >> 8).to(torch.float32) * 2.0**-24 - 0.5
