"""Launch configurations: a table for each kind of hardware, and a choice by problem size.

Row 0 of a table is what runs without tuning. The rows are what others measured as winners for INT8 x INT8 on
this hardware (gemlite's tables, Inductor's and torchao's lists), less what does not fit; the order, and the
first row for sm_90, are derived from compiled code (docs/kernels.md) and wait for a measurement. `block_k` is
in bytes too: a code is one.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from qcompile.kernels.prepared import forget_prepared

__all__ = [
    "GLUON",
    "MATMUL",
    "REGISTERS",
    "SHARED_MEMORY",
    "SMALL_M",
    "TABLES",
    "TMA",
    "MatmulConfig",
    "TileConfig",
    "bucket",
    "candidates",
    "choose",
    "conv_config",
    "for_packed",
    "forget",
    "max_k",
    "remember",
    "spare_registers",
    "split_k",
    "tile_config",
]


class MatmulConfig(NamedTuple):
    """One launch of a GEMM kernel: tile sizes, loads in flight, warps, rows of tiles that share columns (L2 reuse).

    per_sm   persistent kernels: programs that share a multiprocessor; they get no more registers than that takes
    flatten  the TMA kernel: whether the next tile's loads begin before this tile is written
    """

    block_m: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    group_m: int = 8
    per_sm: int = 1
    flatten: bool = False


class TileConfig(NamedTuple):
    """One launch of an elementwise kernel over a matrix."""

    block_m: int
    block_n: int
    num_warps: int


MATMUL: dict[str, tuple[MatmulConfig, ...]] = {
    "sm_80": (
        MatmulConfig(128, 128, 64, 4, 4),
        MatmulConfig(128, 256, 64, 4, 8),
        MatmulConfig(256, 128, 64, 4, 8),
        MatmulConfig(64, 128, 128, 3, 4),
    ),
    "sm_86": (
        MatmulConfig(128, 128, 64, 4, 4),
        MatmulConfig(64, 128, 64, 4, 4),
        MatmulConfig(128, 64, 64, 4, 4),
    ),
    "sm_89": (
        MatmulConfig(128, 128, 64, 4, 4),
        MatmulConfig(256, 64, 64, 4, 4),
        MatmulConfig(128, 256, 64, 3, 8),
        MatmulConfig(256, 128, 64, 3, 8),
    ),
    # Triton drains the tensor cores after every int8 wgmma. 98,304 bytes put two blocks on a multiprocessor,
    # one computing while the other waits; a fourth stage would leave one.
    "sm_90": (
        MatmulConfig(128, 128, 128, 3, 8),
        MatmulConfig(128, 256, 128, 4, 8),
        MatmulConfig(128, 128, 128, 5, 8),
        MatmulConfig(256, 128, 128, 3, 8),
    ),
    "gfx942": (
        MatmulConfig(128, 128, 128, 2, 8),
        MatmulConfig(128, 128, 64, 2, 4),
        MatmulConfig(256, 128, 64, 2, 8),
    ),
    # Few, middling tiles: the interpreter pays by the program.
    "interpreter": (MatmulConfig(64, 64, 64, 1, 1),),
}
"""Hardware family (`launch.family`) -> configurations for M > 64."""

TMA: dict[str, tuple[MatmulConfig, ...]] = {
    # 128 registers a thread and 98,328 bytes: two programs of the first row share a multiprocessor, as above. The others are alone
    # on theirs: one keeps the next tile coming while it writes, one has the widest tile.
    "sm_90": (
        MatmulConfig(128, 128, 128, 3, 8, per_sm=2),
        MatmulConfig(128, 128, 128, 4, 8, flatten=True),
        MatmulConfig(128, 256, 128, 4, 8),
    ),
    "interpreter": (MatmulConfig(64, 32, 64, 1, 1), MatmulConfig(64, 32, 64, 1, 1, flatten=True)),
}
"""The same for the TMA kernel, where it can run."""

GLUON: dict[str, tuple[MatmulConfig, ...]] = {
    "sm_90": (
        MatmulConfig(128, 256, 128, 3, 8),
        MatmulConfig(256, 128, 128, 3, 8),
        MatmulConfig(128, 128, 128, 4, 8),
    ),
}
"""The same for the kernel in Gluon. A step stays in flight, so a program need not share its multiprocessor."""

TABLES = {"triton": MATMUL, "triton_tma": TMA, "triton_gluon": GLUON}
"""Kernel -> its table."""

SMALL_M: tuple[tuple[int, MatmulConfig], ...] = (
    (16, MatmulConfig(16, 64, 128, 4, 4)),
    (32, MatmulConfig(32, 64, 128, 4, 4)),
    (64, MatmulConfig(64, 64, 128, 4, 4)),
)
"""(largest M, configuration): narrow tiles for many blocks. Bound by reading B, so one row serves every
family."""

SHARED_MEMORY = {"sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "gfx942": 65_536}
"""Bytes that one block may use (CUDA C++ programming guide, "compute capabilities": 163, 99, 99 and 227 KB;
CDNA3: 64 KB)."""

REGISTERS = 65_536
"""32-bit registers of an NVIDIA multiprocessor (the same guide)."""

_FALLBACK = {"gfx": "gfx942"}


def _table(family: str) -> tuple[MatmulConfig, ...]:
    return MATMUL.get(family) or MATMUL[_FALLBACK.get(family[:3], "sm_86")]


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def bucket(m: int, n: int, k: int) -> tuple[int, int, int]:
    """The key of a tuned choice. M, the tokens, is rounded up to a power of two, so that a nearby batch size
    is not tuned again; N and K are a layer's widths."""
    return _next_power_of_2(m), n, k


