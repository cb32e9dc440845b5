"""`qtrain::draws` in Inductor's generated code for a CPU: one operation of its own.

Written out, the hash of `qcompile.ops.random` is seventeen operations on int64, which each of Inductor's analyses visits for every
use: a fifth of the time that Python takes to compile a GPT under `int8`. It also runs on half as many lanes as it could. As one
operation it is a few lines of C++ on uint32, the same to the bit, and costs a third at run time: 0.6 ms instead of 1.6 ms for
2048 x 2048 elements on 2 threads (AMD Zen 5, AVX-512, torch 2.13).

Private API, checked on torch 2.11 and 2.13: Inductor's operation handlers have no place to add an operation, so it is set as an
attribute of the classes that handle all of them. Where one of these is missing or has another signature, no graph gets the
operation, and draws are written out. Another generator of code for the CPU (Inductor's `cpu_backend`) calls the operator.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._inductor.virtualized import V, ops
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND

from qcompile.ops import random

__all__ = ["register"]

NAME = "qtrain_draw"
"""(element, key), the lower 32 bits of both as int32 -> fp32 in [-1/2, 1/2): `draws_of_key` of one element."""


_HASH = "h ^= h >> 16; h *= 0x7FEB352Du; h ^= h >> 15; h *= 0x846CA68Bu; h ^= h >> 16;"


def _scalar(element: Any, key: Any) -> str:
    return (
        f"[&] {{ uint32_t h = static_cast<uint32_t>({element}) * 0x9E3779B1u + static_cast<uint32_t>({key}); {_HASH} "
        "return static_cast<float>(static_cast<int32_t>(h >> 8)) * 0x1p-24f - 0.5f; }()"
    )


def _vector(element: Any, key: Any) -> str:
    """In the vectors of gcc and clang: those of ATen are signed, and shift in several steps to mind every distance."""
    lanes = V.kernel._get_num_vectors(torch.float32) * V.kernel.vec_isa.nelements(torch.float32)
    floats = V.kernel._get_vec_type(torch.float32)
    kinds = {"Codes": "uint32_t", "Signed": "int32_t", "Draws": "float"}
    types = " ".join(f"typedef {kind} {name} __attribute__((vector_size({4 * lanes})));" for name, kind in kinds.items())
    return (
        f"[&] {{ {types} Codes h, k; __builtin_memcpy(&h, &{element}, sizeof h); __builtin_memcpy(&k, &{key}, sizeof k); "
        f"h = h * 0x9E3779B1u + k; {_HASH} Draws u = __builtin_convertvector((Signed)(h >> 8), Draws) * 0x1p-24f - 0.5f; "
        f"{floats} draws; static_assert(sizeof draws == sizeof u); __builtin_memcpy(&draws, &u, sizeof u); return draws; }}()"
    )


def _lower(key: Any, size: Sequence[Any]) -> Any:
    from torch._inductor import config, lowering
    from torch._inductor.ir import Pointwise

    if key.get_device().type not in random.WHOLE_ON or config.cpu_backend != "cpp":
        return lowering.fallback_handler(random.draws, add_to_fallback_set=False)(key, size)
    strides = [*itertools.accumulate([1, *reversed(size[1:])], lambda a, b: a * b)][::-1]
    load, first = key.make_loader(), [0] * len(key.get_size())

    def draw(index: Sequence[Any]) -> Any:
        element = sum((i * s for i, s in zip(index, strides, strict=False)), start=sympy.Integer(0))
        drawn = getattr(ops, NAME)(ops.index_expr(element, torch.int32), ops.to_dtype(load(first), torch.int32))
        return ops.to_dtype(drawn, torch.float32)  # one of two analyses of dtypes goes by the operands of what it does not know

    return Pointwise.create(device=key.get_device(), dtype=torch.float32, inner_fn=draw, ranges=list(size))


def register() -> bool:
    """Make the operation known to Inductor; whether it is."""
    if sys.platform == "win32":  # its compiler has no vectors
        return False
    try:
        from torch._inductor import lowering, ops_handler
        from torch._inductor.codegen.cpp import CppOverrides, CppVecKernel, CppVecOverrides

        call = ops_handler.DefaultHandler._call_default(NAME)
        vectors = CppVecKernel._get_num_vectors, CppVecKernel._get_vec_type
        lowering.register_op_dtype_propagation_rules(NAME, ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT, torch.float32)
        lowering.register_lowering(random.draws, type_promotion_kind=None)(_lower)
    except (ImportError, AttributeError, TypeError):
        return False
    assert all(map(callable, vectors))
    setattr(ops_handler.DefaultHandler, NAME, call)
    for overrides, implementation in ((CppOverrides, _scalar), (CppVecOverrides, _vector)):
        implementation.__name__ = NAME  # the vector's falls back to the scalar's of that name
        setattr(overrides, NAME, staticmethod(implementation))
    random.WHOLE_ON.add("cpu")
    return True
