"""`qtrain::draws`, `qtrain::codes` and `qtrain::scale` in Inductor's generated code for a CPU: one operation each.

Written out, the hash of `qcompile.ops.random` is seventeen operations on int64, a quantize eight more and its scale three, which
each of Inductor's passes and analyses visits for every use: a third of the nodes of a GPT under `int8`. The hash also runs on half
as many lanes as it could. As one operation it is a few lines of C++ on uint32, the same to the bit, and costs a third at run time:
0.6 ms instead of 1.6 ms for 2048 x 2048 elements on 2 threads (AMD Zen 5, AVX-512, torch 2.13).

Private API, checked on torch 2.11 and 2.13: Inductor's operation handlers have no place to add an operation, so it is set as an
attribute of the classes that handle all of them. Where one of these is missing or has another signature, no graph gets the
operations, and all are written out. Another generator of code for the CPU (Inductor's `cpu_backend`) calls the operators.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch._inductor.virtualized import V, ops
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND

from qcompile.estimators.base import SMALLEST_SCALE
from qcompile.ops import code_range, codes, random, scale

__all__ = ["register"]

DRAW = "qtrain_draw"
"""(element, key), the lower 32 bits of both as int32 -> fp32 in [-1/2, 1/2): `draws_of_key` of one element."""

CODE = "qtrain_code_{bits}"
"""(x, scale), both fp32, and for stochastic rounding (element, key) as of a draw -> one of `qtrain::codes`, as fp32.