def candidates(family: str, m: int, kernel: str = "triton") -> tuple[MatmulConfig, ...]:
    """Configurations of a kernel worth measuring for M rows, the default first; none where it was not made for few rows."""
    if kernel != "triton":
        return TABLES[kernel].get(family, ()) if m > SMALL_M[-1][0] else ()
    if family == "interpreter":
        return MATMUL[family]
    table = _table(family)
    for limit, config in SMALL_M:
        if m <= limit:
            if family.startswith("gfx"):
                config = config._replace(stages=2)  # 64 KB of shared memory
            return (config, table[0])
    return table


_chosen: dict[tuple[str, str, tuple[int, int, int]], MatmulConfig] = {}
_lock = threading.Lock()  # graphs may be compiled in several threads


def choose(family: str, m: int, n: int, k: int, kernel: str = "triton") -> MatmulConfig:
    """The configuration for a problem: the one remembered for its bucket, else the default."""
    known = _chosen.get((family, kernel, bucket(m, n, k)))
    if known is not None:
        return known
    return candidates(family, m)[0] if kernel == "triton" else TABLES[kernel][family][0]


def remember(family: str, m: int, n: int, k: int, config: MatmulConfig, kernel: str = "triton") -> None:
    """Use a configuration for a problem's bucket from now on (`qcompile.kernels.autotune` has measured it)."""
    with _lock:
        _chosen[family, kernel, bucket(m, n, k)] = config
    forget_prepared()


def forget() -> None:
    """Forget what was tuned."""
    with _lock:
        _chosen.clear()
    forget_prepared()


def spare_registers(config: MatmulConfig) -> MatmulConfig:
    """The same tile with so many warps that a thread has 64 sums at most, for kernels that spill with more: they ask several things
    of a result, or turn an operand in registers."""
    return config._replace(warps=max(config.warps, config.block_m * config.block_n // (32 * 64)))


def for_packed(config: MatmulConfig, fields: int) -> MatmulConfig:
    """A configuration of as many codes a step for packed operands: fewer bytes along K.

    A tensor core takes 32 bytes along K at least. Where that makes a step longer, more warps share its registers.
    """
    if config.block_k // fields < 32:
        return config._replace(block_k=32, warps=max(8, config.warps))
    return config._replace(block_k=config.block_k // fields)


def max_k(zero_points: int) -> int:
    """The longest K whose sum fits int32, with zero points for none (131,071), one (65,792) or both (33,025)
    of the operands.

    A code's magnitude is at most 128; its distance from a zero point among the codes at most 255.
    """
    return (2**31 - 1) // (128 ** (2 - zero_points) * 255**zero_points)


def conv_config(family: str, m: int, n: int, k: int, *, zero_point: bool = False) -> MatmulConfig:
    """A tile for a convolution: the matrix product's default, no wider than n output columns and no deeper than k channels.

    A filter has few channels where a linear layer has thousands; the part of a tile past the end is computed for nothing. With a
    zero point x goes through registers, and four warps of compute capability 8.x would spill on a tile 128 wide.
    """
    config = candidates(family, m)[0]
    widest = 64 if zero_point and config.warps == 4 else config.block_n
    narrow = max(32, min(widest, _next_power_of_2(n)))
    shallow = max(32, min(config.block_k, _next_power_of_2(k)))
    warps = config.warps if config.block_m * narrow >= 128 * 128 else min(config.warps, 4)
    return config._replace(block_n=narrow, block_k=shallow, warps=warps)


def split_k(device: torch.device, tiles: int, k: int, block_k: int) -> int:
    """Into how many parts a sum over k is split so that the grid fills the device; a part has at least eight blocks."""
    if device.type != "cuda":
        return 2 if k >= 16 * block_k else 1  # the interpreter: both paths are taken
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // max(tiles, 1), k // (8 * block_k)))


def tile_config(m: int, n: int) -> TileConfig:
    """Tiles of 16,384 values, 64 to a thread: square where the matrix is (both orientations are then stored
    in runs of 128 bytes), long where it is thin."""
    if m <= 16:
        return TileConfig(16, 1024, 8)
    if n <= 16:
        return TileConfig(1024, 16, 8)
    return TileConfig(128, 128, 8)
