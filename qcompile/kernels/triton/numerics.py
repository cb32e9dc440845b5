"""What the kernels share: the draw, rounding, and values shared along axes of a matrix."""

from __future__ import annotations

from enum import IntEnum

import triton
import triton.language as tl
from torch import Tensor

from qcompile.errors import KernelError

__all__ = ["MAGIC", "Layout", "add_draw", "draw_key", "layout_of", "load_shared", "mix32", "to_float32"]


class Layout(IntEnum):
    """How a scale, zero point or bias lies over an [M, N] matrix."""

    TENSOR = 0  # one value
    ROW = 1  # [M, 1]
    COLUMN = 2  # [1, N]
    FULL = 3  # [M, N]

    def shape(self, m: int, n: int) -> tuple[int, int]:
        """What such values' sizes are."""
        return (m if self & 1 else 1, n if self & 2 else 1)


TENSOR = tl.constexpr(int(Layout.TENSOR))
ROW = tl.constexpr(int(Layout.ROW))
COLUMN = tl.constexpr(int(Layout.COLUMN))
FULL = tl.constexpr(int(Layout.FULL))

MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2**23. Adding it rounds |y| < 2**22 to the nearest integer, ties to even, and leaves that integer,
modulo 256, in the low byte of the sum's bit pattern (the constant's own low byte is 0): no conversion
instruction, and no libdevice."""


def layout_of(op: str, name: str, values: Tensor, m: int, n: int, *allowed: Layout) -> Layout:
    """The layout of `values` (0-d, or sizes 1 where shared; 1-D is a row of columns) over [m, n].

    Errors: `KernelError` if the shape does not broadcast to [m, n], or has a layout that is not in `allowed`.
    """
    shape = (1, 1, *values.shape)[-2:] if values.ndim <= 2 else tuple(values.shape)
    for layout in allowed:
        if shape == layout.shape(m, n):
            return layout
    names = ", ".join(str(list(layout.shape(m, n))) for layout in allowed)
    raise KernelError(
        f"{op}: {name} has shape {list(values.shape)}; allowed: {names}, or 0-d. Keep the reduced axes (keepdim=True)."
    )


@triton.jit
def mix32(h):
    """uint32 -> uint32, the finaliser of `qcompile.ops.random`."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def draw_key(seed, salt):
    """int64 seed and int32 salt, scalars -> uint32."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    return mix32(low ^ mix32(high ^ mix32(salt.to(tl.uint32))))


@triton.jit
def add_draw(v, key, element):
    """fp32 v plus the draw of a uint32 key and a linear index (uint32: modulo 2**32 is enough).

    (r >> 8) * 2**-24 - 1/2 is the signed number (r - 2**31) >> 8 times 2**-24. That product is exact, so the
    fused multiplication and addition rounds as the addition alone: one conversion and one instruction.
    """
    r = mix32(element * 0x9E3779B1 + key) ^ 0x80000000
    return tl.fma((r.to(tl.int32, bitcast=True) >> 8).to(tl.float32), 5.9604644775390625e-08, v)  # 2**-24


@triton.jit
def to_float32(x, ASM: tl.constexpr):
    """fp32, bf16 or fp16 -> fp32, exact. ASM: the same by an NVIDIA instruction, opaque to the compiler.

    Triton 3.6 would rather change the layout of 2-byte values than of 1-byte codes: it moves the layout
    change for a transposed store in front of this cast, and then does everything after it twice, once in each
    layout.
    """
    if ASM and x.dtype == tl.bfloat16:
        asm: tl.constexpr = "{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }"
        return tl.inline_asm_elementwise(asm, "=f,h", [x], dtype=tl.float32, is_pure=True, pack=1)
    elif ASM and x.dtype == tl.float16:
        return tl.inline_asm_elementwise("cvt.f32.f16 $0, $1;", "=f,h", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return x.to(tl.float32)


@triton.jit
def load_shared(ptr, LAYOUT: tl.constexpr, rm, rn, M, N, other):
    """Values of layout TENSOR, ROW or COLUMN, in a shape that broadcasts to the tile of rows rm and columns
    rn; `other` outside."""
    if LAYOUT == TENSOR:
        return tl.load(ptr)
    elif LAYOUT == ROW:
        return tl.load(ptr + rm, mask=rm < M, other=other)[:, None]
    else:
        return tl.load(ptr + rn, mask=rn < N, other=other)[None, :]
