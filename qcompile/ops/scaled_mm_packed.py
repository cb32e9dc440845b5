"""`scaled_mm` of packed operands: the codes of one operand or both lie several to a byte along K, as `pack_codes` puts them.

    out = scaled_mm(unpack(a), unpack(b), ...)

A GPU unpacks in registers: the bytes, not the codes, go through memory. Field j of a byte holds a code of the j-th part of K,
so the product is a sum of products over parts, and an operand that is not packed is read part by part.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qcompile.errors import KernelError
from qcompile.kernels import cpu
from qcompile.kernels.quantized_tensor import as_operator
from qcompile.ops._checks import check_matrix, same_size
from qcompile.ops._library import LIBRARY, checked, define
from qcompile.ops.pack_codes import codes_per_byte, unpack_codes_reference
from qcompile.ops.scaled_mm import check_scaled_mm, scaled_mm_reference

__all__ = ["check_scaled_mm_packed", "scaled_mm_packed", "scaled_mm_packed_reference", "unpacked"]


def unpacked(a: Tensor, b: Tensor, k: int, a_bits: int, b_bits: int) -> tuple[Tensor, Tensor]:
    """The codes [M, K] and [K, N] of the operands; one of more than 4 bits is returned as it is."""
    if codes_per_byte(a_bits) > 1:
        a = unpack_codes_reference(a, a_bits, 1, k)
    if codes_per_byte(b_bits) > 1:
        b = unpack_codes_reference(b, b_bits, 0, k)
    return a, b


def scaled_mm_packed_reference(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    """`qtrain::scaled_mm_packed` in aten, unchecked."""
    *operands, k, a_bits, b_bits = rest
    return scaled_mm_reference(*unpacked(a, b, k, a_bits, b_bits), *operands)


def check_scaled_mm_packed(a: Tensor, b: Tensor, *rest: Any) -> None:
    """Refuse operands that `qtrain::scaled_mm_packed` does not take, for every device. Errors: `KernelError`."""
    *operands, k, a_bits, b_bits = rest
    for name, codes, axis, bits in (("a", a, 1, a_bits), ("b", b, 0, b_bits)):
        check_matrix("scaled_mm_packed", name, codes)
        fields = codes_per_byte(bits)
        if not same_size(codes.shape[axis], k if fields == 1 else -(-k // fields)):
            raise KernelError(
                f"scaled_mm_packed: {name} has {codes.shape[axis]} bytes along K; {k} codes of {bits} bits, "
                f"{fields} a byte, take {-(-k // fields)}. Pack along K: pack_codes({name}, {bits}, axis={axis})."
            )
    m, n = a.shape[0], b.shape[1]
    check_scaled_mm(a.new_empty((m, 0)), b.new_empty((0, n)), *operands)


def _fake(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=rest[5])


def _on_cpu(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    *operands, k, a_bits, b_bits = rest
    return as_operator(cpu.scaled_mm)(*unpacked(a, b, k, a_bits, b_bits), *operands)


scaled_mm_packed = define(
    "scaled_mm_packed(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? a_zero, Tensor? b_zero, Tensor? bias, "
    "ScalarType out_dtype, SymInt k, int a_bits, int b_bits) -> Tensor",
    checked(check_scaled_mm_packed, scaled_mm_packed_reference),
    fake=checked(check_scaled_mm_packed, _fake),
)
"""As `scaled_mm`, with K codes an operand: a int8 [M, ceil(K / fields)], b int8 [ceil(K / fields), N].

    a_bits, b_bits  4 or 3: two codes a byte; 2: four; 5 to 8: one, an operand that is not packed

Errors: `KernelError`.
"""
LIBRARY.impl("scaled_mm_packed", checked(check_scaled_mm_packed, _on_cpu), "CPU")
