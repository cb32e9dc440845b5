"""Codes of few bits, several to a byte.

    fields    2 bits: 4 a byte; 3 and 4 bits: 2 a byte; 5 to 8 bits are not packed
    part      ceil(size / fields), the packed axis' new size
    packed[i] = sum_j (code[i + j * part] mod 2**width) << (j * width)        width = 8 / fields

Field j of the bytes holds the j-th part of the axis, not every j-th code. So packing and unpacking are slices and shifts without
any shuffle, and they vectorize along the other axis; and where the packed axis is the one that a GEMM sums over, a GEMM needs no
unpacked copy: it is the sum of the GEMMs of the parts, in any order. Codes are stored in two's complement. What the last part
lacks is filled with 0.

Three bits do not divide a byte: they take a field of four, as many as 4-bit codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import KernelError
from qcompile.ops._checks import check_dtype
from qcompile.ops._library import define

__all__ = ["codes_per_byte", "pack_codes", "pack_codes_reference", "unpack_codes", "unpack_codes_reference"]


def codes_per_byte(bits: int) -> int:
    """How many codes of `bits` bits (2 to 8) a byte holds. Errors: `KernelError`."""
    if not 2 <= bits <= 8:
        raise KernelError(f"pack_codes: bits is {bits}; allowed: 2 to 8.")
    return {2: 4, 3: 2, 4: 2}.get(bits, 1)


def pack_codes_reference(codes: Tensor, bits: int, axis: int) -> Tensor:
    """`qtrain::pack_codes` in aten, unchecked."""
    fields, size = codes_per_byte(bits), codes.shape[axis]
    if fields == 1:
        return codes.clone(memory_format=torch.contiguous_format)
    width, part = 8 // fields, -(-size // fields)
    if not isinstance(size, int) or part * fields > size:
        fill = [*codes.shape]
        fill[axis] = part * fields - size
        codes = torch.cat([codes, codes.new_zeros(fill)], axis)
    packed = codes.narrow(axis, 0, part) & (2**width - 1)
    for j in range(1, fields):
        field = codes.narrow(axis, j * part, part) & (2**width - 1)
        packed = packed | (field << (j * width))
    return packed.contiguous()


def unpack_codes_reference(packed: Tensor, bits: int, axis: int, size: int) -> Tensor:
    """`qtrain::unpack_codes` in aten, unchecked."""
    fields = codes_per_byte(bits)
    if fields == 1:
        return packed.clone(memory_format=torch.contiguous_format)
    width, part = 8 // fields, packed.shape[axis]
    if not isinstance(size, int) or not isinstance(part, int):
        fields_of = [(packed << (8 - (j + 1) * width)) >> (8 - width) for j in range(fields)]
        return torch.cat(fields_of, axis).narrow(axis, 0, size).clone(memory_format=torch.contiguous_format)
    parts = []
    for j in range(fields):
        codes = packed
        if size < (j + 1) * part:  # what fills up the last bytes
            codes = packed.narrow(axis, 0, max(0, size - j * part))
        parts.append((codes << (8 - (j + 1) * width)) >> (8 - width))  # arithmetic: the sign comes back
    return torch.cat(parts, axis)


def _check(op: str, name: str, codes: Tensor, bits: int, axis: int) -> None:
    check_dtype(op, name, codes, torch.int8)
    codes_per_byte(bits)
    if not 0 <= axis < codes.ndim:
        raise KernelError(f"{op}: axis is {axis} and {name} has shape {list(codes.shape)}; allowed: 0 to {codes.ndim - 1}.")


def _pack(codes: Tensor, bits: int, axis: int) -> Tensor:
    _check("pack_codes", "codes", codes, bits, axis)
    return pack_codes_reference(codes, bits, axis)


def _unpack(packed: Tensor, bits: int, axis: int, size: int) -> Tensor:
    _check("unpack_codes", "packed", packed, bits, axis)
    fields, part = codes_per_byte(bits), packed.shape[axis]
    if isinstance(size, int) and isinstance(part, int) and part != -(-size // fields):
        raise KernelError(
            f"unpack_codes: packed has {part} bytes along axis {axis}; {size} codes of {bits} bits take {-(-size // fields)}."
        )
    return unpack_codes_reference(packed, bits, axis, size)


pack_codes = define("pack_codes(Tensor codes, int bits, int axis) -> Tensor", _pack, fake=_pack)
"""codes int8, in the range of `bits` bits -> int8 of the same shape but ceil(size / fields) along `axis` (0 ... ndim - 1).

Codes out of range lose their upper bits. Errors: `KernelError`.
"""
unpack_codes = define("unpack_codes(Tensor packed, int bits, int axis, SymInt size) -> Tensor", _unpack, fake=_unpack)
"""What `pack_codes` made of codes with `size` along `axis` -> these codes, contiguous.

Errors: `KernelError`, also where `size` and the packed size do not fit.
"""
