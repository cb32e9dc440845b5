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

`qtrain::draw_keys` computes the keys of all streams of a graph at once, and is opaque to Inductor on purpose: it would write the
key's expression into every use of it, and each of the three steps of mix32 uses the one before twice. A thousand operations in
place of one scalar read cost minutes of compilation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.ops._library import define

__all__ = ["draw_key", "draw_keys", "draws", "draws_of_key", "draws_reference"]

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


def _keys_on_host(seed: Tensor, salts: list[int]) -> list[Tensor]:
    low, high = int(seed) & _MASK, int(seed) >> 32 & _MASK
    keys = [_mix32_int(low ^ _mix32_int(high ^ _mix32_int(salt))) for salt in salts]
    return [torch.tensor([key], dtype=torch.int64) for key in keys]


def _keys_on_device(seed: Tensor, salts: list[int]) -> list[Tensor]:
    """Without waiting for the device: the salts travel as arguments of a kernel, a copy would be waited for.

    Nor can they be copied once and kept: what is allocated while a CUDA graph is recorded belongs to the graph.
    """
    mixed = seed.new_zeros(len(salts))
    torch._foreach_add_(mixed.split(1), [_mix32_int(salt) for salt in salts])
    keys = _mix32((seed & _MASK) ^ _mix32(((seed >> 32) & _MASK) ^ mixed))
    parts = [keys.new_empty(1) for _ in salts]
    torch.split_with_sizes_copy(keys, [1] * len(salts), out=parts)  # one kernel
    return parts


def _draw_keys(seed: Tensor, salts: list[int]) -> list[Tensor]:
    if seed.dtype is not torch.int64 or seed.numel() != 1:
        raise KernelError(f"draw_keys: seed is {seed.dtype} {list(seed.shape)}; allowed: one int64")
    return (_keys_on_host if seed.device.type == "cpu" else _keys_on_device)(seed, salts)


draw_keys = define(
    "draw_keys(Tensor seed, int[] salts) -> Tensor[]",
    _draw_keys,
    fake=lambda seed, salts: [seed.new_empty(1) for _ in salts],
)
"""`draw_key` of one seed (int64, 0-d) and several salts -> for each int64 [1], in memory of its own.

Keys at places of one tensor would make the code of equal layers differ, which is compiled once as it is.
"""


DEVICES_WITH_LOWERINGS: set[str] = set()
"""Types of devices for which Inductor has a lowering of `qtrain::draws`, `qtrain::codes` and `qtrain::scale`: each is then one
fusible operation of generated code (`qcompile.backend.inductor_operations` registers them and adds the device)."""


def has_lowering(*tensors: Tensor) -> bool:
    """Whether these tensors are all on one device, of a type in `DEVICES_WITH_LOWERINGS`."""
    return len({t.device for t in tensors}) == 1 and tensors[0].device.type in DEVICES_WITH_LOWERINGS


def draws_of_key(key: Tensor, like: Tensor) -> Tensor:
    """The draws of a stream, by the key of its seed and salt (int64, one element): fp32, of `like`'s shape, on its device.

    Where Inductor has a lowering of `qtrain::draws` it is that, else its arithmetic.
    """
    return draws(key, like.shape) if has_lowering(key, like) else draws_reference(key, like.shape, like.device)


def draws_reference(key: Tensor, size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """`qtrain::draws` in plain aten, without synchronisation or data-dependent control flow: it traces with symbolic sizes, and
    Inductor fuses it. `device`: by default the key's."""
    element = torch.arange(math.prod(size), dtype=torch.int64, device=device or key.device).reshape(size)
    # Masked, the product does not leave int64; nor is it a part of Inductor's index, whose factors Triton wants in 32 bits.
    r = _mix32(((element & _MASK) * _SPREAD + key.reshape(())) & _MASK)
    return (r >> 8).to(torch.float32) * 2.0**-24 - 0.5


def _draws(key: Tensor, size: Sequence[int]) -> Tensor:
    check_key("draws", key)
    return draws_reference(key, size)


def _fake_draws(key: Tensor, size: Sequence[int]) -> Tensor:
    check_key("draws", key)
    return key.new_empty(size, dtype=torch.float32)


def check_key(op: str, key: Tensor) -> None:
    """Refuse anything but a key. Errors: `KernelError`."""
    if key.dtype is not torch.int64 or key.numel() != 1:
        raise KernelError(f"{op}: key is {key.dtype} {list(key.shape)}; allowed: one int64, as `draw_keys` returns it")


draws = define("draws(Tensor key, SymInt[] size) -> Tensor", _draws, fake=_fake_draws)
"""The draws of a stream by its key (int64, one element) -> fp32 of a size, uniform in [-1/2, 1/2), on the key's device.

Errors: `KernelError`.
"""
