"""Our operations in the C++ that Inductor generates, of one element and of a vector (`inductor_operations`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.virtualized import V

from qcompile.estimators.base import SMALLEST_SCALE
from qcompile.ops import code_range

__all__ = [
    "code",
    "code_vector",
    "draw",
    "draw_vector",
    "scale",
    "scale_vector",
    "shifted_code",
    "shifted_code_vector",
]

_HASH = "h ^= h >> 16; h *= 0x7FEB352Du; h ^= h >> 15; h *= 0x846CA68Bu; h ^= h >> 16;"


# ---- C++ of one element


def draw(element: Any, key: Any) -> str:
    return (
        f"[&] {{ uint32_t h = static_cast<uint32_t>({element}) * 0x9E3779B1u + static_cast<uint32_t>({key}); {_HASH} "
        "return static_cast<float>(static_cast<int32_t>(h >> 8)) * 0x1p-24f - 0.5f; }()"
    )


def code(bits: int) -> Callable[..., str]:
    low, high = _limits(bits)

    def of(x: Any, scale: Any, *place: Any) -> str:
        return f"min_propagate_nan(max_propagate_nan({_rounded(x, scale, *place)}, {low}), {high})"

    return of


def shifted_code(bits: int) -> Callable[..., str]:
    low, high = _limits(bits, symmetric=False)

    def of(x: Any, scale: Any, zero_point: Any, *place: Any) -> str:
        return f"min_propagate_nan(max_propagate_nan({_rounded(x, scale, *place)} + {zero_point}, {low}), {high})"

    return of


def _rounded(x: Any, scale: Any, *place: Any) -> str:
    return f"std::nearbyint({x} * (1.0f / {scale}){f' + {draw(*place)}' if place else ''})"


def scale(bits: int) -> Callable[..., str]:
    def of(amax: Any) -> str:
        return f"max_propagate_nan(std::abs({amax}) / {_limits(bits)[1]}, {SMALLEST_SCALE!r}f)"

    return of


def _limits(bits: int, *, symmetric: bool = True) -> list[str]:
    return [f"{limit}.0f" for limit in code_range(bits, symmetric=symmetric)]


# ---- C++ of a vector


def draw_vector(element: Any, key: Any) -> str:
    """In the vector extension of gcc and clang: ATen's vectors are signed, and their shifts check the distance in several steps."""
    lanes = V.kernel._get_num_vectors(torch.float32) * V.kernel.vec_isa.nelements(torch.float32)
    floats = V.kernel._get_vec_type(torch.float32)
    kinds = {"Codes": "uint32_t", "Signed": "int32_t", "Draws": "float"}
    types = " ".join(f"typedef {kind} {name} __attribute__((vector_size({4 * lanes})));" for name, kind in kinds.items())
    return (
        f"[&] {{ {types} Codes h, k; __builtin_memcpy(&h, &{element}, sizeof h); __builtin_memcpy(&k, &{key}, sizeof k); "
        f"h = h * 0x9E3779B1u + k; {_HASH} Draws u = __builtin_convertvector((Signed)(h >> 8), Draws) * 0x1p-24f - 0.5f; "
        f"{floats} draws; static_assert(sizeof draws == sizeof u); __builtin_memcpy(&draws, &u, sizeof u); return draws; }}()"
    )


def code_vector(bits: int) -> Callable[..., str]:
    def of(x: Any, scale: Any, *place: Any) -> str:
        return _clamped_vector(_rounded_vector(x, scale, *place), *_limits(bits))

    return of


def shifted_code_vector(bits: int) -> Callable[..., str]:
    def of(x: Any, scale: Any, zero_point: Any, *place: Any) -> str:
        return _clamped_vector(f"{_rounded_vector(x, scale, *place)} + {zero_point}", *_limits(bits, symmetric=False))

    return of


def _rounded_vector(x: Any, scale: Any, *place: Any) -> str:
    return f"({x} * {scale}.reciprocal(){f' + {draw_vector(*place)}' if place else ''}).round()"


def _clamped_vector(value: str, low: str, high: str) -> str:
    floats = V.kernel._get_vec_type(torch.float32)
    return f"at::vec::minimum(at::vec::maximum({value}, {floats}({low})), {floats}({high}))"


def scale_vector(bits: int) -> Callable[..., str]:
    def of(amax: Any) -> str:
        floats = V.kernel._get_vec_type(torch.float32)
        return f"at::vec::maximum({amax}.abs() / {floats}({_limits(bits)[1]}), {floats}({SMALLEST_SCALE!r}f))"

    return of