An operation for each number of bits: Inductor's handlers take what is no value for an index.
"""

SCALE = "qtrain_scale_{bits}"
"""amax, fp32 -> `qtrain::scale` of it."""

_HASH = "h ^= h >> 16; h *= 0x7FEB352Du; h ^= h >> 15; h *= 0x846CA68Bu; h ^= h >> 16;"


# ---- C++ of one element


def _draw(element: Any, key: Any) -> str:
    return (
        f"[&] {{ uint32_t h = static_cast<uint32_t>({element}) * 0x9E3779B1u + static_cast<uint32_t>({key}); {_HASH} "
        "return static_cast<float>(static_cast<int32_t>(h >> 8)) * 0x1p-24f - 0.5f; }()"
    )


def _code(bits: int) -> Callable[..., str]:
    low, high = _limits(bits)

    def code(x: Any, scale: Any, *draw: Any) -> str:
        value = f"{x} * (1.0f / {scale})" + (f" + {_draw(*draw)}" if draw else "")
        return f"min_propagate_nan(max_propagate_nan(std::nearbyint({value}), {low}), {high})"

    return code


def _scale(bits: int) -> Callable[..., str]:
    def scale(amax: Any) -> str:
        return f"max_propagate_nan(std::abs({amax}) / {_limits(bits)[1]}, {SMALLEST_SCALE!r}f)"

    return scale


def _limits(bits: int) -> list[str]:
    return [f"{limit}.0f" for limit in code_range(bits, symmetric=True)]


# ---- C++ of a vector


def _draw_vector(element: Any, key: Any) -> str:
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


def _code_vector(bits: int) -> Callable[..., str]:
    low, high = _limits(bits)

    def code(x: Any, scale: Any, *draw: Any) -> str:
        floats = V.kernel._get_vec_type(torch.float32)
        value = f"{x} * {scale}.reciprocal()" + (f" + {_draw_vector(*draw)}" if draw else "")
        return f"at::vec::minimum(at::vec::maximum(({value}).round(), {floats}({low})), {floats}({high}))"

    return code


def _scale_vector(bits: int) -> Callable[..., str]:
    def scale(amax: Any) -> str:
        floats = V.kernel._get_vec_type(torch.float32)
        return f"at::vec::maximum({amax}.abs() / {floats}({_limits(bits)[1]}), {floats}({SMALLEST_SCALE!r}f))"

    return scale


# ---- what the operators are lowered to


def _is_known(device: torch.device) -> bool:
    from torch._inductor import config

    return device.type in random.DEVICES_WITH_LOWERINGS and config.cpu_backend == "cpp"


def _places(key: Any, size: Sequence[Any]) -> Callable[[Sequence[Any]], tuple[Any, Any]]:
    """Of an element by its index: its place in row-major order, and the key."""
    strides = [*itertools.accumulate([1, *reversed(size[1:])], lambda a, b: a * b)][::-1]
    load, first = key.make_loader(), [0] * len(key.get_size())

    def place(index: Sequence[Any]) -> tuple[Any, Any]:
        element = sum((i * s for i, s in zip(index, strides, strict=False)), start=sympy.Integer(0))
        return ops.index_expr(element, torch.int32), ops.to_dtype(load(first), torch.int32)

    return place


def _lower_draws(key: Any, size: Sequence[Any]) -> Any:
    from torch._inductor import lowering
    from torch._inductor.ir import Pointwise

    if not _is_known(key.get_device()):
        return lowering.fallback_handler(random.draws, add_to_fallback_set=False)(key, size)
    place = _places(key, size)

    def draw(index: Sequence[Any]) -> Any:
        drawn = getattr(ops, DRAW)(*place(index))
        return ops.to_dtype(drawn, torch.float32)  # one of two analyses of dtypes goes by the operands of what it does not know

    return Pointwise.create(device=key.get_device(), dtype=torch.float32, inner_fn=draw, ranges=list(size))


def _lower_codes(x: Any, scale: Any, bits: int, key: Any) -> Any:
    from torch._inductor import lowering
    from torch._inductor.ir import Pointwise

    if not _is_known(x.get_device()):
        return lowering.fallback_handler(codes, add_to_fallback_set=False)(x, scale, bits, key)
    size = list(x.get_size())
    load_scale = lowering.expand(scale, size).make_loader()
    load = lowering.to_dtype(x, torch.float32).make_loader()
    place = _places(key, size) if key is not None else lambda index: ()

    def code(index: Sequence[Any]) -> Any:
        value = getattr(ops, CODE.format(bits=bits))(load(index), load_scale(index), *place(index))
        return ops.to_dtype(value, torch.int8)

    return Pointwise.create(device=x.get_device(), dtype=torch.int8, inner_fn=code, ranges=size)


def _lower_scale(amax: Any, bits: int) -> Any:
    from torch._inductor import lowering
    from torch._inductor.ir import Pointwise

    if not _is_known(amax.get_device()):
        return lowering.fallback_handler(scale, add_to_fallback_set=False)(amax, bits)
    load = amax.make_loader()

    def value(index: Sequence[Any]) -> Any:
        return getattr(ops, SCALE.format(bits=bits))(load(index))

    return Pointwise.create(device=amax.get_device(), dtype=torch.float32, inner_fn=value, ranges=list(amax.get_size()))


def register() -> bool:
    """Make the operations known to Inductor; whether they are."""
    if sys.platform == "win32":  # its compiler has no vectors
        return False
    try:
        from torch._inductor import lowering, ops_handler
        from torch._inductor.codegen.cpp import CppOverrides, CppVecKernel, CppVecOverrides

        operations = {DRAW: (_draw, _draw_vector)}
        for bits in range(2, 9):
            operations[CODE.format(bits=bits)] = _code(bits), _code_vector(bits)
            operations[SCALE.format(bits=bits)] = _scale(bits), _scale_vector(bits)
        calls = {name: ops_handler.DefaultHandler._call_default(name) for name in operations}
        vectors = CppVecKernel._get_num_vectors, CppVecKernel._get_vec_type
        for name in operations:
            lowering.register_op_dtype_propagation_rules(name, ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT, torch.float32)
        lowering.register_lowering(random.draws, type_promotion_kind=None)(_lower_draws)
        lowering.register_lowering(codes, type_promotion_kind=None)(_lower_codes)
        lowering.register_lowering(scale, type_promotion_kind=None)(_lower_scale)
    except (ImportError, AttributeError, TypeError):
        return False
    assert all(map(callable, vectors))
    for name, implementations in operations.items():
        setattr(ops_handler.DefaultHandler, name, calls[name])
        for overrides, implementation in zip((CppOverrides, CppVecOverrides), implementations, strict=True):
            implementation.__name__ = name  # the vector's falls back to the scalar's of that name
            setattr(overrides, name, staticmethod(implementation))
    random.DEVICES_WITH_LOWERINGS.add("cpu")
    return True
