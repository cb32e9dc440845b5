"""`qtrain::draws`, `qtrain::codes` and `qtrain::scale` in Inductor's generated code, C++ or Triton: one operation each.

Written out in aten operations, the hash of `qcompile.ops.random` is seventeen operations on int64, a quantize eight more and its
scale three. Each of Inductor's passes visits them for every use: they would be a third of the nodes of a GPT under `int8`. The hash
would also run on half as many vector lanes as it could. As one operation it is a few lines on uint32, the same to the bit: 0.6 ms
instead of 1.6 ms for 2048 x 2048 elements in C++ on 2 threads (AMD Zen 5, AVX-512, torch 2.13). On a GPU, a quantize written out
would not be the same to the bit, because Inductor's code divides approximately and rounds a product and a sum once.

Private API, checked on torch 2.11 and 2.13: Inductor's operation handlers have no place to add an operation, so each operation is
set as an attribute of the classes that handle all of them. If one of these classes is missing or has another signature, graphs for
that kind of device have the operations written out. Other generators of code (Inductor's `cpu_backend` and `cuda_backend`) call
the operators.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch._inductor.virtualized import ops
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND

from qcompile.ops import codes, random, scale

__all__ = ["register"]

DRAW = "qtrain_draw"
"""(element, key), the lower 32 bits of both as int32 -> fp32 in [-1/2, 1/2): `draws_of_key` of one element."""

CODE, SHIFTED_CODE = "qtrain_code_{bits}", "qtrain_shifted_code_{bits}"
"""(x, scale), a shifted code's zero point, all fp32, and for stochastic rounding (element, key) as of a draw -> one of
`qtrain::codes`, as fp32.

An operation for each number of bits: Inductor's handlers take what is no value for an index.
"""

SCALE = "qtrain_scale_{bits}"
"""amax, fp32 -> `qtrain::scale` of it."""

_BITS = range(2, 9)

_Text = Callable[..., str]


class _Operations(NamedTuple):
    """Code of one element, or of as many as are computed at once, by that of its operands."""

    draw: _Text
    code: Callable[[int], _Text]  # of so many bits
    shifted_code: Callable[[int], _Text]
    scale: Callable[[int], _Text]


# ---- what the operators are lowered to. Inductor's modules are imported where they are used: one that another torch does not have
# must fail inside `register`, which catches that, and not this module's import.


def _is_known(device: torch.device) -> bool:
    from torch._inductor import config

    generators = {"cpu": config.cpu_backend == "cpp", "cuda": config.cuda_backend == "triton"}
    return device.type in random.DEVICES_WITH_LOWERINGS and generators[device.type]


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


def _lower_codes(x: Any, scale: Any, zero_point: Any, bits: int, key: Any) -> Any:
    from torch._inductor import lowering
    from torch._inductor.ir import Pointwise

    if not _is_known(x.get_device()):
        return lowering.fallback_handler(codes, add_to_fallback_set=False)(x, scale, zero_point, bits, key)
    size = list(x.get_size())
    shared = [scale] if zero_point is None else [scale, lowering.to_dtype(zero_point, torch.float32)]
    load_shared = [lowering.expand(values, size).make_loader() for values in shared]
    load = lowering.to_dtype(x, torch.float32).make_loader()
    name = (CODE if zero_point is None else SHIFTED_CODE).format(bits=bits)
    place = _places(key, size) if key is not None else lambda index: ()

    def code(index: Sequence[Any]) -> Any:
        value = getattr(ops, name)(load(index), *[values(index) for values in load_shared], *place(index))
        if x.get_device().type == "cuda":  # straight to int8 would be one instruction more
            value = ops.to_dtype(value, torch.int32)
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


def register() -> set[str]:
    """Make the operations known to Inductor; the types of devices for which they are."""
    try:
        from torch._inductor import lowering, ops_handler

        names = [DRAW, *(name.format(bits=bits) for name in (CODE, SHIFTED_CODE, SCALE) for bits in _BITS)]
        calls = {name: ops_handler.DefaultHandler._call_default(name) for name in names}
        for name in names:
            lowering.register_op_dtype_propagation_rules(name, ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT, torch.float32)
        lowering.register_lowering(random.draws, type_promotion_kind=None)(_lower_draws)
        lowering.register_lowering(codes, type_promotion_kind=None)(_lower_codes)
        lowering.register_lowering(scale, type_promotion_kind=None)(_lower_scale)
    except (ImportError, AttributeError, TypeError):
        return set()
    for name in names:
        setattr(ops_handler.DefaultHandler, name, calls[name])
    for device, generators in (("cpu", _cpp), ("cuda", _triton)):
        try:
            found = generators()
        except (ImportError, AttributeError, TypeError):
            continue
        for overrides, operations in found:
            _extend(overrides, operations)
        if found:
            random.DEVICES_WITH_LOWERINGS.add(device)
    return set(random.DEVICES_WITH_LOWERINGS)


def _extend(overrides: type, operations: _Operations) -> None:
    """Give a class that generates code the operations."""
    texts = {DRAW: operations.draw}
    for bits in _BITS:
        texts |= {
            CODE.format(bits=bits): operations.code(bits),
            SHIFTED_CODE.format(bits=bits): operations.shifted_code(bits),
            SCALE.format(bits=bits): operations.scale(bits),
        }
    for name, text in texts.items():
        text.__name__ = name  # the vector's falls back to the scalar's of that name
        setattr(overrides, name, staticmethod(text))


def _cpp() -> list[tuple[type, _Operations]]:
    """The classes that generate code for a CPU, if they have all that is asked of them."""
    from torch._inductor.codegen.cpp import CppOverrides, CppVecKernel, CppVecOverrides

    from qcompile.backend import inductor_operations_cpp as cpp

    if sys.platform == "win32":  # its compiler has no vectors
        return []
    assert callable(CppVecKernel._get_num_vectors) and callable(CppVecKernel._get_vec_type)
    of_one = _Operations(cpp.draw, cpp.code, cpp.shifted_code, cpp.scale)
    of_a_vector = _Operations(cpp.draw_vector, cpp.code_vector, cpp.shifted_code_vector, cpp.scale_vector)
    return [(CppOverrides, of_one), (CppVecOverrides, of_a_vector)]


def _triton() -> list[tuple[type, _Operations]]:
    """The same for a GPU of NVIDIA's or AMD's: both are "cuda" to torch."""
    from torch._inductor.codegen.triton import TritonOverrides

    from qcompile.backend import inductor_operations_triton as triton

    return [(TritonOverrides, _Operations(triton.draw, triton.code, triton.shifted_code, triton.scale))]
